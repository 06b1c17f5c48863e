"""Power laws: the exponent of a time against tokens, images or width."""

from __future__ import annotations

import math
from collections.abc import Sequence

# below these, two lines through a cloud would be stated as well
_LEAST_POINTS, _LEAST_R_SQUARED = 3, 0.95


def is_power_law(points: int, r_squared: float) -> bool:
    """Whether a fit of so many points is good enough for its exponent to be stated."""
    return points >= _LEAST_POINTS and r_squared >= _LEAST_R_SQUARED


def fit_exponent(values: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Fits ``time = factor * value ** exponent`` by least squares in log-log.

    Args:
        values: what was varied; at least two different ones, above 0.
        times: in any one unit, above 0.

    Returns:
        (exponent, r_squared); r_squared is 1 where all times are equal, which an exponent of 0 fits exactly.

    Raises:
        ValueError: lengths that differ, fewer than two different values, or one that is not finite and above 0.
    """
    if len(values) != len(times):
        raise ValueError(f"times must have one entry a value, got {len(times)} for {len(values)} values")
    for name, numbers in (("values", values), ("times", times)):
        for number in numbers:
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"{name} must be finite and above 0, got {number}")
    if len(set(values)) < 2:
        raise ValueError(f"values must hold at least two different ones, got {list(values)}")
    x, y = [math.log(value) for value in values], [math.log(time) for time in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    xx = sum((a - mean_x) ** 2 for a in x)
    yy = sum((b - mean_y) ** 2 for b in y)
    xy = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return xy / xx, 1.0 if yy == 0 else xy**2 / (xx * yy)
