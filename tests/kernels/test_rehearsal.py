"""Kernels launched on GPUs that are not there: `pytest -m rehearsal`, without Triton's interpreter.

Nothing is computed, so nothing is judged by numbers: what compiles, what is launched and what is refused is.
"""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch

import ditfast
from ditfast import DiT, DiTConfig, ops
from ditfast.bench.prove import rehearsal
from ditfast.bench.prove.uncomputed import Uncomputed
from ditfast.ops import backend as backend_module
from ditfast.testing.inputs import random_batch, randomize_
from ditfast.testing.operators import OPERATORS, Shape, draw_inputs, run
from tests.adapters.foreign_models import Model, inputs, randomised

pytest.importorskip("triton", reason="needs the package triton")
from triton.runtime.errors import OutOfResources  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from ditfast.kernels import launch, linear  # noqa: E402
from ditfast.kernels.configs import gemm
from ditfast.kernels.rehearsal import GPUS, rehearse, unavailable  # noqa: E402
from tests.kernels.gemm_check import linear_gelu  # noqa: E402

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(unavailable() is not None, reason=f"cannot rehearse: {unavailable()}"),
]
SMALL = DiTConfig(depth=2, hidden_size=144, num_heads=2, latent_size=8, patch_size=2, num_classes=10)
# not launched by a compiled model, for Inductor fuses their formulas: the sinusoid, and in inference the conditioning
LEFT_TO_INDUCTOR = {"inference": 2, "training": 1, "autocast": 1}


@pytest.fixture
def hopper():
    torch.compiler.reset()
    with rehearse("sm_90") as rehearsal:
        yield rehearsal


def launches(rehearsal, model, arguments, how):
    before = rehearsal.launches
    if how == "inference":
        with torch.no_grad():
            model(*arguments)
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            output = model(*arguments)
        output.sum().backward()
    return rehearsal.launches - before


def model_and_inputs(how, batch=3, config=SMALL):
    dtype = torch.float32 if how == "autocast" else torch.bfloat16
    model = randomize_(DiT(config)).to(dtype).train(how != "inference")
    return model, random_batch(config, batch, dtype=dtype)


@pytest.mark.parametrize(
    ("design", "how"), [*(("adaln_zero", how) for how in LEFT_TO_INDUCTOR), ("adaln", "training")]
)
def test_models_compile_along_a_gpus_path(design, how, hopper):
    """fullgraph, forward and backward: the compiled model launches what the eager one does."""
    model, arguments = model_and_inputs(how, config=replace(SMALL, conditioning=design))
    eager = launches(hopper, model, arguments, how)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert eager > 8
    for _ in range(2):
        assert launches(hopper, compiled, arguments, how) == eager - LEFT_TO_INDUCTOR[how]


def test_guided_and_for_any_batch(hopper):
    model, arguments = model_and_inputs("inference")
    doubled = [torch.cat([x, x]) for x in arguments]
    compiled = torch.compile(model.forward_with_cfg, fullgraph=True, backend="aot_eager", dynamic=True)
    counts = []
    for rows in (6, 4):
        counts.append(launches(hopper, lambda *batch: compiled(*batch, 4.0), [x[:rows] for x in doubled], "inference"))
    assert counts[0] == counts[1] == launches(hopper, model, arguments, "inference") - 2


@pytest.mark.parametrize("how", ["inference", "training"])
def test_accelerated_models_compile_along_a_gpus_path(how, hopper):
    model = randomised(Model(dim=144, num_heads=2)).bfloat16().train(how == "training")
    ditfast.accelerate(model, check=False)  # nothing is computed that could be checked
    x, t, y = inputs(3)
    arguments = (x.bfloat16(), t, y)
    eager = launches(hopper, model, arguments, how)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # but for the launch of all modulations: compiled, each layer runs its own Linear
    assert launches(hopper, compiled, arguments, how) == eager - (how == "inference") > 8


