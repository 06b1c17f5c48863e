"""Every operator on a GPU by the numerics rule: outputs and every gradient, in any layout, into poisoned memory."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditfast.parity import judge
from ditfast.testing.operators import OPERATORS, Shape, check
from tests.gpu.conftest import DEVICE, MODELS, by, every_backend, every_operator
from tests.kernels.conftest import DTYPES, failures, poison, triton_operator

pytestmark = pytest.mark.gpu
MIXED = [name for name, operator in OPERATORS.items() if operator.mixed]
CASES = [(shape, "bf16") for shape in (Shape(1, 1, 72), Shape(3, 7, 200, num_heads=5), *MODELS)]
CASES += [(MODELS[-1], "fp16"), (MODELS[-1], "fp32")]


def assert_right(operator, shape, dtype=torch.bfloat16, **options):
    for wanted in (None, ()):  # without gradients other code runs: a library's epilogue, or nothing is stored
        assert not failures(check(operator, shape, dtype, DEVICE, wanted=wanted, **options)), wanted


@every_operator
@every_backend
@pytest.mark.parametrize(
    ("shape", "dtype"), CASES, ids=[f"{s.batch}x{s.tokens}x{s.width}-{dtype}" for s, dtype in CASES]
)
def test_outputs_and_every_gradient(name, backend, shape, dtype):
    assert_right(by[backend](name), shape, DTYPES[dtype])


@pytest.mark.parametrize("name", MIXED)
@every_backend
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fp32_stream(name, backend, dtype):
    assert_right(by[backend](name), MODELS[-1], DTYPES[dtype], mixed=True)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_means_do_not_cancel(name, dtype):
    assert_right(triton_operator(name), replace(MODELS[-1], mean=1000.0), DTYPES[dtype])


@every_operator
def test_every_element_is_written(name, monkeypatch):
    poison(monkeypatch)
    assert_right(triton_operator(name), MODELS[-1])


def one_element_on(value):
    """No address is a multiple of 16 bytes any more."""
    moved = torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
    assert not moved.numel() or moved.data_ptr() % 16 == moved.element_size()
    return moved


def odd_rows(value):
    """Rows with a gap of three elements that nobody may read."""
    return F.pad(value, (0, 3), value=torch.nan)[..., : value.shape[-1]]


def a_chunk(value):
    """As the fifth of a modulation's six chunks."""
    padding = torch.full_like(value, torch.nan)
    return torch.cat([padding, padding, padding, padding, value, padding], dim=-1).chunk(6, dim=-1)[4]


@every_operator
@pytest.mark.parametrize("layout", [one_element_on, odd_rows, a_chunk], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", [MODELS[-1], Shape(3, 64, 200, num_heads=5)], ids=["1152", "200"])
def test_inputs_of_any_layout(name, layout, shape):
    operator = triton_operator(name)

    def fused(**inputs):
        # within the operator, so that no cast copies them back: gradients flow through
        return operator.fused(
            **{
                key: layout(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                for key, value in inputs.items()
            }
        )

    assert_right(replace(operator, fused=fused), shape)


def test_a_tangent_is_the_formulas():
    with DEVICE:
        qkv, tangent = torch.randn(2, 3, 65, 216, dtype=torch.bfloat16).unbind(0)
    exact = torch.func.jvp(lambda x: OPERATORS["self_attention"].formula(x, 3), (qkv.double(),), (tangent.double(),))[1]
    actual = torch.func.jvp(lambda x: OPERATORS["self_attention"].fused(x, 3), (qkv,), (tangent,))[1]
    with sdpa_kernel(SDPBackend.MATH):
        yardstick = torch.func.jvp(lambda x: OPERATORS["self_attention"].formula(x, 3), (qkv,), (tangent,))[1]
    assert judge("operator", actual, yardstick, exact, torch.bfloat16).ok
