"""The schedule table: the modulations of every step and label, computed before the loop.

Timesteps and labels of a sampling run are known before it begins, so every block's modulation for every (step, label)
is computed many steps at a time, and the loop reads no adaLN weight: a third of DiT-XL's weights. The null class has
one row a step, whatever the batch. The table does not notice changed weights, so it is made for one run and freed
after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model.dit import DiT

_MIB = 1 << 20


class ScheduleTable:
    """(steps, labels, N) modulations of a model, made in chunks of steps that stay within a budget.

    Args:
        model: an adaLN design.
        timesteps: (steps,), as the model is given them, in the loop's order.
        labels: the distinct labels of the run, the null class among them where it is used.
        budget_mib: of memory, in MiB.

    Raises:
        ValueError: a design without adaLN, or a budget that one step exceeds, with the size it takes.
    """

    def __init__(self, model: DiT, timesteps: Tensor, labels: Sequence[int], budget_mib: float) -> None:
        if not model.fused:
            raise ValueError(f"a schedule table is of adaLN designs, this model is {model.config.conditioning}")
        self.labels = {label: row for row, label in enumerate(labels)}
        self.step_mib = len(self.labels) * _label_mib(model)
        self.chunk = int(min(len(timesteps), budget_mib / self.step_mib))
        if self.chunk < 1:
            raise ValueError(
                f"table_mib must hold at least one step of the schedule table: {len(self.labels)} labels take "
                f"{self.step_mib:.1f} MiB a step, got {budget_mib:g}"
            )
        self._model = model
        self._timesteps = timesteps.to(model.device)
        self._labels = torch.tensor(list(self.labels), device=model.device)
        self._first = 0
        self._chunk_table: Tensor | None = None

    @property
    def mib(self) -> float:
        """The memory it takes at most, in MiB."""
        return self.chunk * self.step_mib

    def rows(self, labels: Sequence[int]) -> Tensor:
        """Where labels stand in a step, (B,), for :meth:`at`."""
        return torch.tensor([self.labels[label] for label in labels], device=self._labels.device)

    def at(self, step: int, rows: Tensor) -> Tensor:
        """The modulations (B, N) of a step, whose chunk of the table is computed where it is not there."""
        if self._chunk_table is None or not self._first <= step < self._first + len(self._chunk_table):
            self._chunk_table = None  # freed before the next chunk is made
            self._first = step // self.chunk * self.chunk
            t = self._timesteps[self._first : self._first + self.chunk]
            modulations = self._model.modulation(t.repeat_interleave(len(self._labels)), self._labels.repeat(len(t)))
            self._chunk_table = modulations.view(len(t), len(self._labels), -1)
        return self._chunk_table[step - self._first].index_select(0, rows)

    def free(self) -> None:
        """Gives its memory back; where it is read again, it is made again."""
        self._chunk_table = None


def takes_table(model: DiT) -> bool:
    """Whether its modulations have known widths: adaLN Linears, which may be wrapped (LoRA).

    Not dynamically quantised ones, whose weight is a method: they scale by the whole batch, here of many steps.
    """
    if not model.fused:
        return False
    modulations = [layer.adaLN_modulation for layer in (*model.blocks, model.final_layer)]
    return all(
        isinstance(modulation, nn.Sequential)
        and isinstance(getattr(modulation[-1], "out_features", None), int)
        and isinstance(getattr(modulation[-1], "weight", None), Tensor)
        for modulation in modulations
    )


def _label_mib(model: DiT) -> float:
    """What one label takes a step, in MiB."""
    rows = sum(layer.adaLN_modulation[-1].out_features for layer in (*model.blocks, model.final_layer))
    return float(rows * model.pos_embed.element_size() / _MIB)
