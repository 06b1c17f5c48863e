"""The parity tick: a variant's output, or its gradients, against the fp64 reference by the rule for models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ditfast.training.loss import diffusion_loss

from ...parity import VANISHING, Verdict, judge
from ..cases.variants import Variant, checkpoint_blocks
from ..cases.workload import Inputs, Workload, cast_inputs, inference_call, take_outputs, take_samples

_MAX_SAMPLES = 4  # of a batch: samples are independent, and fp64 is slow
_MAX_SCORES = 1 << 30  # bytes of attention scores at a time in the oracle
_CHUNK = 8  # images at a time in the gradients' oracle, which needs the whole batch

Constants = Mapping[str, float]


@dataclass(frozen=True)
class Judgement:
    """The verdict, on how many images, and why there is no tick ("" where there is one). verdict None: not judged."""

    verdict: Verdict | None
    samples: int
    note: str

    @property
    def parity(self) -> bool | None:
        return None if self.verdict is None else self.verdict.ok


class Judge:
    """Judges the variants of one workload on one of its inputs.

    Forward and cfg compare up to four images spread over the real batch, the first and the last among them;
    train compares the gradient of every parameter over the whole batch. Oracle and yardstick are made once
    for each set of numeric constants.
    """

    def __init__(self, work: Workload) -> None:
        self._work = work
        self._inputs = work.pool[0]
        batch = work.case.batch
        count = min(batch, _MAX_SAMPLES)
        self.samples = [round(i * (batch - 1) / max(count - 1, 1)) for i in range(count)]
        self._standards: dict[tuple[tuple[str, float], ...], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def compared(self, variant: Variant, inputs: Inputs) -> dict[str, Tensor] | None:
        """What is compared, by name: the output of some images, or every gradient; None where it cannot be.

        In training this must come before the variant's first step.
        """
        case = self._work.case
        if case.training:
            return variant.gradients(inputs)
        output = take_outputs(case.mode, variant.step(inputs), case.batch, self.samples)
        return {"output": output.clone()}  # a graph writes its buffer again in its next call

    def judge(self, results: dict[str, Tensor] | None, constants: Constants) -> Judgement:
        """Judges what :meth:`compared` returned for the first input of the pool.

        Args:
            results: by name; None where they cannot be compared.
            constants: fields of the config in which the variant's function differs from the case's.
        """
        case = self._work.case
        samples = case.batch if case.training else len(self.samples)
        if results is None:
            return Judgement(None, samples, "parity not judged: its parameters are laid out otherwise")
        oracles, yardsticks = self.standard(constants)
        missing = [name for name in oracles if name not in results]
        if missing:
            return Judgement(Verdict(math.inf, 0.0, 0.0), samples, f"parity failed: no gradient for {missing[0]}")
        verdicts = {
            name: judge("model", results[name], yardsticks[name], oracle, case.dtype)
            for name, oracle in oracles.items()
        }
        # by the verdict first: an oracle that is not finite has no ratio
        name, worst = max(
            verdicts.items(), key=lambda item: (not item[1].ok, item[1].error / max(item[1].bound, 1e-300))
        )
        if worst.ok:
            return Judgement(worst, samples, "")
        reason = f"error {worst.error:.2e} is above the bound {worst.bound:.2e}"
        if not math.isfinite(worst.error):
            reason = "not finite, or not zero where the reference is"
        return Judgement(worst, samples, f"parity failed: {name}: {reason}")

    def standard(self, constants: Constants) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(oracle, yardstick), each by name; made at the first call for these constants."""
        key = tuple(sorted(constants.items()))
        if key not in self._standards:
            make = self._gradients if self._work.case.training else self._outputs
            self._standards[key] = (
                make(torch.float64, constants),
                make(self._work.case.dtype, constants),
            )
        return self._standards[key]

    def _outputs(self, dtype: torch.dtype, constants: Constants) -> dict[str, Tensor]:
        mode = self._work.case.mode
        call = inference_call(self._work.own_model(dtype, **constants), mode)
        inputs = cast_inputs(take_samples(mode, self._inputs, self.samples), dtype)
        with torch.inference_mode(), _LeanAttention():
            return {"output": call(inputs)}

    def _gradients(self, dtype: torch.dtype, constants: Constants) -> dict[str, Tensor]:
        """Of the mean loss over the batch. Only the oracle goes in chunks: the yardstick rounds as training does."""
        model = self._work.own_model(dtype, **constants)
        checkpoint_blocks(model)  # the same gradients, bit by bit, for a fraction of the memory
        batch = self._work.case.batch
        chunk = _CHUNK if dtype == torch.float64 else batch
        for start in range(0, batch, chunk):
            part: Inputs = tuple(tensor[start : start + chunk] for tensor in cast_inputs(self._inputs, dtype))
            loss = diffusion_loss(model, *part) * (len(part[0]) / batch)
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if _counts(name, p)}  # type: ignore[misc]


class _LeanAttention(TorchFunctionMode):
    """fp64 attention in slices of queries: it has no flash kernel, and whole scores of long sequences fit nowhere."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or args[0].dtype != torch.float64:
            return func(*args, **kwargs)
        q, k, v, *rest = args
        mask = rest[0] if rest else kwargs.pop("attn_mask", None)
        scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
        slices = math.ceil(scores / _MAX_SCORES)
        if mask is not None or slices <= 1:
            return func(q, k, v, mask, **kwargs)
        return torch.cat([func(part, k, v, **kwargs) for part in q.chunk(slices, dim=2)], dim=2)


def _counts(name: str, parameter: Tensor) -> bool:
    return parameter.grad is not None and not name.endswith(VANISHING)
