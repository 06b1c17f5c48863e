"""All adaLN Linears in one launch: numerics, launches, gradients, and when each runs on its own."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from ditfast import ops
from ditfast.bench.cost.count import count
from ditfast.kernels import modulations as kernels
from ditfast.kernels.configs import gemm
from ditfast.ops.modulations import modulations_plan, takes_modulations
from ditfast.parity import judge
from ditfast.reference import ops as formulas
from ditfast.testing.operators import OPERATORS, Shape, check, draw_inputs, parameters
from tests.kernels.conftest import DTYPES, failures, triton_operator

pytestmark = pytest.mark.kernels


def linears(batch, width, widths, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator).to(dtype)  # noqa: E731
    return draw(batch, width), [draw(n, width) * width**-0.5 for n in widths], [draw(n) for n in widths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [Shape(0, 1, 72), Shape(1, 1, 72), Shape(3, 1, 200), Shape(17, 1, 24, layers=2)], ids=str
)
def test_numerics(shape, dtype):
    verdicts = check(triton_operator("modulations"), shape, DTYPES[dtype])
    assert not failures(verdicts)
    assert len(verdicts) == shape.layers + 1 + 2 * shape.layers


@pytest.mark.parametrize(("limit", "most"), [("MOST", 2), ("_MOST_TILES", 3)])
def test_more_linears_than_a_launch_takes(limit, most, monkeypatch):
    """Ragged tiles and different widths; bit-equal from run to run, and in any batch."""
    monkeypatch.setattr(kernels, limit, most)
    c, weights, biases = linears(5, 72, (8, 136, 128, 264, 16))
    with ops.use_backend("triton"):
        out, repeated, alone = (ops.modulations(rows, weights, biases) for rows in (c, c, c[3:4]))
    assert torch.equal(out, repeated) and torch.equal(out[3:4], alone)
    exact = formulas.modulations(*tree_map(torch.Tensor.double, (c, weights, biases)))
    assert judge("operator", out, formulas.modulations(c, weights, biases), exact, torch.float32).ok


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_converts_as_it_reads(stored, biased):
    """c in fp32, and weights in any dtype."""
    c, weights, biases = linears(3, 72, (144, 48))
    weights = [weight.to(stored) for weight in weights]
    biases = biases if biased else [None, None]
    with torch.autocast("cpu", torch.bfloat16):
        with ops.use_backend("triton"):
            out = ops.modulations(c, weights, biases)
        slow = formulas.modulations(c, weights, biases)
    exact = [None if x is None else x.double() for x in (*weights, *biases)]
    verdict = judge("operator", out, slow, formulas.modulations(c.double(), exact[:2], exact[2:]), torch.bfloat16)
    assert verdict.ok, verdict
    assert out.dtype == slow.dtype == torch.bfloat16


def test_gradients_under_autocast():
    c, weights, biases = linears(3, 72, (144, 48))
    leaves = [x.requires_grad_() for x in (c, *weights, *biases)]
    gradients = []
    for backend in ("triton", "torch"):
        with torch.autocast("cpu", torch.bfloat16), ops.use_backend(backend):
            out = ops.modulations(c, weights, biases)
        gradients.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = formulas.modulations(exact[0], exact[1:3], exact[3:])
    gradients.append(torch.autograd.grad(out, exact, torch.ones_like(out)))
    for actual, slow, oracle in zip(*gradients, strict=True):
        assert actual.dtype == torch.float32
        assert judge("operator", actual, slow, oracle, torch.bfloat16).ok


@pytest.mark.parametrize("wanted", [("c",), ("weight1",), ("bias0", "weight2"), ()])
def test_any_gradient_is_wanted(wanted):
    assert not failures(check(triton_operator("modulations"), Shape(3, 1, 24), torch.float32, wanted=wanted))


def test_the_library_writes_the_same_places():
    c, weights, biases = linears(5, 72, (144, 48))
    separate = gemm.FEW_ROWS[0]._replace(candidate="separate")
    for linear_biases in (biases, []):
        tensors = c, *weights, *linear_biases
        plan = modulations_plan(tensors, len(weights), torch.float32, config=separate)
        out = plan(c, weights, linear_biases)
        torch.testing.assert_close(out, formulas.modulations(c, weights, linear_biases or [None] * 2))


def test_it_is_one_launch_over_the_weights():
    arguments = tree_map(lambda x: x.to("meta"), linears(3, 72, (432, 432, 144)))
    with ops.use_backend("triton"):
        counted = count(lambda: ops.modulations(*arguments))
    [launch] = counted.records
    columns = 432 * 2 + 144
    assert launch.flops == 2 * 3 * 72 * columns
    assert launch.bytes == 4 * (3 * 72 + 73 * columns + 3 * columns)


def test_torchs_own_checks_and_compile():
    c, weights, biases = linears(3, 72, (144, 48))
    operator = torch.ops.ditfast.modulations.default
    for arguments in ((c, weights, biases, torch.float32, True), (c, weights, [], torch.bfloat16, True)):
        torch.library.opcheck(operator, arguments)
    compiled = torch.compile(OPERATORS["modulations"].fused, fullgraph=True, backend="aot_eager")
    with ops.use_backend("triton"):
        fused = replace(OPERATORS["modulations"], fused=compiled)
        assert not failures(check(fused, Shape(2, 1, 72), torch.float32))


def subclass_of(x):
    class Subclass(torch.Tensor):
        pass

    return x.as_subclass(Subclass)


@pytest.mark.parametrize(
    "change",
    [
        lambda c, weights, biases: (c, [weights[0].double(), *weights[1:]], biases),
        lambda c, weights, biases: (c, [subclass_of(weights[0]), *weights[1:]], biases),
        lambda c, weights, biases: (c, [weights[0].to("meta"), *weights[1:]], biases),
        lambda c, weights, biases: (c, weights, [None, *biases[1:]]),
        lambda c, weights, biases: (c, weights, [biases[0].half(), *biases[1:]]),
        lambda c, weights, biases: (c.bfloat16(), weights, biases),
        lambda c, weights, biases: (c.double(), [x.double() for x in weights], [x.double() for x in biases]),
        lambda c, weights, biases: (c[:, :64], weights, biases),
    ],
    ids=["dtypes", "subclass", "device", "a bias", "its dtype", "another dtype", "fp64", "width"],
)
def test_what_each_linear_does_on_its_own(change):
    assert takes_modulations(*linears(3, 72, (144, 48))) is False  # on a CPU
    with ops.use_backend("triton"):
        assert takes_modulations(*linears(3, 72, (144, 48)))
        assert not takes_modulations(*change(*linears(3, 72, (144, 48))))


def test_weights_of_any_layout_and_place():
    """Not contiguous, and at addresses that are no multiples of 16 bytes."""
    c, weights, biases = linears(3, 72, (144, 48))
    shifted = torch.empty(weights[1].numel() + 1)[1:].view_as(weights[1]).copy_(weights[1])
    arguments = (c.t().contiguous().t(), [weights[0].t().contiguous().t(), shifted], biases)
    with ops.use_backend("triton"):
        assert torch.equal(ops.modulations(*arguments), ops.modulations(c, weights, biases))


def test_errors_name_the_argument():
    c, weights, biases = linears(3, 72, (144, 48))
    thin = weights[1][:, :8]
    for error, match, arguments in (
        (ValueError, "weights and biases must be as many, one or more, got 2 and 1", (c, weights, biases[:1])),
        (ValueError, "weights and biases must be as many, one or more, got 0 and 0", (c, [], [])),
        (ValueError, r"c must have 2 axes, got shape \(3, 1, 72\)", (c[:, None], weights, biases)),
        (ValueError, r"weights\[1\] must have shape \(out, 72\), got \(48, 8\)", (c, [weights[0], thin], biases)),
        (ValueError, r"biases\[0\] must have shape \(144,\), got \(48,\)", (c, weights, biases[::-1])),
        (TypeError, r"weights\[0\] must have c's dtype", (c.half(), weights, biases)),
        (TypeError, r"weights\[0\] must be a tensor, got Linear", (c, [nn.Linear(72, 144), weights[1]], biases)),
    ):
        with pytest.raises(error, match=match):
            ops.modulations(*arguments)
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="modulations cannot run .* of 8, got 12"):
        ops.modulations(*linears(3, 72, (144, 12)))


@pytest.mark.parametrize(
    ("rows", "tile", "candidate"),
    [(1, 16, "triton"), (2, 16, "triton"), (16, 16, "triton"), (64, 64, "triton"), (256, 128, "triton"),
     (512, 128, "triton"), (1025, 128, "separate")],
)  # fmt: skip
def test_tiles_follow_the_rows(rows, tile, candidate):
    for major in (8, 9):
        config = gemm.modulations_heuristic(rows, torch.bfloat16, torch.bfloat16, major)
        assert (config.block_m, config.candidate) == (tile, candidate)
        halved = gemm.modulations_heuristic(rows, torch.bfloat16, torch.float32, major)
        assert halved.block_k == config.block_k // 2
    ieee = gemm.modulations_heuristic(rows, torch.float32, torch.float32, 9)
    assert ieee.candidate == ("triton" if rows <= 16 else "separate")


def test_inputs_are_drawn_for_every_layer():
    inputs = draw_inputs(OPERATORS["modulations"], Shape(3, 1, 24, layers=4), torch.bfloat16, "cpu")
    weights, biases = parameters(inputs)
    assert [len(weight) for weight in weights] == [144, 144, 144, 48] == [len(bias) for bias in biases]