@pytest.mark.compiler
@pytest.mark.parametrize("how", ["inference", "training"])
def test_by_inductor(how, hopper):
    model, arguments = model_and_inputs(how)
    eager = launches(hopper, model, arguments, how)
    compiled = torch.compile(model, fullgraph=True)
    assert launches(hopper, compiled, arguments, how) == eager - LEFT_TO_INDUCTOR[how]


def test_attention_takes_the_library_where_a_gpu_would(hopper):
    """Head dims of 64 in inference: no launch of ours, in the eager operator and in the compiled one."""
    compiled = torch.compile(ops.self_attention, fullgraph=True, backend="aot_eager")
    for head_dim, learns, expected in ((64, False, 0), (64, True, 1), (72, False, 1)):
        qkv = torch.randn(2, 16, 6 * head_dim, dtype=torch.bfloat16, requires_grad=learns)
        for function in (ops.self_attention, compiled):
            launches_before = hopper.launches
            function(qkv, 2)
            assert hopper.launches - launches_before == expected, (head_dim, learns)


# of one model in bf16, inference and training, at every batch and token count below. What differs: the GEMMs' tiles
# with the rows, the sums' with the partial sums, attention's with few tokens; the row kernels' gradients
# wanted and statistics saved
COMPILATIONS = {
    "_adaln_bwd_kernel": 6,
    "_adaln_fwd_kernel": 6,
    "_attention_dkv_kernel": 3,
    "_attention_dq_kernel": 3,
    "_attention_fwd_kernel": 6,
    "_conditioning_kernel": 1,
    "_gelu_bwd_kernel": 1,
    "_gemm_tma_kernel": 7,
    "_modulations_kernel": 4,
    "_sinusoid_kernel": 2,
    "_sum_kernel": 5,
}


def test_another_batch_or_token_count_compiles_nothing():
    """Token counts of the models, which multiples of 16 are: attention compiles once more for others, and its backward
    for at most 128 tokens."""
    xl = DiTConfig(depth=2, hidden_size=1152, num_heads=16, latent_size=32, patch_size=2, num_classes=10)
    with rehearse("sm_90") as recording, Uncomputed():
        for batch in (4, 1, 2, 3, 7, 16, 64, 256):
            rehearsal.infer(xl, batch, torch.bfloat16)
            rehearsal.train(xl, batch, torch.bfloat16)
        at_256_tokens = len(recording.compilations)
        for patch, latent in ((4, 32), (8, 32), (2, 64)):
            for batch in (4, 1, 3, 64, 256):
                config = replace(xl, patch_size=patch, latent_size=latent)
                rehearsal.infer(config, batch, torch.bfloat16)
                rehearsal.train(config, batch, torch.bfloat16)
    assert Counter(item.kernel for item in recording.compilations) == COMPILATIONS
    assert at_256_tokens == 32
    assert not [item for item in recording.compilations if item.ones]  # a size of 1 compiles nothing


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_a_part_reaches_every_kernel(arch, monkeypatch):
    """What the command does for S/2 and XL/2 here for a small width."""
    tiny = rehearsal.Sizes(((144, 2),), (3,), (17,), ((8, 8, 2),))
    monkeypatch.setattr(rehearsal, "BRIEF", tiny)
    parts = [rehearsal.Part(arch, "bf16", subject, False) for subject in ("operators", "models")]
    outcomes = [rehearsal.rehearse_part(part) for part in parts]
    assert not [failure for outcome in outcomes for failure in outcome.failures]
    assert not rehearsal.unreached(outcomes)
    assert (outcomes[0].tensor_maps > 0) == (arch == "sm_90")
    # no model learns a bias of its attention
    assert f"_attention_dbias_kernel was never launched on {arch}" in rehearsal.unreached(outcomes[1:])


