"""`ditfast rehearse` and what it leaves uncomputed; the launches themselves: test_rehearsal.py."""

import json
import os

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from ditfast.bench.prove import rehearsal
from ditfast.bench.prove.uncomputed import Uncomputed
from ditfast.cli.command import app

pytest.importorskip("triton", reason="needs the package triton")
from ditfast.kernels.rehearsal import Compilation  # noqa: E402


def outcome(arch="sm_90", compiled=(), failures=()):
    part = rehearsal.Part(arch, "bf16", "models", False)
    compilations = [Compilation(name, frozenset(), frozenset(), name) for name in compiled]
    return rehearsal.Outcome(part, 3, 40, 8, compilations, list(failures))


KERNELS = (
    "_adaln_fwd_kernel", "_adaln_bwd_kernel", "_attention_fwd_kernel", "_attention_dq_kernel", "_attention_dkv_kernel",
    "_attention_dbias_kernel", "_conditioning_kernel", "_sinusoid_kernel", "_gemm_kernel", "_gelu_bwd_kernel",
    "_sum_kernel", "_modulations_kernel",
)  # fmt: skip


@pytest.mark.quick
def test_kernels_that_nothing_reached():
    all_kernels = (*KERNELS, "_gemm_tma_kernel")
    assert rehearsal.unreached([outcome(compiled=all_kernels)]) == []
    assert rehearsal.unreached([outcome("sm_80", KERNELS)]) == []  # which has no TMA
    assert rehearsal.unreached([outcome(compiled=KERNELS)]) == ["_gemm_tma_kernel was never launched on sm_90"]
    # what one part reaches counts for its architecture alone
    parts = [outcome(compiled=all_kernels), outcome("sm_80", KERNELS[1:]), outcome("sm_80", KERNELS[2:])]
    assert rehearsal.unreached(parts) == ["_adaln_fwd_kernel was never launched on sm_80"]


@pytest.mark.parametrize(
    ("outcomes", "code", "message"),
    [
        ([outcome(compiled=(*KERNELS, "_gemm_tma_kernel"))], 0, "3 cases of models, bf16, sm_90"),
        ([outcome(compiled=KERNELS)], 1, "FAIL _gemm_tma_kernel was never launched on sm_90"),
        ([outcome(compiled=(*KERNELS, "_gemm_tma_kernel"), failures=["a case: refused"])], 1, "FAIL a case: refused"),
    ],
)
def test_the_command_fails_if_a_case_fails(outcomes, code, message, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(rehearsal, "rehearse", lambda *arguments: calls.append(arguments) or iter(outcomes))
    result = CliRunner().invoke(app, ["rehearse", "--arch", "sm_90", "--full", "--json", str(tmp_path / "out.json")])
    assert (result.exit_code, calls) == (code, [(["sm_90"], None, True)])
    assert message in result.stderr
    data = json.loads((tmp_path / "out.json").read_text())
    assert (data["schema"], len(data["unreached"])) == (rehearsal.SCHEMA, message.count("never"))
    assert data["parts"][0]["launches"] == 40 and data["parts"][0]["failures"] == outcomes[0].failures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architectures": ["sm_70"]}, "arch must be one of sm_80, .*, got 'sm_70'"),
        ({"dtypes": ["fp64"]}, "dtype must be one of fp32, bf16, fp16, got 'fp64'"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch):
    import ditfast.kernels.rehearsal as driver

    monkeypatch.setattr(driver, "unavailable", lambda: None)
    with pytest.raises(ValueError, match=message):
        next(rehearsal.rehearse(**arguments))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="shows what is refused in the interpreter")
def test_not_in_the_interpreter():
    with pytest.raises(ValueError, match="kernels cannot be rehearsed: .*: unset TRITON_INTERPRET"):
        next(rehearsal.rehearse())


@pytest.mark.quick
def test_uncomputed_results_have_shape_strides_and_dtype():
    weight, x = torch.randn(5, 8), torch.randn(2, 7, 8).bfloat16()
    grown = torch.randn(3, 4)
    before = grown.clone()
    with Uncomputed():
        y = F.linear(x.float(), weight)
        assert (y.shape, y.dtype, y.stride()) == ((2, 7, 5), torch.float32, (35, 5, 1))
        assert x.transpose(1, 2).data_ptr() == x.data_ptr()  # a view stays one
        assert grown.add_(1) is grown
        drawn = torch.randn(4, 6, dtype=torch.float16)
        labels = torch.randint(0, 3, (9,))
        convolved = F.conv2d(torch.empty(2, 3, 8, 8), torch.empty(5, 3, 2, 2), stride=2)
        sums = x.sum(dim=(0, 1), dtype=torch.float32)
    assert torch.equal(grown, before)
    assert (drawn.shape, drawn.dtype) == ((4, 6), torch.float16)
    assert set(labels.tolist()) <= {0, 1, 2}
    assert (convolved.shape, sums.shape, sums.dtype) == ((2, 5, 4, 4), (8,), torch.float32)
    assert torch.equal(F.linear(x.float(), weight), x.float() @ weight.t())


def test_memory_that_nobody_writes_is_not_taken():
    """A terabyte of results, of a backward too."""
    with Uncomputed():
        x = torch.empty(1, 1 << 20, dtype=torch.bfloat16, requires_grad=True).expand(1 << 10, -1)
        for _ in range(500):
            y = F.gelu(x * 2)
        (gradient,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert gradient.shape == x.shape
