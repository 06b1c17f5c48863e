"""Kernels compiled ahead and carried: `pytest -m rehearsal`. Archives and manifests without a compiler:
tests/campaign/test_archives.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from typer.testing import CliRunner

from ditfast.bench.cases import attention
from ditfast.bench.cases.case import Case
from ditfast.bench.cases.providers import get_provider
from ditfast.bench.measure.preparing import make_work
from ditfast.bench.options import named_configs
from ditfast.bench.prove import rehearsal, verify
from ditfast.bench.prove.kernels import kernel_functions
from ditfast.bench.prove.uncomputed import Uncomputed
from ditfast.bench.suites import ops
from ditfast.bench.warm import compile as warm
from ditfast.bench.warm import kernel_cache
from ditfast.bench.warm import parts as warm_parts
from ditfast.bench.warm.parts import Part, plan
from ditfast.cli.command import app
from ditfast.testing.operators import OPERATORS, Shape

pytest.importorskip("triton", reason="needs the package triton")
from ditfast.bench.tune import family as tune_family
from ditfast.bench.tune import plan as tuning  # noqa: E402
from ditfast.bench.tune.measure import _Contest  # noqa: E402
from ditfast.kernels.configs import gemm  # noqa: E402
from ditfast.kernels.rehearsal import rehearse, unavailable  # noqa: E402
from tests.kernels.gemm_check import linear_gelu  # noqa: E402

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(unavailable() is not None, reason=f"cannot rehearse: {unavailable()}"),
]
ROOT = Path(__file__).resolve().parents[2]
CPU, BF16 = torch.device("cpu"), torch.bfloat16
[SMALL] = named_configs(["DiT-S/8"], ["256"], "adaln_zero")
FORWARD = ["warm", "--arch", "sm_80", "--model", "DiT-S/8", "--mode", "forward", "--batch", "2"]

# what a process that launches kernels would wait for: misses of the cache by kernel, and what gcc built
COUNTING = """
import json, torch, triton
from triton.runtime import build
from ditfast.bench.prove import rehearsal
from ditfast.bench.options import named_configs
from ditfast.bench.prove.uncomputed import Uncomputed
from ditfast.kernels.rehearsal import rehearse

counts = {"hits": 0, "misses": [], "built": []}
compile_c = build._build

def counted(name, *arguments):
    counts["built"].append(name)
    return compile_c(name, *arguments)

def listen(*, src, cache_hit, **_):
    if cache_hit:
        counts["hits"] += 1
    else:
        counts["misses"].append(src.fn.__name__)

build._build, triton.knobs.compilation.listener = counted, listen
[config] = named_configs(["DiT-S/8"], ["256"], "adaln_zero")
with rehearse("sm_80") as record, Uncomputed():
    for batch in (2, 3):  # kernels are for any batch
        rehearsal.infer(config, batch, torch.bfloat16)
print(json.dumps({**counts, "launches": record.launches}))
"""


def environment(**variables):
    return {**os.environ, "PYTHONPATH": ".", **variables}


def ditfast(*arguments, cwd=ROOT, **variables):
    command = [sys.executable, "-m", "ditfast", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, check=True)


def counted(checkout, cache):
    command = [sys.executable, "-c", COUNTING]
    variables = environment(TRITON_CACHE_DIR=str(cache))
    result = subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The archive of a cache that was then deleted."""
    cache = tmp_path_factory.mktemp("made") / "cache"
    result = ditfast(*FORWARD, "--cache", cache, "--jobs", 1, "--archive", cache.parent / "a.tar.xz")
    assert " kernels compiled, 0 taken from the cache" in result.stdout
    shutil.rmtree(cache)
    return cache.parent / "a.tar.xz"


def test_another_checkout_at_another_path_compiles_nothing(archive, checkout, tmp_path):
    cache = tmp_path / "elsewhere"
    result = ditfast("warm", "--unpack", archive, "--cache", cache, cwd=checkout, PATH="")  # without gcc
    count = len(list(cache.glob("*/*.cubin")))
    assert result.stdout.startswith(f"{cache}: {count} kernels") and not result.stderr
    counts = counted(checkout, cache)
    assert (counts["misses"], counts["built"], counts["hits"]) == ([], [], count) and counts["launches"] > 50


