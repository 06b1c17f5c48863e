"""The conditioning kernels in Triton's interpreter, against fp64."""

import pytest
import torch

from ditfast import ops
from ditfast.parity import judge, relative_error
from ditfast.reference import ops as formulas
from tests.kernels.conftest import DTYPES

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dim", [256, 20, 2])
def test_timestep_embedding(dtype, shift, dim):
    if dim == 2 and shift:
        return  # the only frequency's exponent would be 0 / 0
    for timesteps in ([0, 1, 37, 500, 999], [0.25, 998.7, -3.5], []):
        t = torch.tensor(timesteps)
        with ops.use_backend("triton"):
            actual = ops.timestep_embedding(t, dim, shift, DTYPES[dtype])
        with ops.use_backend("torch"):
            yardstick = ops.timestep_embedding(t, dim, shift, DTYPES[dtype])
        oracle = formulas.timestep_embedding(t, dim, shift, torch.float64)
        assert actual.dtype == yardstick.dtype == DTYPES[dtype]
        assert judge("operator", actual, yardstick, oracle, DTYPES[dtype]).ok


def test_the_sinusoid_is_exact_to_one_rounding():
    """Computed in fp64: what is left is the rounding to the result's dtype, however large the timestep."""
    t = torch.tensor([999, 123456])
    with ops.use_backend("triton"):
        actual = ops.timestep_embedding(t, 256)
    oracle = formulas.timestep_embedding(t, 256, dtype=torch.float64)
    assert relative_error(actual, oracle) <= torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize(("batch", "width"), [(0, 72), (1, 1), (3, 72), (5, 257), (2, 1152)])
def test_conditioning(dtype, table_dtype, batch, width):
    t_emb = torch.randn(batch, width).to(DTYPES[dtype])
    table = torch.randn(11, width).to(DTYPES[table_dtype])
    for y in (torch.arange(batch) * 2, torch.arange(batch, dtype=torch.int32) + 5):
        with torch.no_grad(), ops.use_backend("triton"):
            actual = ops.conditioning(t_emb, y, table)
        with ops.use_backend("torch"):
            yardstick = ops.conditioning(t_emb, y, table)
            oracle = ops.conditioning(t_emb.double(), y, table.double())
        assert actual.dtype == yardstick.dtype
        assert judge("operator", actual, yardstick, oracle, actual.dtype).ok


def test_conditioning_of_any_layout():
    t_emb, table = torch.randn(3, 72), torch.randn(11, 72)
    y = torch.tensor([1, 9, 4, 9, 0, 9])[::2]
    with ops.use_backend("triton"):
        expected = ops.conditioning(t_emb, y.contiguous(), table)
        for layout in (lambda v: v.mT.contiguous().mT, lambda v: torch.cat([v, v * 0 + 7], dim=1)[:, :72]):
            assert torch.equal(ops.conditioning(layout(t_emb), y, layout(table)), expected)


def test_a_label_outside_the_table_gives_nan():
    t_emb, table = torch.randn(3, 72), torch.randn(11, 72)
    with ops.use_backend("triton"):
        out = ops.conditioning(t_emb, torch.tensor([-1, 10, 11]), table)
    assert out.isnan().all(dim=1).tolist() == [True, False, True]


@pytest.mark.quick
def test_gradients_come_from_the_formula():
    t_emb = torch.randn(3, 72, dtype=torch.float64, requires_grad=True)
    table = torch.randn(11, 72, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1, 9, 1])
    assert torch.autograd.gradcheck(lambda a, b: ops.conditioning(a, y, b), (t_emb, table))
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="t_emb wants a gradient, which it does not give"):
        ops.conditioning(t_emb.float(), y, table.float())


def test_opcheck():
    t_emb, table = torch.randn(3, 72), torch.randn(11, 72)
    y = torch.tensor([1, 9, 4])
    torch.library.opcheck(torch.ops.ditfast.conditioning.default, (t_emb, y, table))
    torch.library.opcheck(torch.ops.ditfast.timestep_embedding.default, (y, 256, 0.0, torch.bfloat16))


E = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"t must have shape \(B,\)", lambda: ops.timestep_embedding(torch.zeros(2, 2), 256)),
        (TypeError, "t must be a tensor, got int", lambda: ops.timestep_embedding(3, 256)),
        (ValueError, "dim must be even", lambda: ops.timestep_embedding(torch.zeros(2), 255)),
        (ValueError, r"table must have shape \(rows, 8\)", lambda: ops.conditioning(E, None, E[:, :4])),
        (TypeError, "y must be int64", lambda: ops.conditioning(E, E[:, 0], E)),
        (
            ValueError,
            r"y must have shape \(2,\)",
            lambda: ops.conditioning(E, torch.zeros(3, dtype=torch.int64), E),
        ),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
