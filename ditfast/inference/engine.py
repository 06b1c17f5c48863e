"""The sampling loop: what is known before the first step is computed before it.

For ditfast's adaLN models the loop runs on a schedule table (:mod:`.table`) and, on a GPU, as a captured CUDA graph
(:mod:`.graphs`); any other model is called plainly. The results are the plain loop's within rounding. A table lives
as long as its call; only captured graphs are kept between calls.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..gone import refuse_gone
from ..model.dit import DiT
from ..plain import is_plain
from .graphs import Graphs
from .guidance import Guidance
from .table import ScheduleTable, takes_table

_LOOK = 25  # steps between checks that latents are finite: each waits for the GPU


class NotFinite(ValueError):
    """Latents that are not finite.

    Attributes:
        step: the first evaluation after which they were found so, counted from 0, of ``steps``.
        image: the first image of the batch for which they were.
    """

    def __init__(self, step: int, steps: int, image: int) -> None:
        super().__init__(f"latents are not finite from step {step + 1} of {steps} on, image {image} of the batch")
        self.step, self.steps, self.image = step, steps, image


class Steps(Protocol):
    """What the engine needs of a sampler; :class:`.samplers.Sampler` says what each is."""

    timesteps: Tensor

    def start(self, noise: Tensor) -> Tensor: ...
    def model_input(self, x: Tensor, i: int) -> Tensor: ...
    def step(
        self, x: Tensor, output: Tensor, i: int, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor: ...


class _Plan(NamedTuple):
    """What does not change during a run, with or without guidance."""

    labels: Tensor  # (2N,), the null class for the second half, or (N,) without guidance
    rows: Tensor | None  # of the labels in the table
    table: ScheduleTable | None
    graphs: Graphs | None


class Engine:
    """Samples latents of a class-conditional model.

    Args:
        model: ``model(x, t, y)``, in eval mode: (B, C, h, w), (B,), (B,) -> (B, C or 2C, h, w).
        sampler: the solver and its timesteps.
        guidance: classifier-free guidance, as one batch of 2N; None for none.
        table_mib: the most that the schedule table may take, in MiB; 0 for no table.
        graphs: whether steps are captured as CUDA graphs where they can be.
        null_class: the label of the unconditional half; by default that of the model's config.

    Raises:
        ValueError: guidance of a model without a null class; a negative table_mib.
        TypeError: a sampler that lacks an attribute of :class:`Steps`; the removed argument ``labels``.
    """

    def __init__(
        self,
        model: nn.Module,
        sampler: Steps,
        guidance: Guidance | None = None,
        *,
        table_mib: float = 2048,
        graphs: bool = True,
        null_class: int | None = None,
        **gone: object,
    ) -> None:
        refuse_gone("Engine", gone, {"labels": "the schedule table is made in every call; leave it out"})
        config: Any = getattr(model, "config", None)
        self.model, self.sampler, self.guidance = model, sampler, guidance
        if not all(hasattr(sampler, name) for name in ("timesteps", "start", "model_input", "step")):
            kind = type(sampler).__name__
            raise TypeError(f"sampler must have timesteps, start, model_input and step, got {kind}")
        if not table_mib >= 0:
            raise ValueError(f"table_mib must be 0 or more, got {table_mib}")
        self.table_mib = table_mib
        self.null_class = getattr(config, "null_class", None) if null_class is None else null_class
        self.num_classes: int | None = getattr(config, "num_classes", None)
        if guidance is not None and self.null_class is None:
            raise ValueError("guidance needs a null class, and the model's config has none: give null_class")
        self.graphs = Graphs(model) if graphs else None

    @torch.no_grad()
    def __call__(
        self,
        noise: Tensor,
        labels: Sequence[int],
        generators: Sequence[torch.Generator] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Latents from noise.

        Args:
            noise: standard normal (N, C, h, w) on the model's device, fp32 or fp64: what the solver computes in.
            labels: N labels in [0, num_classes).
            generators: one an image, for the noise of ancestral samplers; by default torch's own.
            on_step: called with the number of steps done, after each.

        Returns:
            (N, C, h, w), in noise's dtype.

        Raises:
            NotFinite: latents that are not finite, a ValueError that names the step and the image.
            ValueError: a label out of range, a model in training mode, a table that does not fit.
        """
        labels = [operator.index(label) for label in labels]  # a tensor's or an array's, too
        self._check(noise, labels)
        timesteps = self.sampler.timesteps.to(noise.device)
        scales = [1.0 if self.guidance is None else self.guidance.scale_at(t) for t in timesteps.tolist()]
        guided = {scale != 1 for scale in scales}
        with self._table(labels, True in guided) as table:
            plans = {each: self._plan(labels, each, table, noise.device) for each in guided}
            factor = noise.new_ones(1)  # where a captured step reads it
            x = self.sampler.start(noise)
            failed_at = torch.full((len(labels),), -1, device=x.device)
            for i, scale in enumerate(scales):
                model_input = self.sampler.model_input(x, i)
                output = self._evaluate(plans[scale != 1], model_input, i, timesteps, factor.fill_(scale))
                x = self.sampler.step(x, output.to(x.dtype), i, generators)
                failed_at = torch.where((failed_at < 0) & ~x.isfinite().flatten(1).all(1), i, failed_at)
                if (i + 1) % _LOOK == 0 or i + 1 == len(scales):
                    _stop_at_first(failed_at, len(scales))
                if on_step is not None:
                    on_step(i + 1)
        return x

    def _check(self, noise: Tensor, labels: Sequence[int]) -> None:
        if self.model.training:
            raise ValueError("model is in training mode, in which labels are dropped at random: call model.eval()")
        if noise.ndim != 4 or len(noise) != len(labels) or not labels:
            raise ValueError(f"noise must have shape ({len(labels)}, C, h, w), got {tuple(noise.shape)}")
        for label in labels:
            if self.num_classes is not None and not 0 <= label < self.num_classes:
                raise ValueError(f"labels must be in 0..{self.num_classes - 1}, got {label}")

    def _plan(
        self, labels: Sequence[int], guided: bool, table: ScheduleTable | None, device: torch.device
    ) -> _Plan:
        null = [] if self.null_class is None or not guided else [self.null_class] * len(labels)
        batch_labels = [*labels, *null]
        graphs = self.graphs if self.graphs is not None and self.graphs.look() else None
        rows = None if table is None else table.rows(batch_labels)
        return _Plan(torch.tensor(batch_labels, device=device), rows, table, graphs)

    @contextmanager
    def _table(self, labels: Sequence[int], guided: bool) -> Iterator[ScheduleTable | None]:
        """The table of a call, of its labels and the null class where it is guided; None for a model that has no use
        for it."""
        model = self.model
        if not self.table_mib or not isinstance(model, DiT) or not is_plain(model, DiT) or not takes_table(model):
            yield None
            return
        null = set() if self.null_class is None or not guided else {self.null_class}
        table = ScheduleTable(model, self.sampler.timesteps, sorted({*labels} | null), self.table_mib)
        try:
            yield table
        finally:
            table.free()  # an exception's traceback may hold it

    def _evaluate(self, plan: _Plan, x: Tensor, i: int, timesteps: Tensor, factor: Tensor) -> Tensor:
        """The model's output (N, C or 2C, h, w) at evaluation i, after guidance."""
        guided = len(plan.labels) > len(x)
        if plan.table is not None and plan.rows is not None:
            conditions: tuple[Tensor, ...] = (plan.table.at(i, plan.rows),)
        else:
            conditions = (timesteps[i].expand(len(plan.labels)), plan.labels)

        def step(x: Tensor, factor: Tensor, *conditions: Tensor) -> Tensor:
            batch = torch.cat([x, x]) if guided else x
            model: Any = self.model
            forward = model.forward_modulated if len(conditions) == 1 else model
            output: Tensor = forward(batch, *conditions)
            return self.guidance.apply(output, factor, x.shape[1]) if guided and self.guidance is not None else output

        if plan.graphs is None:
            return step(x, factor, *conditions)
        # the scale is an input: the rest of guidance is captured with a step, and so part of its key
        guidance_key = (self.guidance.channels, self.guidance.rescale) if guided and self.guidance is not None else None
        replayed: Tensor = plan.graphs.run((guided, guidance_key), step, x, factor, *conditions)
        return replayed


def _stop_at_first(failed_at: Tensor, steps: int) -> None:
    """Raises where a latent was found not to be finite."""
    steps_failed = failed_at.tolist()
    if max(steps_failed, default=-1) >= 0:
        step, image = min((step, image) for image, step in enumerate(steps_failed) if step >= 0)
        raise NotFinite(step, steps, image)