def test_a_changed_kernel_is_compiled_again(archive, checkout, tmp_path, monkeypatch):
    other, cache = tmp_path / "changed", tmp_path / "cache"
    for folder in ("ditfast", "kernels", "bench"):
        shutil.copytree(checkout / folder, other / folder, symlinks=True, ignore=shutil.ignore_patterns("results"))
    source = other / "kernels" / "conditioning.py"
    source.write_text("\n" + source.read_text())  # a line further down, which Triton looks at too
    kernel_cache.unpack(archive, cache)
    changed = {"_conditioning_kernel", "_sinusoid_kernel"}
    assert set(counted(other, cache)["misses"]) == changed
    facts = json.loads(ditfast("info", "--json", "--cache", cache, cwd=other).stdout)["kernel_cache"]
    total = len(kernel_functions())
    assert facts["misfit"] == f"2 of {total} kernels have changed: {', '.join(sorted(changed))}"
    facts = kernel_cache.facts(cache)  # here nothing has changed
    assert facts["misfit"] == "" and facts["warmed"] == {"sm_80": ["DiT-S/8 256 px forward bf16"]}
    monkeypatch.setenv("DISABLE_LLVM_OPT", "1")
    assert kernel_cache.facts(cache)["misfit"] == "made with other values of DISABLE_LLVM_OPT"