def test_failures_are_recorded_and_the_rest_runs(monkeypatch):
    def fails(**inputs):
        raise RuntimeError("no such kernel")

    broken = {name: replace(operator, fused=fails) if name == "gelu_mlp" else operator
              for name, operator in OPERATORS.items()}  # fmt: skip
    monkeypatch.setattr(rehearsal, "OPERATORS", broken)
    monkeypatch.setattr(rehearsal, "BRIEF", rehearsal.Sizes(((144, 2),), (3,), (17,), ()))
    outcome = rehearsal.rehearse_part(rehearsal.Part("sm_80", "bf16", "operators", False))
    assert len(outcome.failures) == 4 and outcome.cases > 40 and outcome.launches > 20
    assert outcome.failures[0] == (
        "gelu_mlp, auto, torch.bfloat16, B=3 T=17 D=144 H=2 on sm_80: RuntimeError: no such kernel"
    )


def test_a_case_that_launches_nothing_fails(monkeypatch):
    """A model whose operators run their formulas on a GPU fails, though other parts demand kernels."""
    reason = backend_module.triton_reason

    def lost(x, width):
        return "lost" if backend_module.current_backend() == "auto" else reason(x, width)

    monkeypatch.setattr(backend_module, "triton_reason", lost)
    monkeypatch.setattr(rehearsal, "BRIEF", rehearsal.Sizes(((144, 2),), (3,), (17,), ((8, 8, 2),)))
    for subject, count in (("operators", len(OPERATORS)), ("models", 4)):
        outcome = rehearsal.rehearse_part(rehearsal.Part("sm_80", "bf16", subject, False))
        silent = [failure for failure in outcome.failures if failure.endswith("on sm_80: launched 0 kernels")]
        assert silent == outcome.failures and len(silent) >= count


def test_counts_stay_those_of_their_rehearsal():
    x, gate = torch.empty(2, 5, 72), torch.empty(2, 72)
    with rehearse("sm_80") as first:
        ops.gated_residual(x, x, gate)
    with rehearse("sm_80") as second:
        pass
    assert (first.launches, second.launches, first.tensor_maps) == (1, 0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tile_that_does_not_fit_is_refused_as_on_the_gpu(dtype):
    """A tile deeper than fits a GPU with 99 KB per block."""
    x, weight = (torch.empty(size, 1152, dtype=dtype) for size in (4096, 4608))
    too_large = gemm.PORTABLE[0][0]._replace(num_stages=6, max_registers=0)
    with rehearse("sm_89") as rehearsal:
        with pytest.raises(OutOfResources, match="shared memory"):
            linear_gelu(x, weight, None, True, too_large)
        assert rehearsal.launches == 0
        linear_gelu(x, weight, None, True)
        assert rehearsal.launches == 1


@pytest.mark.parametrize("arch", ["sm_86", "sm_120"])
def test_what_is_chosen_fits_the_smaller_gpus(arch, monkeypatch):
    """The largest tiles of GEMMs and attention, in 99 KB of shared memory; `make rehearsal` has the rest."""
    monkeypatch.setattr(rehearsal, "BRIEF", rehearsal.Sizes(((1152, 9),), (32,), (256,), ()))
    monkeypatch.setattr(rehearsal, "OPERATORS", {
        name: OPERATORS[name] for name in ("gelu_mlp", "linear_gated_residual", "self_attention", "self_attention+bias")
    })  # fmt: skip
    outcome = rehearsal.rehearse_part(rehearsal.Part(arch, "bf16", "operators", False))
    assert not outcome.failures and outcome.launches > 20


def described_all_the_same(plan):
    """The launch with TMA, wherever the tensors begin."""
    return lambda *tensors: plan._launch(
        *(
            x if x is None or how is None else TensorDescriptor(x, *how)
            for x, how in zip(tensors, plan._described, strict=True)
        )
    )


def test_grids_and_tensor_maps_are_checked(hopper):
    x, weight = (torch.empty(256, 128, dtype=torch.bfloat16) for _ in range(2))
    config = gemm.HOPPER[1][0]
    plan = linear.LinearGelu((x, weight, None), True, config)
    for count in (1, 2):  # by Triton's JIT, then directly
        plan(x, weight, None)
        assert (hopper.launches, hopper.tensor_maps) == (count, 4 * count)
    kernel = linear._gelu_bwd_kernel
    arguments = (x, x, x, x, None, 256, 128, 128)
    options = {"ROWS": 64, "COLS": 128, "CHUNK": 16, "FAST": True, "num_warps": 4}
    kernel[(4,)](*arguments, **options)
    for grid in ((1, 70000), (1, 1, 65536)):
        with pytest.raises(RuntimeError, match="refuses the grid"):
            kernel[grid](*arguments, **options)
    odd = torch.empty(256 * 130 + 8, dtype=torch.bfloat16)
    for described, reason in (
        (odd[1:257].view(2, 128), "its address is no multiple of 16"),
        (odd[: 256 * 130].view(256, 130)[:, :128], "a stride in bytes is no multiple of 16"),
        (odd.as_strided((256, 128), (64, 1)), "its rows overlap"),
    ):
        before = hopper.tensor_maps
        linear_gelu(described, weight, None, True, config)
        assert hopper.tensor_maps == before  # by the other kernel
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear, "_takes_tma", lambda *_: True)
            patch.setattr(TensorDescriptor, "__post_init__", lambda self: None)  # which reads some of it as well
            plan = linear.LinearGelu((described, weight, None), True, config)
            patch.setattr(plan._gemm, "_unaligned", described_all_the_same(plan._gemm))
            with pytest.raises(RuntimeError, match=f"refuses a tensor map, for {reason}"):
                plan(described, weight, None)


