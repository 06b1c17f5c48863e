"""self_attention's choice of an implementation, and the libraries' kernels; tables and packages are fakes."""

import re
import sys
import warnings
from dataclasses import replace
from types import ModuleType
from typing import get_args

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode

from ditfast import ops
from ditfast.bench.tune.table import refresh
from ditfast.ops import attention_implementations as attention_choice
from ditfast.ops import attention_implementations as implementations
from ditfast.ops import backend as backend_module
from ditfast.ops.attention_implementations import (
    PACKAGES,
    AttentionBackend,
    Case,
    choose,
    heuristic,
    run_library,
)
from ditfast.parity import judge
from ditfast.reference import ops as formulas
from ditfast.testing.operators import OPERATORS, Shape, check
from tests.kernels.conftest import failures

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is refused on a machine without a GPU")


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    refresh()
    for cached in (implementations.import_reason, implementations._function):
        cached.cache_clear()


def case(tokens=256, head_dim=72, dtype=torch.bfloat16, biased=False, training=False):
    return Case(tokens, head_dim, dtype, biased, training)


@pytest.mark.parametrize(
    ("heads", "training", "backend"),
    [(1, False, "triton"), (9, False, "sdpa"), (9, True, "triton"), (6, True, "sdpa")],
    ids=["head dim 72", "8 in inference", "8 in training", "12 in training"],
)
def test_what_auto_takes_on_a_gpu(heads, training, backend, monkeypatch):
    monkeypatch.setattr(backend_module, "_gpu_reason", lambda index: None)
    with FakeTensorMode():
        qkv = torch.empty(2, 5, 216, dtype=torch.bfloat16, device="cuda", requires_grad=training)

        def taken():
            return ops.attention_backend(qkv, 5, 72 // heads)

        assert taken() == backend
        with ops.use_backend("torch"):
            assert taken() == "sdpa"
        with ops.use_backend("triton"):
            assert taken() == "triton"


@pytest.mark.parametrize(
    ("attention_case", "major", "packages", "backend"),
    [
        (case(head_dim=64), 8, ("flash_attn",), "sdpa"),
        (case(head_dim=64), 9, ("flash_attn", "flash_attn_3", "flash_attn_4"), "flash_attn_3"),
        (case(head_dim=64), 9, ("flash_attn", "flash_attn_4"), "sdpa"),
        (case(head_dim=64), 10, ("flash_attn", "flash_attn_4"), "flash_attn_4"),
        (case(head_dim=64, dtype=torch.float32), 9, ("flash_attn_3",), "sdpa"),
        (case(head_dim=64, biased=True), 9, ("flash_attn_3",), "sdpa"),
        (case(head_dim=64, training=True), 9, ("flash_attn_3",), "triton"),
        (case(head_dim=72), 9, ("flash_attn_3",), "triton"),
        (case(head_dim=160, training=True), 9, ("flash_attn_3",), "flash_attn_3"),
        (case(head_dim=160, training=True), 8, (), "sdpa"),
    ],
)
def test_the_heuristic(attention_case, major, packages, backend):
    def has(name):
        return name in packages and implementations.case_reason(name, *attention_case[1:], major) is None

    assert heuristic(attention_case, major, has) == backend


ENTRIES = {
    "attention_inference/bfloat16/72/256": {"candidate": "cudnn"},
    "attention_training/bfloat16/72/256": {"candidate": "flash_attn"},
    "attention_inference/bfloat16/64/256": {"candidate": "triton"},
    "attention_inference/bfloat16/160/256": {"candidate": "triton"},
    "attention_fwd/bfloat16/72/256": {"block_m": 64},
    "adaln_bwd/bfloat16/72/256": {"num_warps": 4},
}


@pytest.fixture
def tuned(monkeypatch):
    """GPU 0 is a Hopper with a table and without packages; add packages to the returned set."""
    from ditfast.kernels import launch
    from ditfast.kernels.configs import tables

    packages: set[str] = set()
    monkeypatch.setattr(launch, "gpu", lambda index: launch.Gpu("NVIDIA H200", (9, 0), 132))
    monkeypatch.setattr(tables, "load", lambda gpu: ENTRIES if gpu == "NVIDIA H200" else {})

    def machine_reason(name, gpu):
        return "absent" if name in PACKAGES and name not in packages else None

    monkeypatch.setattr(attention_choice, "machine_reason", machine_reason)
    attention_choice.forget()
    return packages


@pytest.mark.kernels
def test_a_table_decides_within_its_buckets(tuned):
    for tokens, backend in [(256, "cudnn"), (129, "cudnn"), (128, "triton"), (257, "triton"), (0, "triton")]:
        assert choose(case(tokens), 0) == backend, tokens
    assert choose(case(256, 64), 0) == "triton"  # where the heuristic says SDPA
    assert choose(case(dtype=torch.float16), 0) == choose(case(biased=True), 0) == "triton"
    assert choose(case(256, 160), 0) == "sdpa"  # the kernels end at 128


@pytest.mark.kernels
def test_a_table_that_names_an_unavailable_backend(tuned):
    assert choose(case(training=True), 0) == "triton"
    tuned.add("flash_attn")
    attention_choice.forget()
    assert choose(case(training=True), 0) == "flash_attn"


@pytest.mark.kernels
def test_the_table_is_that_of_the_tensors_gpu(tuned, monkeypatch):
    """The public function passes the device's index down to the table's look-up."""
    asked_gpus = []
    monkeypatch.setattr(backend_module, "_gpu_reason", lambda index: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = attention_choice._gpu_facts
    monkeypatch.setattr(attention_choice, "_gpu_facts", lambda gpu: asked_gpus.append(gpu) or facts(gpu))
    with FakeTensorMode():
        qkv = torch.empty(2, 256, 3 * 144, dtype=torch.bfloat16, device="cuda:1")
        assert ops.attention_backend(qkv, 256, 72) == "cudnn"
        assert ops.attention_backend(qkv, 256, 72, training=True) == "triton"
    assert set(asked_gpus) == {1}


@pytest.mark.kernels
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_choice_under_dynamo(tuned, dynamic):
    """It is made while the graph is built and holds for the bucket (guards on its ends). Only eager runs libraries."""

    @torch.compile(fullgraph=True, backend="eager", dynamic=dynamic)
    def function(x):
        return x + (1.0 if choose(case(x.shape[0], 64), 0) == "triton" else 2.0)

    torch._dynamo.reset()
    for rows, added in ((256, 1.0), (200, 1.0), (100, 2.0)):
        assert function(torch.zeros(rows, 2)).eq(added).all()

    @torch.compile(fullgraph=True, backend="eager")
    def tuned_for_cudnn(x):
        return x + (1.0 if choose(case(), 0) == "triton" else 2.0)

    assert choose(case(), 0) == "cudnn" and tuned_for_cudnn(torch.zeros(2)).eq(1.0).all()


QKV = torch.randn(2, 33, 3 * 144, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_a_kernel_of_sdpa_is_taken_where_it_runs(backend, monkeypatch):
    """No other kernel is enabled, and torch's switches are put back; elsewhere (here: on a CPU) torch chooses."""
    switches = {
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
        "flash": torch.backends.cuda.flash_sdp_enabled,
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    }
    before = {name: enabled() for name, enabled in switches.items()}
    enabled_backends = []

    def formula(*arguments):
        enabled_backends.append({name for name, enabled in switches.items() if enabled()})
        return torch.zeros(1)

    bias = torch.randn(1, 2, 33, 33)
    expected = formulas.self_attention(QKV, 2, 0.3, bias)
    assert torch.equal(run_library(backend, QKV, 2, 0.3, bias), expected)
    monkeypatch.setattr(formulas, "self_attention", formula)
    enabler, _ = implementations._SDPA[backend]
    monkeypatch.setitem(implementations._SDPA, backend, (enabler, lambda parameters, debug: True))
    monkeypatch.setattr(implementations, "_cudnn_is_wrong_at", lambda tokens: False)
    run_library(backend, QKV, 2, None, None)
    run_library(backend, QKV, 2, None, None, alone=True)
    assert enabled_backends == [{backend}, {backend}]
    assert {name: enabled() for name, enabled in switches.items()} == before


def test_cudnn_is_refused_where_it_is_wrong(gpu, monkeypatch):
    """pytorch/pytorch#169849."""
    gpu(9)
    can = (implementations._SDPA["cudnn"][0], lambda parameters, debug: True)
    monkeypatch.setitem(implementations._SDPA, "cudnn", can)
    monkeypatch.setattr(implementations, "machine_reason", lambda backend, gpu: None)
    for version, tokens, fine in ((91400, 33, False), (91501, 33, True), (91400, 256, True)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        qkv = torch.empty(1, tokens, 3 * 144)
        reason = implementations.library_reason("cudnn", qkv, 2, None, False)
        assert (reason is None) == fine
        assert fine or reason == "cuDNN before 9.15.1 is wrong where the tokens are no multiple of 128"


def test_the_reason_of_sdpa_is_torchs_own(gpu, monkeypatch):
    gpu(9)

    def can_use(parameters, debug):
        warnings.warn("Expected query to be\n something else", stacklevel=1)
        return False

    monkeypatch.setitem(implementations._SDPA, "flash", (implementations._SDPA["flash"][0], can_use))
    monkeypatch.setattr(implementations, "machine_reason", lambda backend, gpu: None)
    reason = implementations.library_reason("flash", QKV, 2, torch.randn(1, 1, 1, 33), False)
    assert reason == "Expected query to be something else"


def test_autocast_comes_before_the_choice():
    """As in torch's own attention: the dtype that runs is autocast's, and so is the result's."""
    with torch.autocast("cpu", torch.bfloat16):
        bias = torch.randn(33, 33)
        out = ops.self_attention(QKV, 2, bias=bias)
        expected = formulas.self_attention(QKV.bfloat16(), 2, None, bias.bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.kernels
def test_an_explicit_backend_can_be_compiled():
    torch._dynamo.reset()
    qkv = QKV[:, :7]
    yardstick, oracle = formulas.self_attention(qkv, 2), formulas.self_attention(qkv.double(), 2)
    for backend in ("triton", "sdpa"):
        compiled = torch.compile(ops.self_attention, fullgraph=True, backend="eager")
        out = compiled(qkv, 2, backend=backend)
        assert judge("operator", out, yardstick, oracle, torch.float32).ok


@without_gpu
@pytest.mark.parametrize("backend", sorted(set(get_args(AttentionBackend)) - {"triton", "sdpa"}))
def test_an_explicit_backend_that_cannot_run_says_why(backend):
    with pytest.raises(ValueError, match=f'backend "{backend}" cannot run: it needs a CUDA GPU'):
        ops.self_attention(QKV, 2, backend=backend)
    assert ("attention", backend, "it needs a CUDA GPU") in ops.available_backends()


@pytest.mark.kernels
def test_an_explicit_triton_that_cannot_run_says_why():
    with pytest.raises(ValueError, match='backend "triton" cannot run: the kernels take head dims of at most 128'):
        ops.self_attention(QKV, 1, backend="triton")
    with pytest.raises(ValueError, match='backend "triton" cannot run: the kernels compute in fp32'):
        ops.self_attention(QKV.double(), 2, backend="triton")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of this compute capability, as far as the code asks."""

    def pretend(major, minor=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (major, minor))

    return pretend


@pytest.mark.parametrize(
    ("backend", "major", "reason"),
    [
        ("flash_attn", 7, "it needs sm_80 to sm_12x, the GPU is sm_70"),
        ("flash_attn_3", 8, "it needs sm_90, the GPU is sm_80"),
        ("flash_attn_3", 10, "it needs sm_90, the GPU is sm_100"),
        ("flash_attn_4", 8, "it needs sm_90 to sm_11x, the GPU is sm_80"),
        ("flash_attn_4", 12, "it needs sm_90 to sm_11x, the GPU is sm_120"),
        ("flash_attn", 9, "the package flash-attn .* is not installed"),
        ("flash_attn_3", 9, "the package flash-attn-3 .* is not installed"),
        ("flash_attn_4", 9, "the package flash-attn-4 .* is not installed"),
    ],
)
def test_reasons_of_a_machine(backend, major, reason, gpu):
    gpu(major)
    assert re.fullmatch(reason, implementations.machine_reason(backend, 0))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "biased", "reason"),
    [
        (72, torch.float32, False, "it needs bf16 or fp16, qkv has torch.float32"),
        (72, torch.float16, True, "it takes no additive bias"),
        (20, torch.float16, False, "it needs a head dim that is a multiple of 8 and at most {limit}, got 20"),
        (264, torch.float16, False, "it needs a head dim that is a multiple of 8 and at most {limit}, got 264"),
        (72, torch.bfloat16, False, None),
    ],
)
def test_reasons_of_tensors(head_dim, dtype, biased, reason):
    for name, package in PACKAGES.items():
        expected = reason and reason.format(limit=package.max_head_dim)
        assert implementations.case_reason(name, head_dim, dtype, biased, False, 9) == expected


def test_flash_attention_4_has_no_deterministic_backward_on_hopper():
    def reasons(training, major):
        return {implementations.case_reason(name, 64, torch.float16, False, training, major) for name in PACKAGES}

    assert reasons(True, 9) == {None, "its backward is not deterministic on Hopper"}
    assert reasons(False, 9) == reasons(True, 10) == {None}


def install(monkeypatch, name, function):
    """Puts a package of FlashAttention where its imports look for it."""
    package = PACKAGES[name]
    parts = package.module.split(".")
    for end in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:end]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    setattr(module, package.function, function)


def packed(qkv, softmax_scale=None, causal=False, deterministic=False):
    assert qkv.shape == (2, 33, 3, 2, 72) and deterministic and not causal
    return formulas.self_attention(qkv.flatten(2), 2, softmax_scale).view(2, 33, 2, 72)


def returning_a_tuple(q, k, v, softmax_scale=None, causal=False, deterministic=False):
    return packed(torch.stack([q, k, v], 2), softmax_scale, causal, deterministic), torch.zeros(2, 2, 33)


@pytest.mark.parametrize(
    ("name", "function"), [("flash_attn", packed), ("flash_attn_3", packed), ("flash_attn_4", returning_a_tuple)]
)
def test_how_a_package_is_called(name, function, monkeypatch):
    """By keyword, on the packed projection, with its deterministic backward; it may return a tensor or a tuple."""
    install(monkeypatch, name, function)
    assert implementations.import_reason(name) is None
    qkv = QKV.clone().requires_grad_()
    for scale in (None, 0.3):
        out = run_library(name, qkv, 2, scale, None)
        expected = formulas.self_attention(QKV, 2, scale)
        assert torch.equal(out, expected)
    out.sum().backward()
    assert qkv.grad.abs().sum() > 0


def test_packages_that_cannot_be_imported(monkeypatch):
    """A package built for another torch; and version 2 if only version 4, which shares its namespace, is installed."""
    install(monkeypatch, "flash_attn_4", returning_a_tuple)
    assert "flash-attn (pip install ditfast[flash]) is not installed" in implementations.import_reason("flash_attn")

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "flash_attn_interface":
                raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert implementations.import_reason("flash_attn_3").endswith("cannot be imported: undefined symbol: _ZN3c10")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("backend", sorted(set(get_args(AttentionBackend)) - {"sdpa"}))
def test_every_backend_on_a_gpu(backend, head_dim):
    """Each is correct, or refused with a reason."""
    shape = Shape(3, 257, 4 * head_dim, num_heads=4)
    operator = OPERATORS["self_attention"]
    explicit = replace(operator, options=lambda shape: {"num_heads": 4, "backend": backend}, fused=ops.self_attention)
    formula = lambda qkv, num_heads, backend: formulas.self_attention(qkv, num_heads)  # noqa: E731
    try:
        verdicts = check(replace(explicit, formula=formula), shape, torch.bfloat16, "cuda")
    except ValueError as error:
        if backend in ("triton", "efficient"):
            raise
        pytest.skip(str(error))
    assert not failures(verdicts)