def test_an_interruption_keeps_what_was_compiled(tmp_path):
    command = [sys.executable, "-m", "ditfast", *FORWARD, "--cache", str(tmp_path), "--jobs", "1"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("[1/") and "launches" not in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert f"interrupted; what was compiled is kept in {tmp_path}" in rest
    entry = kernel_cache.read_manifest(tmp_path)["architectures"]["sm_80"]
    folders = entry["kernels"]
    assert entry["warmed"] == [] and folders and all(list((tmp_path / folder).glob("*.cubin")) for folder in folders)
    for group in tmp_path.glob("*/__grp__*"):
        assert all(Path(path).stat().st_size for path in json.loads(group.read_text())["child_paths"].values())


def launched(run):
    """Keys of the kernels that real calls launch, on uncomputed values."""
    kernels = {}
    with rehearse("sm_90"), warm._instead_of_compiling(kernels, candidate=False):
        run()
    return set(kernels)


def keys_of(part):
    with rehearse(part.arch):
        result = warm.find(part)
    assert not result.failures
    return {(kernel.module, kernel.name, kernel.specialisation) for kernel in result.kernels}


def test_what_verify_launches(monkeypatch):
    """Backends and shapes are a GPU's; the formulas compute here what is computed at all."""
    monkeypatch.setattr(verify, "_SHAPES", (Shape(3, 7, 200, num_heads=5),))
    monkeypatch.setattr(verify, "OPERATORS", {name: OPERATORS[name] for name in ("linear_gelu", "gated_residual")})
    monkeypatch.setattr(verify, "Conditioning", Literal["adaln"])
    keys = keys_of(Part("sm_90", "verify", BF16))
    kernels = {name for _, name, _ in keys}
    assert {"_adaln_bwd_kernel", "_gemm_tma_kernel", "_attention_dkv_kernel", "_sinusoid_kernel"} <= kernels

    def run():
        rows = [verify.run_check(item, CPU) for item in verify.checks(CPU, ["bf16"])]
        assert {row.backend for row in rows} == {"auto", "kernel"}

    assert keys == launched(run)


@pytest.mark.parametrize("mode", ["forward", "cfg", "train-checkpoint"])
def test_what_bench_models_launches(mode):
    """The provider's own step, of a model as deep as it is."""
    case = Case(SMALL, 2, BF16, mode)
    keys = keys_of(Part("sm_90", "bench", BF16, SMALL, mode, (2,)))

    def run():
        with Uncomputed():
            work, _ = make_work(case, CPU, 0)
            variant = get_provider("ditfast").build(work)
            for inputs in work.pool[:2]:
                variant.gradients(inputs) if case.training else variant.step(inputs)

    assert launched(run) <= keys
    model_keys = launched(run)
    assert model_keys and (mode in ("forward", "train") or model_keys == keys)  # with these come the operators


@pytest.mark.parametrize(("mode", "direction"), [("forward", "forward"), ("train", "backward")])
def test_what_bench_ops_launches(mode, direction, monkeypatch):
    """Judged and timed, as the command does it."""
    names = ("gated_residual", "linear_gelu", "self_attention")
    monkeypatch.setattr(ops, "MEASURED", names)
    monkeypatch.setattr(attention, "SHAPES", (Shape(1, 64, 144, num_heads=2, ratio=4),))
    monkeypatch.setattr(attention, "unavailable", lambda *arguments: None)
    monkeypatch.setattr(warm_parts, "_benchmark", lambda case: None)  # the models
    keys = keys_of(Part("sm_90", "bench", BF16, SMALL, mode, (2,)))
    model_shape = Shape(2, SMALL.num_tokens, SMALL.hidden_size, num_heads=SMALL.num_heads, ratio=4)

    def run():
        for name in names:
            for shape in (model_shape, *attention.SHAPES[: name == "self_attention"]):
                functions = {"ditfast": OPERATORS[name].fused}
                if name == "self_attention":
                    functions["ditfast-triton"] = attention.implementation("ditfast-triton")
                rows = {key: ops.blank_row(name, direction, shape, BF16, key) for key in functions}
                with Uncomputed():
                    pool = ops._pool(OPERATORS[name], shape, BF16, CPU)
                    case = ops._Case(OPERATORS[name], direction, shape, BF16, CPU, 0.001, pool)
                    rows = ops._measure(case, functions, rows)
                assert all(row.ms for row in rows.values())

    assert keys and launched(run) == keys


@pytest.mark.parametrize(("mode", "run"), [("forward", rehearsal.infer), ("train", rehearsal.train)])
def test_what_a_model_launches_at_any_batch(mode, run):
    keys = keys_of(Part("sm_90", "model", BF16, SMALL, mode))
    deep = launched(lambda: [call_uncomputed(run, batch) for batch in (3, 48)])
    assert deep and deep <= keys


def call_uncomputed(run, batch):
    with Uncomputed():
        run(SMALL, batch, BF16)


def test_kernels_of_tuning_are_candidates():
    with rehearse("sm_90"):
        result = warm.find(Part("sm_90", "tune", BF16, SMALL, None, (2,)))
        model = warm.find(Part("sm_90", "model", BF16, SMALL, "train", (2,)))
    assert not result.failures and all(kernel.candidate for kernel in result.kernels)
    names = [kernel.name for kernel in result.kernels]
    assert names.count("_gemm_tma_kernel") > 20 and names.count("_attention_dkv_kernel") > 3
    merged = warm.unique([result, model])
    shared = [kernel for kernel in merged if not kernel.candidate]
    assert {replace(kernel, candidate=False) for kernel in model.kernels} == set(shared)
    assert len(merged) < len(result.kernels) + len(model.kernels)

    def run():  # as the command judges them
        target = tune_family.Target("a GPU", 9, 132)
        for task in tuning.plan({SMALL.name: SMALL}, [BF16], (2,)):
            with torch.no_grad(), task.family.conditions(BF16), Uncomputed():
                _Contest(task, target, CPU, None).right()

    assert launched(run) == {(kernel.module, kernel.name, kernel.specialisation) for kernel in result.kernels}


def test_a_kernel_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    """It is compiled all the same; the GPU, which refuses it too, then finds it in the cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x, weight = (torch.empty(size, 1152, dtype=BF16) for size in (4096, 4608))
    too_large = gemm.PORTABLE[0][0]._replace(num_stages=6, max_registers=0)
    with rehearse("sm_89"):
        kernels = {}
        with warm._instead_of_compiling(kernels, candidate=True):
            linear_gelu(x, weight, None, True, too_large)
        [kernel] = kernels.values()
        for hit in (False, True):
            result = warm.compile_kernel(kernel)
            assert (result.refused, result.hit) == (True, hit) and "shared memory" in result.failure
        assert (tmp_path / result.folder / "_gemm_kernel.cubin").exists()
        broken = warm.compile_kernel(replace(kernel, specialisation=kernel.specialisation.replace("bf16", "bf17")))
        assert broken.failure and not broken.refused and not broken.folder


def test_failures_are_named_and_the_rest_goes_on(monkeypatch):
    def fails(**inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(OPERATORS, "gelu_mlp", replace(OPERATORS["gelu_mlp"], fused=fails))
    with rehearse("sm_90"):
        result = warm.find(Part("sm_90", "bench", BF16, SMALL, "forward", (2,)))
    assert result.failures == [
        "bench DiT-S/8 256 px forward bf16, gelu_mlp at B=2 T=16 D=384: RuntimeError: no such kernel"
    ]
    assert len(result.kernels) > 5


def test_a_compiler_that_dies_is_reported(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text("import os; os._exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    workers = warm.Workers("sm_80", tmp_path / "cache", 1)
    [result] = workers.compile([warm.Kernel("deadly", "_kernel", "{}")])
    assert "terminated abruptly" in result.failure and not result.folder


def test_kernels_lost_with_a_worker_have_a_second_try(tmp_path, monkeypatch):
    text = "import os, pathlib; here = pathlib.Path(__file__).parent / 'died'\nif not here.exists():\n"
    (tmp_path / "deadly.py").write_text(text + "    here.touch(); os._exit(3)\nraise RuntimeError('tried again')")
    monkeypatch.syspath_prepend(tmp_path)
    kernels = [warm.Kernel("deadly", f"_kernel{index}", "{}") for index in range(3)]
    results = list(warm.Workers("sm_80", tmp_path / "cache", 1).compile(kernels))
    assert {result.kernel for result in results} == {*kernels}
    assert {result.failure for result in results} == {"RuntimeError: tried again"}


class FakeWorkers:
    """One part that fails, and kernels that were compiled, in the cache, refused and broken."""

    def __init__(self, arch, cache, processes):
        self.broken = cache.name == "broken"

    def find(self, parts):
        kernels = [warm.Kernel("m", name, "", candidate=name == "_c_kernel") for name in KERNELS]
        for part in parts:
            yield warm.Launches(part, kernels, ["a part: RuntimeError: no"] if self.broken else [])

    def compile(self, kernels):
        yield warm.Compiled(kernels[0], folder="A")
        yield warm.Compiled(kernels[1], True, "B")
        yield warm.Compiled(kernels[2], folder="C", failure="too much", refused=True)
        if self.broken:
            yield warm.Compiled(kernels[3], failure="ValueError: no such type")
        else:
            yield warm.Compiled(kernels[3], True, "D")


KERNELS = ("_a_kernel", "_b_kernel", "_c_kernel", "_d_kernel")


@pytest.mark.parametrize(
    ("name", "code", "failures", "counts", "warmed"),
    [
        ("whole", 0, [], "2 kernels compiled, 2 taken", ["verify bf16"]),
        (
            "broken",
            1,
            ["FAIL sm_90, a part: RuntimeError: no", "FAIL sm_90, _d_kernel: ValueError: no such type"],
            "2 kernels compiled, 1 taken",
            [],
        ),
    ],
)
def test_the_output_of_the_command(name, code, failures, counts, warmed, tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "Workers", FakeWorkers)
    cache = tmp_path / name
    result = CliRunner().invoke(
        app, ["warm", "--arch", "sm_90", "--for", "verify", "--dtype", "bf16", "--cache", str(cache)]
    )
    assert result.exit_code == code
    assert [line for line in result.stderr.splitlines() if line.startswith("FAIL")] == failures
    assert result.stdout.startswith(f"sm_90: {counts} from the cache, ") and f" s; {cache}" in result.stdout
    assert result.stdout.endswith("; 1 candidates of tune take more than the GPU has\n")
    entry = kernel_cache.read_manifest(cache)["architectures"]["sm_90"]
    assert entry == {"warmed": warmed, "kernels": ["A", "B", "C", "D"][: 4 - bool(failures)]}


def test_the_plan():
    configs = named_configs(["DiT-S/8", "DiT-S/4"], ["256"], "adaln_zero")
    all_dtypes = (torch.float32, BF16, torch.float16)
    labels = [part.label for part in plan("sm_90", ["verify", "tune"], configs, [BF16], ["forward"], (), all_dtypes)]
    assert labels == [
        "verify fp32", "verify bf16", "verify fp16", "tune DiT-S/8 256 px bf16", "tune DiT-S/4 256 px bf16"
    ]  # fmt: skip
    parts = plan("sm_80", [], configs[:1], [BF16, torch.float16], ["forward", "train"], (4,))
    assert [(part.label, part.batches) for part in parts] == [
        (f"DiT-S/8 256 px {mode} {dtype}", (4,)) for dtype in ("bf16", "fp16") for mode in ("forward", "train")
    ]


def test_keys_do_not_depend_on_what_was_compiled_before():
    """Triton counts a module's constants to the key of a kernel that reaches them through another function only where
    that function was hashed before: there must be none."""
    for name, kernel in kernel_functions().items():
        assert kernel.cache_key and not kernel.used_global_vals, name


def test_a_missing_gcc_is_reported(monkeypatch):
    monkeypatch.setenv("PATH", "")
    result = CliRunner().invoke(app, FORWARD)
    assert result.exit_code == 2
    assert "kernels cannot be compiled ahead: gcc, which builds" in result.stderr