def test_a_rehearsal_ends():
    """Also after an exception; another one meanwhile is refused."""
    x, vector = torch.randn(2, 5, 72), torch.randn(2, 72)
    with pytest.raises(KeyError), rehearse("sm_80"):
        with pytest.raises(RuntimeError, match="a rehearsal is under way"), rehearse("sm_90"):
            pass
        assert launch.gpu(launch.gpu_index(x)) == GPUS["sm_80"]
        raise KeyError
    assert launch.rehearsed is None and launch.gpu_index(x) is None
    expected = torch.nn.functional.layer_norm(x, (72,), eps=1e-6) * (1 + vector[:, None]) + vector[:, None]
    assert torch.equal(ops.layer_norm_modulate(x, vector, vector), expected)
    with pytest.raises(ValueError, match="arch must be one of sm_80, .*, got 'sm_70'"), rehearse("sm_70"):
        pass


def test_what_a_compilation_says(hopper):
    inputs = torch.empty(1, 7, 144), torch.empty(1, 7, 144), torch.empty(1, 144)
    ops.gated_residual(*inputs)
    (first,) = hopper.compilations
    assert first.kernel == "_adaln_fwd_kernel" and not first.ones
    assert {"stride_x_batch", "stride_gate_batch"} <= first.divisible and "tokens" not in first.divisible
    ops.gated_residual(*(copy.deepcopy(x) for x in inputs))
    assert len(hopper.compilations) == 1
    assert hopper.launches == 2


class Recorder:
    """In the place of what launches in the end: notes what it is given."""

    def __init__(self):
        self.calls = []

    def __call__(self, *arguments):
        self.calls.append(arguments)


