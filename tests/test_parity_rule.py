"""The numerics rule itself: it must be able to fail."""

import math

import pytest
import torch

from ditfast.parity import judge, relative_error

pytestmark = pytest.mark.quick

ORACLE = torch.tensor([3.0, 4.0], dtype=torch.float64)


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.5]), ORACLE) == pytest.approx(0.1, rel=1e-12)
    assert relative_error(torch.tensor([3.0, math.nan]), ORACLE) == math.inf
    assert relative_error(torch.tensor([3.0, math.inf]), ORACLE) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0.0
    with pytest.raises(ValueError, match="actual must have the oracle's shape"):
        relative_error(torch.zeros(1), ORACLE)


def test_several_tensors_are_judged_as_one():
    """Like one tensor of all their values: an error in a small one may hide beside a large one, a NaN may not."""
    parts, oracles = [torch.tensor([3.0]), torch.tensor([[4.5]])], [ORACLE[:1], ORACLE[1:].view(1, 1)]
    assert relative_error(parts, oracles) == pytest.approx(0.1, rel=1e-12)
    assert relative_error([parts[0], parts[1] * math.nan], oracles) == math.inf
    assert judge("operator", parts, parts, oracles, torch.float32).bound == pytest.approx(0.2, rel=1e-6)
    assert judge("operator", parts, parts, oracles, torch.float32, slack=5).bound == pytest.approx(1, rel=1e-6)
    with pytest.raises(ValueError, match="actual must have the oracle's shape"):
        relative_error(parts, [ORACLE[:1], ORACLE[1:]])
    with pytest.raises(ValueError, match="argument 2 is"):
        relative_error(parts, oracles[:1])


@pytest.mark.parametrize(("kind", "factor", "share"), [("operator", 2.0, 0.5), ("model", 1.25, 0.25)])
def test_bounds(kind, factor, share):
    eps = torch.finfo(torch.bfloat16).eps
    yardstick = torch.tensor([3.0, 4.5], dtype=torch.float64)  # error 0.1
    bound = factor * 0.1 + share * eps
    inside, outside = (ORACLE + torch.tensor([0.0, 5 * bound * scale]) for scale in (0.999, 1.001))
    assert judge(kind, inside, yardstick, ORACLE, torch.bfloat16).ok
    assert not judge(kind, outside, yardstick, ORACLE, torch.bfloat16).ok
    assert not judge(kind, ORACLE * math.nan, yardstick, ORACLE, torch.bfloat16).ok


def test_a_broken_yardstick_grants_nothing():
    broken = ORACLE * math.nan
    assert not judge("model", ORACLE * 1.5, broken, ORACLE, torch.bfloat16).ok
    assert judge("model", ORACLE, broken, ORACLE, torch.bfloat16).ok
