"""A provider built for one workload: one timed step, and in training its loss and parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditfast.training.loss import diffusion_loss

from .case import Mode
from .workload import Call, Inputs, inference_call

Switch = Callable[[], AbstractContextManager[None]]
Transform = Callable[[Call], Call]


@dataclass
class Variant:
    """What the runner times and judges.

    Attributes:
        step: one forward, one guided forward, or one training step; returns the output or the loss.
        dtype: of the floating inputs, where it differs from the case's.
        shared_bytes: of the workload's weights that it uses as they are.
        loss: in training, the loss alone, without backward and optimiser.
        parameters: in training, the parameters under the reference's names; None where they are laid out
            otherwise and their gradients cannot be compared.
        switch: in training, the context in which a step runs.
    """

    step: Call
    dtype: torch.dtype | None = None
    shared_bytes: int = 0
    loss: Call | None = None
    parameters: dict[str, nn.Parameter] | None = None
    switch: Switch = nullcontext

    def gradients(self, inputs: Inputs) -> dict[str, Tensor] | None:
        """The loss gradients by the reference's names, or None; leaves none behind."""
        if self.loss is None or self.parameters is None:
            return None
        with self.switch():
            self.loss(inputs).backward()
        # cloned: a graph's backward writes its buffers again in the next step
        gradients = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}
        for parameter in self.parameters.values():
            parameter.grad = None
        return gradients


def inference_variant(
    model: nn.Module,
    mode: Mode,
    *,
    shared: bool,
    transform: Transform | None = None,
    dtype: torch.dtype | None = None,
    switch: Switch = nullcontext,
) -> Variant:
    """A variant for forward or cfg.

    Args:
        model: has the reference's forward, and its forward_with_cfg for cfg.
        mode: "forward" or "cfg".
        shared: whether the model uses the workload's weights as they are.
        transform: what to make of the call, e.g. compile it; traced and run in inference mode.
        dtype: of the inputs, where it differs from the case's.
        switch: a context in which each step runs.
    """
    call = inference_call(model, mode)
    if transform is not None:
        call = transform(call)

    def step(inputs: Inputs) -> Tensor:
        with switch(), torch.inference_mode():
            return call(inputs)

    return Variant(step, dtype, parameter_bytes(model) if shared else 0)


def training_variant(
    model: nn.Module,
    mode: Mode,
    *,
    transform: Transform | None = None,
    dtype: torch.dtype | None = None,
    switch: Switch = nullcontext,
    comparable: bool = True,
) -> Variant:
    """A variant for train: the diffusion loss, backward and an AdamW step at the learning rate 0.

    Args:
        model: has the reference's forward.
        mode: "train", or "train-checkpoint", for which each of ``model.blocks`` is checkpointed.
        transform: what to make of the model's forward.
        comparable: whether the parameters have the reference's names and layout.
        dtype, switch: as in :func:`inference_variant`.
    """
    if mode == "train-checkpoint":
        checkpoint_blocks(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fused = next(iter(trained.values())).is_cuda
    # the kernels of any other rate, and weights that stay: all variants time the same numbers
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=0.0, fused=fused)
    forward: Call = lambda inputs: model(*inputs)  # noqa: E731
    if transform is not None:
        forward = transform(forward)

    def loss(inputs: Inputs) -> Tensor:
        x0, t, y, noise = inputs
        with switch():
            return diffusion_loss(lambda *args: forward(args), x0, t, y, noise)

    def step(inputs: Inputs) -> Tensor:
        with switch():
            value = loss(inputs)
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return Variant(step, dtype, 0, loss, trained if comparable else None, switch)


def checkpoint_blocks(model: nn.Module) -> None:
    """Activation checkpointing: each of ``model.blocks`` runs its forward again in the backward."""
    for block in model.blocks:  # type: ignore[union-attr]
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