@pytest.mark.parametrize("name", sorted({*OPERATORS} - {"modulations"}))
def test_a_direct_launch_is_the_jits(name, hopper, monkeypatch):
    """Same kernel, grid, stream, flags and arguments, addresses in the place of tensors."""
    ordinary, direct, given = [], [], []
    runner, call = launch._runner, launch.Launch.__call__

    def recorded(compiled, grid):
        recorder, run = Recorder(), compiled.run
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "launch", recorder)
            run(*grid, 0, compiled.function, compiled.packed_metadata, None, None, None, "tensors", "others")
            runner(compiled, grid)(0, "tensors", "others")
        ordinary.append(recorder.calls[0])
        direct.append(recorder.calls[1])
        launched = runner(compiled, grid)

        def launching(stream, *arguments):
            given[-1].append(arguments)
            launched(stream, *arguments)

        return launching

    def noting(self, *tensors):
        given.append([self, tensors])
        call(self, *tensors)

    monkeypatch.setattr(launch, "_runner", recorded)
    monkeypatch.setattr(launch.Launch, "__call__", noting)
    operator = OPERATORS[name]
    shape = Shape(2, 256, 1152, num_heads=16)
    inputs = draw_inputs(operator, shape, torch.bfloat16, "cpu")
    wanted = operator.differentiable(inputs)
    with ops.use_backend("triton"):
        for gradients in ((), wanted):
            for _ in range(3):
                run(operator.fused, inputs, operator.options(shape), gradients)
    assert ordinary and ordinary == direct
    launched = [each for each in given if len(each) == 3]
    assert launched
    for plan, tensors, arguments in launched:
        count = len(tensors)
        assert arguments[count:] == plan.rest
        for tensor, argument in zip(tensors, arguments[:count], strict=True):
            assert argument is tensor or argument == tensor.data_ptr()


def test_what_a_direct_launch_leaves_to_the_jit(hopper, monkeypatch):
    """Tensors that begin elsewhere than at multiples of 16 bytes, hooks, the first launch of each GPU."""
    from triton import knobs

    asked = []
    by_jit = launch.Launch._by_jit
    monkeypatch.setattr(launch.Launch, "_by_jit", lambda *args, **kwargs: asked.append(1) or by_jit(*args, **kwargs))
    x, vector = torch.empty(2, 5, 144, dtype=torch.bfloat16), torch.empty(2, 144, dtype=torch.bfloat16)

    def count(x=x, vector=vector):
        before = len(asked), hopper.launches
        ops.layer_norm_modulate(x, vector, vector)
        assert hopper.launches == before[1] + 1
        return len(asked) - before[0]

    assert [count(), count(), count()] == [1, 0, 0]
    odd = torch.empty(2 * 144 + 1, dtype=torch.bfloat16)[1:].view(2, 144)
    assert odd.data_ptr() % 16
    assert [count(vector=odd), count(vector=odd), count()] == [1, 1, 0]
    assert count(torch.empty(3, 5, 144, dtype=torch.bfloat16), torch.empty(3, 144, dtype=torch.bfloat16)) == 1
    seen = []
    hook = seen.append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert [count(), count()] == [1, 1] and len(seen) == 2
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert count() == 0
    compiled = len(hopper.compilations)
    for batch in range(1, 20):  # a launch by the JIT each, and no compilation
        assert count(torch.empty(batch, 5, 144).bfloat16(), torch.empty(batch, 144).bfloat16()) <= 1
    assert len(hopper.compilations) == compiled


def test_new_batch_sizes_compile_nothing(hopper):
    """A model's forward and backward, and accelerated blocks, but for other tiles: there are few of each kernel."""
    model, _ = model_and_inputs("inference")
    foreign = randomised(Model(dim=144, num_heads=2)).to(torch.bfloat16)
    ditfast.accelerate(foreign, check=False)

    def calls(batch):
        latents = torch.zeros(batch, 4, 8, 8, dtype=torch.bfloat16)
        t, y = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
        for each in (model, foreign):
            with torch.no_grad():
                each(latents, t, y)
            each(latents, t, y).sum().backward()

    for batch in (1, 2, 5, 16, 20, 33, 64):
        calls(batch)
    before = len(hopper.compilations)
    for batch in (3, 4, 9, 17, 31, 32, 48, 63):
        calls(batch)
    assert len(hopper.compilations) == before, hopper.compilations[before:]
