"""``ditfast.accelerate(model)``: the fused forwards in a model of another codebase, in place, this instance only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..gone import refuse_gone
from ..model.dit import DiT
from . import registered
from .adapter import Adapter
from .check import Verdict, disagreement, fingerprint
from .shared import FastModel, sharing_layers
from .swap import accelerated_by, swap, unswap

Status = Literal["accelerated", "already", "skipped"]
M = TypeVar("M", bound=nn.Module)

_COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_GONE = {
    "level": "models of the official shape share one launch for all modulations without it; leave it out",
}


@dataclass(frozen=True)
class Entry:
    """One module of a kind that an adapter knows.

    Attributes:
        module: its path in the model, "" for the model itself.
        kind: its class, as it was.
        adapter: the adapter's name.
        status: "accelerated" by this call, "already" before it, or "skipped".
        reason: why it was skipped; else "".
        note: what the trace could not settle, so that only numbers were compared; else "".
    """

    module: str
    kind: str
    adapter: str
    status: Status
    reason: str = ""
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What was matched and what was not; ``str`` is a table."""

    entries: tuple[Entry, ...]

    @property
    def accelerated(self) -> tuple[Entry, ...]:
        """The modules that run a fused forward now."""
        return tuple(entry for entry in self.entries if entry.status != "skipped")

    @property
    def skipped(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.status == "skipped")

    def __str__(self) -> str:
        rows = [("module", "class", "adapter", "status", "reason")]
        for entry in self.entries:
            remark = entry.reason or entry.note
            rows.append((entry.module or "(the model)", entry.kind, entry.adapter, entry.status, remark))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        lines.append(f"{len(self.accelerated)} accelerated, {len(self.skipped)} skipped")
        return "\n".join(line.rstrip() for line in lines)


def accelerate(model: nn.Module, *, check: bool = True, strict: bool = False, **gone: object) -> Report:
    """Gives the modules that an adapter matches a fused forward, in place.

    A matched module's class becomes a subclass with another forward: parameters, state-dict keys, hooks, isinstance,
    copies and pickles stay what they were. Where the fused forward does not apply to a call (a mask, a live dropout),
    the module's own runs. In inference those blocks and the final layer of a model of the official shape (``blocks``,
    ``final_layer``) that are matched share one launch for their modulations; the model's class becomes a subclass too.
    Where a block's class is registered with diffusers' caches, its subclass is registered too.

    Args:
        model: any module; blocks are found wherever they stand in it.
        check: traces what the old and the new module of each kind compute (any sizes, several dtypes, inference and
            training), and runs both on small random inputs on its device, with parameters drawn anew in a copy: in
            inference, in training with gradients, under autocast, and in fp32 on larger ones. Skips modules that
            disagree, or that do something which random inputs would not show.
        strict: raises where a module of a kind that was matched is skipped.

    Returns:
        What was matched, and what was skipped and why.

    Raises:
        TypeError: model is no module; or an argument that was removed (``level``) or never existed.
        ValueError: nothing matched, the model is sharded already, ``strict`` and something was skipped, or an
            accelerated module was given another class since. The model is then as it was.
    """
    refuse_gone("accelerate", gone, _GONE)
    return _accelerate(model, check, strict)[0]


def _accelerate(model: nn.Module, check: bool, strict: bool) -> tuple[Report, list[nn.Module]]:
    """(the report, the modules that were given another class)."""
    _check_model(model)
    if reason := _given_another_class(dict(model.named_modules())):
        raise ValueError(reason)
    entries: list[Entry] = []
    matched: list[tuple[nn.Module, Adapter]] = []
    verdicts: dict[Any, Verdict] = {}
    for path, module in model.named_modules():
        before = accelerated_by(module)
        adapter = _adapter_of(module, before)
        if adapter is None:
            continue
        kind = type(module).__name__
        if before is not None:
            entries.append(Entry(path, kind, adapter.name, "already"))
            continue
        verdict = Verdict(adapter.refuses(module) or _unfit(module) or _shadowed(module, adapter))
        if verdict.reason is None and check:
            key = (adapter.name, fingerprint(module))
            if key not in verdicts:
                verdicts[key] = disagreement(module, adapter)
            verdict = verdicts[key]
        if verdict.reason is None:
            matched.append((module, adapter))
        status: Status = "accelerated" if verdict.reason is None else "skipped"
        entries.append(Entry(path, kind, adapter.name, status, verdict.reason or "", verdict.note))
    report = Report(tuple(entries))
    if not report.accelerated:
        listing = f":\n{report}" if entries else ""
        raise ValueError(f"model ({type(model).__name__}) has nothing that ditfast can accelerate{listing}")
    if strict and report.skipped:
        raise ValueError(f"strict=True, and {len(report.skipped)} modules of a matched kind were skipped:\n{report}")
    swapped: list[nn.Module] = []
    try:
        for module, adapter in matched:
            swapped.append(module)
            swap(module, adapter.mixin)
        for module in model.modules():
            if accelerated_by(module) is None and _may_share(module):
                swapped.append(module)
                swap(module, FastModel)
    except BaseException:
        for module in swapped:  # also the one that was just being swapped
            unswap(module)
        raise
    return report, swapped


