"""What one guided step of a trajectory launches and reads, with and without the schedule table, without a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ditfast
from ditfast import ops
from ditfast.config import DiTConfig
from ditfast.inference import Guidance

from .count import count, is_free


@dataclass(frozen=True)
class StepCost:
    """Of one guided step: launches, bytes moved, bytes of the weights among them, and FLOPs.

    Attributes:
        making_flops: its part of making the call's table, which no other figure here holds.
    """

    launches: int
    bytes: int
    weight_bytes: int
    flops: int
    making_flops: int = 0

    @property
    def making(self) -> float:
        """The share of a call's FLOPs that making its table takes, whatever its number of steps."""
        return self.making_flops / (self.flops + self.making_flops)


def step_costs(config: DiTConfig, batch: int, dtype: torch.dtype) -> tuple[StepCost, StepCost]:
    """(without, with the table) of ditfast's kernels, traced on meta tensors.

    The table's step gathers its modulations from the table, which counts as traffic, not as a weight; the label
    table's rows do not count as weights for either. The table is made in every call, here of labels that all differ.

    Raises:
        ValueError: a design without adaLN.
    """
    with torch.device("meta"):
        model = ditfast.DiT(config).to(dtype).eval()
        x = torch.empty(batch, config.in_channels, *config.latent_hw)
        t = torch.empty(2 * batch, dtype=torch.int64)
        y, rows = torch.empty_like(t), torch.empty_like(t)
        with ops.use_backend("triton"), torch.no_grad():
            width = model.modulation(t, y).shape[1]
        table = torch.empty(batch + 1, width, dtype=dtype)
    guidance = Guidance()

    def guided(output: Tensor) -> Tensor:
        return guidance.apply(output, guidance.scale, config.in_channels)

    def plain() -> Tensor:
        return guided(model(torch.cat([x, x]), t, y))

    def by_table() -> Tensor:
        return guided(model.forward_modulated(torch.cat([x, x]), table.index_select(0, rows)))

    def making() -> Tensor:
        return model.modulation(t[: batch + 1], y[: batch + 1])

    with_table = replace(_cost(model, by_table), making_flops=_cost(model, making).flops)
    return _cost(model, plain), with_table


def _cost(model: ditfast.DiT, step: Callable[[], Tensor]) -> StepCost:
    with ops.use_backend("triton"), torch.no_grad():
        counted = count(step)
        with _Weights(model) as weights:
            step()
    return StepCost(counted.total_launches, counted.total_bytes, weights.bytes, counted.total_flops)


class _Weights(TorchDispatchMode):
    """Adds up the weights that operators read, each once; views read nothing."""

    def __init__(self, model: ditfast.DiT) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        parameters = [p for name, p in model.named_parameters() if "embedding_table" not in name]
        self._sizes = {_storage(p): p.nbytes for p in parameters}
        self._read: set[int] = set()

    @property
    def bytes(self) -> int:
        return sum(self._sizes[storage] for storage in self._read)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_free(func):
            storages = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            self._read |= storages & self._sizes.keys()
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
