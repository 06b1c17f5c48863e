"""The work of a case: shared random weights, a pool of random inputs, and how a mode calls a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ditfast import reference
from ditfast.config import DiTConfig

from ...testing.inputs import random_batch, randomize_
from .case import Case, Mode

#: forward (x, t, y); cfg (x of 2N, t of 2N, y of N); train (x0, t, y, noise).
Inputs = tuple[Tensor, ...]
Call = Callable[[Inputs], Tensor]

CFG_SCALE = 4.0
_MIN_POOL, _MAX_POOL = 3, 64
_CPU_CACHE_BYTES = 64 << 20  # last-level caches of common machines; nothing portable reports them


@dataclass
class Workload:
    """One case on one device.

    ``model`` is the reference in the working dtype, its weights rounded to that dtype, so that the fp64
    oracle and a provider in another precision compute the same function. Providers may share its tensors
    in forward and cfg; training changes weights, so there each takes :meth:`own_model`.
    """

    case: Case
    device: torch.device
    model: reference.DiT
    pool: list[Inputs]

    def own_model(self, dtype: torch.dtype | None = None, **constants: float) -> reference.DiT:
        """A reference with weights of its own, in another dtype or with other numeric constants."""
        return copy_model(self.model, self.case.dtype if dtype is None else dtype, **constants)


def build_model(config: DiTConfig, device: torch.device, dtype: torch.dtype, seed: int) -> reference.DiT:
    """The reference with random weights, in eval mode: label dropout would make training's gradients random."""
    with torch.device(device):
        model = reference.DiT(config)
    randomize_(model, seed)
    return model.to(dtype).eval()


def copy_model(model: reference.DiT, dtype: torch.dtype, **constants: float) -> reference.DiT:
    """A copy with the same weights, in ``dtype`` and with fields of the config replaced."""
    config = replace(model.config, **constants)  # type: ignore[arg-type]
    with torch.device("meta"):
        copy = reference.DiT(config)
    copy.load_state_dict({name: value.to(dtype, copy=True) for name, value in model.state_dict().items()}, assign=True)
    return copy.eval()


def make_pool(case: Case, device: torch.device, weight_bytes: int, seed: int) -> list[Inputs]:
    """Enough random inputs that one has left the cache before it comes round again.

    Between two uses of an input a model has read its weights and the other inputs.
    """
    first = make_inputs(case, device, seed)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE_BYTES
    touched = weight_bytes + sum(tensor.nbytes for tensor in first)
    count = min(max(math.ceil(2 * cache / touched) + 1, _MIN_POOL), _MAX_POOL)
    return [first] + [make_inputs(case, device, seed + index) for index in range(1, count)]


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random inputs of the case's mode, the latents in its dtype."""
    x, t, y = random_batch(case.config, case.batch, device, case.dtype, seed)
    if case.mode == "cfg":
        return torch.cat([x, x]), torch.cat([t, t]), y
    if case.training:
        noise, _, _ = random_batch(case.config, case.batch, device, case.dtype, seed + 1_000_000)
        return x, t, y, noise
    return x, t, y


def cast_inputs(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same inputs with their floating tensors in ``dtype``."""
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs)


def take_samples(mode: Mode, inputs: Inputs, samples: Sequence[int]) -> Inputs:
    """The inputs of some images of the batch."""
    return tuple(tensor[_rows(mode, len(tensor), len(inputs[2]), samples)] for tensor in inputs)


def take_outputs(mode: Mode, output: Tensor, batch: int, samples: Sequence[int]) -> Tensor:
    """The output rows of some images of the batch."""
    return output[_rows(mode, len(output), batch, samples)]


def _rows(mode: Mode, length: int, batch: int, samples: Sequence[int]) -> list[int]:
    # in cfg, an image is a conditional row and an unconditional one, a batch further on
    return [start + sample for start in range(0, length, batch) for sample in samples] if mode == "cfg" else [*samples]


def inference_call(model: nn.Module, mode: Mode) -> Call:
    """How forward and cfg call a model. The caller holds torch.inference_mode."""
    if mode == "cfg":
        guided = model.forward_with_cfg
        return lambda inputs: guided(*inputs, CFG_SCALE)  # type: ignore[operator]
    return lambda inputs: model(*inputs)