def restore(model: nn.Module) -> int:
    """Gives every accelerated module of a model its own forward back; returns how many there were.

    What was wrapped around a module's forward meanwhile (offloading, diffusers' hooks, ``Accelerator.prepare``) stays
    around its own.

    Raises:
        TypeError: model is no module.
        ValueError: an accelerated module was given another class since (sharding and parametrising do so); nothing is
            changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    if reason := _given_another_class(modules):
        raise ValueError(reason)
    count = sum(map(unswap, (module for module in modules.values() if not isinstance(module, FastModel))))
    for module in modules.values():
        unswap(module)
    return count


def _given_another_class(modules: dict[str, nn.Module]) -> str | None:
    """Which accelerated module has another class since, and what to do, or None."""
    for path, module in modules.items():
        kinds = type(module).__mro__
        if not any(map(accelerated_by, kinds[1:])):
            continue
        if any(kind.__name__ == "FSDPModule" for kind in kinds):
            undo = "call ditfast.restore before fully_shard"
        elif is_parametrized(module):
            undo = "call torch.nn.utils.parametrize.remove_parametrizations first"
        else:
            undo = "give it back the class that it had first"
        return f"{path or 'the model'} was given the class {kinds[0].__name__} after ditfast.accelerate: {undo}"
    return None


@contextmanager
def accelerated(model: M, *, check: bool = True, strict: bool = False, **gone: object) -> Iterator[M]:
    """``with accelerated(model):`` accelerates within the block; modules that were accelerated before stay so.

    So do copies that are made within it (an EMA, peft's ``modules_to_save``), until ``restore``. No other thread may
    call the model meanwhile.

    Raises:
        TypeError, ValueError: as :func:`accelerate`; and ValueError on leaving as :func:`restore`.
    """
    refuse_gone("accelerated", gone, _GONE)
    _, swapped = _accelerate(model, check, strict)
    raised = True
    try:
        yield model
        raised = False
    finally:
        paths = {id(module): path for path, module in model.named_modules()}
        reason = _given_another_class({paths.get(id(module), type(module).__name__): module for module in swapped})
        if reason is None or raised:  # an exception from within the block goes on
            for module in swapped:
                unswap(module)
        else:
            raise ValueError(reason)


def _may_share(module: nn.Module) -> bool:
    """Whether it is a model with two accelerated layers or more that can share a launch."""
    if _uncallable(module) is not None or is_parametrized(module):  # torch changes a parametrised module's class
        return False
    return len(sharing_layers(module)) > 1


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, DiT):
        raise ValueError(f"model ({type(model).__name__}) is ditfast's own, and fast as it is")
    for path, module in model.named_modules():
        # by name: fully_shard gives a module a subclass of FSDPModule
        if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__):
            raise ValueError(
                f"model is sharded already ({path or 'the model'} is {type(module).__name__}): "
                "call ditfast.accelerate before fully_shard"
            )
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise ValueError(f"model is sharded already ({name} is a DTensor): call ditfast.accelerate before sharding")


def _adapter_of(module: nn.Module, before: tuple[type[nn.Module], type[nn.Module]] | None) -> Adapter | None:
    """The adapter that accelerated it, or the first that recognises it."""
    if before is not None:
        return next((adapter for adapter in registered() if adapter.mixin is before[0]), None)
    if isinstance(module, torch.jit.ScriptModule):
        return None  # its forward is no method of its class
    return next((adapter for adapter in registered() if adapter.recognises(module)), None)


def _uncallable(module: nn.Module) -> str | None:
    """Why a module's forward cannot be its class's, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    return "its forward was replaced on the instance (offloading does so)" if "forward" in module.__dict__ else None


def _unfit(module: nn.Module) -> str | None:
    """Why a module is not accelerated whatever its kind, or None."""
    if reason := _uncallable(module):
        return reason
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    if not any(tensor.is_floating_point() for tensor in tensors):
        return "it has no floating-point parameters"
    if any(tensor.is_meta for tensor in tensors):
        return "it has parameters on meta: load its weights first"
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"its tensors are on several devices: {', '.join(sorted(map(str, devices)))}"
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in _COMPUTED:
            return f"{name} is stored as {str(parameter.dtype).removeprefix('torch.')}, in which nothing is computed"
        try:
            with torch.no_grad():  # for parameters made in inference mode
                finite = not parameter.is_floating_point() or bool(torch.isfinite(parameter).all())
        except Exception as error:  # a tensor of another kind (quantised) may raise anything
            return f"{name} ({type(parameter.data).__name__}) cannot be read: {' '.join(str(error).split())}"
        if not finite:
            return f"{name} holds values that are not finite"
    return None


def _shadowed(module: nn.Module, adapter: Adapter) -> str | None:
    """Which attribute ditfast's mixins would hide from the module's own forward, as a reason, or None."""
    bases = [base for base in adapter.mixin.__mro__ if base.__module__.startswith("ditfast.")]
    names = {name for base in bases for name in vars(base) if not name.startswith("__")} - set(dir(nn.Module))
    missing = object()
    for name in sorted(names):
        if name in vars(module) or getattr(type(module), name, missing) not in (missing, getattr(adapter.mixin, name)):
            return f"it has {name}, a name that the fused forward has a use of its own for"
    return None
