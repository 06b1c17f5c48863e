"""Finds the sets of weights in a loaded file, in any containers and under any prefixes, and chooses one.

A set of weights is recognised by a DiT's names in it, and an average by the names that lead to it.
The label of a set is those keys and prefixes between dots: ``ema``, ``state.ema``, ``state_dict.ema_model``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .infer import DTYPES, CheckpointError, some

#: A name that every DiT has: officially, and in diffusers.
OFFICIAL, DIFFUSERS = "x_embedder.proj.weight", "proj_out_2.weight"

# DistributedDataParallel and the averages of torch and timm, torch.compile, FSDP, activation checkpointing
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_NOT_AVERAGED = {"online", "backup", "non"}  # raw weights beside or within what is named after averages
# what stands in one word with ema, swa or avg: modelema, emaweights, statedictema
_GLUED = (
    "(?:models?|nets?|networks?|weights?|params?|parameters?|states?|dicts?|sd|modules?|unet|dit|sit|transformer|denoiser"
    "|generator|backbone|diffusion|ckpts?|checkpoints?|callback|helper)*"
)
_AVERAGE = re.compile(f"averag.*|shadows?|polyak|{_GLUED}(?:ema|swa|avg)s?{_GLUED}")
# a key within (0.9, 1), as a number or in words, is what an average decays by
_DECAY = re.compile(r"0?\.9\d*[1-9]\d*")


@dataclass(frozen=True, eq=False)
class WeightSet:
    """One set of weights: its label, and of each entry its name in the file, its name in the model and its value."""

    label: str
    entries: Sequence[tuple[Any, Any, Any]]
    average: bool

    @property
    def is_diffusers(self) -> bool:
        return any(name == DIFFUSERS for _, name, _ in self.entries)


def find_weights(
    content: object, source: str, path: tuple[str, ...] = ()
) -> tuple[list[WeightSet], list[str]]:
    """The sets of weights in a loaded file, and the labels of averages that have no DiT's names.

    ``path`` leads to the file, and opens each label; ``source`` names it in messages. The lists of diffusers'
    ``EMAModel`` and of averaging optimisers, for example, have no names.

    Raises:
        CheckpointError: containers are nested too deep to look into.
    """
    sets: list[WeightSet] = []
    unnamed: dict[str, object] = {}
    try:
        _walk(content, path, False, sets, unnamed, set())
    except RecursionError:
        where = _deepest(content)
        raise CheckpointError(
            f"{source}: wanted containers nested at most some hundreds deep, got one nested deeper"
            + (f" under {where!r}" if where else "")
        ) from None
    sizes = [
        sum(value.numel() for _, _, value in each.entries if isinstance(value, Tensor))
        for each in sets
        if not each.average
    ]
    return sets, [label for label, value in unnamed.items() if not sizes or not _is_log(value, min(sizes))]


def choose(sets: Sequence[WeightSet], unnamed: Sequence[str], weights: str, source: str) -> WeightSet:
    """The set that ``weights`` means.

    Args:
        sets, unnamed: of :func:`find_weights`.
        weights: "ema", the average; "model", what is no average; "auto", the average before the other; or a label,
            or a part of one.
        source: names the file in messages.

    Raises:
        CheckpointError: there is no such set, or several, or for "auto" none but the raw weights beside an average.
    """
    averages, raw = [each for each in sets if each.average], [each for each in sets if not each.average]
    if weights == "auto" and unnamed and not averages:
        raise CheckpointError(
            f"{source}: holds an average that cannot be taken, because it has no names of a DiT's tensors or reading "
            f"it could run code: {some(unnamed)}; weights='model' (--weights model) takes the raw weights"
        )
    if weights == "model" and [each.label for each in sets] == [""]:
        raw = []  # bare, it does not say what it is
    pool = {"auto": averages or raw, "ema": averages, "model": raw}.get(weights)
    named = [each for each in sets if each.label == weights] or [
        each for each in sets if f".{weights}." in f".{each.label}."
    ]
    if pool is None:
        pool = named
    elif len(pool) > 1:
        pool = [each for each in named if each in pool] or _outermost(pool)
    if len(pool) == 1:
        return pool[0]
    listed = [each for each in pool or sets if each.label]
    labels = [repr(each.label) for each in listed]
    if pool:
        # an optimiser's moments have a model's names too
        example = min(listed, key=lambda each: ("opt" in each.label.lower(), not each.average)).label
        raise CheckpointError(
            f"{source}: holds several that could be meant: {', '.join(labels)}; choose one by name, for example "
            f"weights={example!r} (--weights)"
        )
    nameless = f"; of {some(unnamed)} it has no names" if unnamed else ""
    contents = (
        f"it holds {' and '.join(labels)}" if labels else "this is a bare state dict, wanted a training file"
    )
    raise CheckpointError(f"{source}: no {weights!r} in it{';' if labels else ':'} {contents}{nameless}")


def clean(chosen: WeightSet, source: str) -> dict[str, Tensor]:
    """The entries as floating tensors by their names in the model; refuses everything else by name."""
    if not chosen.entries:
        raise CheckpointError(f"{source}: holds no tensors")
    tensors: dict[str, Tensor] = {}
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    for original, name, value in chosen.entries:
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{source}: wanted names and tensors (or a training file with 'model' or 'ema'), "
                f"got a {type(value).__name__} under {original!r}"
            )
        if chosen.average and value.ndim == 0:  # how often it was updated
            continue
        if value.dtype not in DTYPES or value.layout != torch.strided:
            raise CheckpointError(
                f"{source}: tensor {original!r} must be dense and {dtypes}, got {value.layout}, {value.dtype}"
            )
        if name in tensors:
            raise CheckpointError(f"{source}: tensor {name!r} is there twice, once as {original!r}")
        tensors[name] = value.detach()
    return tensors


def without_names(content: object, source: str) -> tuple[WeightSet, str]:
    """What is most likely the model in a file without a DiT's names, and its source: for messages."""
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content, source = content[key], f"{source}[{key!r}]"
            break
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{source}: wanted a state dict or a training file, got a {type(content).__name__}"
        )
    return WeightSet("", [(name, name, value) for name, value in content.items()], False), source


def recorded_classes(content: object) -> int | None:
    """The ``num_classes`` in a training file's ``args``."""
    args = content.get("args") if isinstance(content, Mapping) else None
    values = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    number = values.get("num_classes")
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def is_average(label: str, known: bool = False) -> bool:
    """Whether a name is an average's: ``ema_model``, ``state_dict_ema``, ``modelEma``, ``swa``, but not ``non_ema``.

    ``known``: what leads to it says already that it is an average's.
    """
    label = label.replace("exp_avg", "")  # an optimiser's moments
    # modelEma and EMAModel are two words each
    apart = re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", label)
    words = set(re.findall("[a-z]+", apart.lower()))
    return not words & _NOT_AVERAGED and (known or any(map(_AVERAGE.fullmatch, words)))


def _outermost(pool: list[WeightSet]) -> list[WeightSet]:
    """The one within whose label all others lie, such as a plain file among its variants, or all."""
    for outer in pool:
        within = f"{outer.label}." if outer.label else ""
        if all(each is outer or each.label.startswith(within) for each in pool):
            return [outer]
    return pool


def _walk(
    value: object,
    path: tuple[str, ...],
    averaged: bool,
    sets: list[WeightSet],
    unnamed: dict[str, object],
    visited: set[int],
) -> None:
    """Collects the sets in ``value``, and by label the ``unnamed`` averages; ``averaged``: it belongs to an average."""
    local_sets: list[WeightSet] = []
    items: Iterable[tuple[Any, Any]] = ()
    lightning = False
    if isinstance(value, Mapping):
        local_sets = list(_sets_of(value, path, averaged))
        sets += local_sets
        # under "state" lies what an optimiser knows of each parameter
        skipped = "state" if "param_groups" in value else None
        items = [(key, item) for key, item in value.items() if not (isinstance(key, str) and key == skipped)]
        # Lightning's WeightAveraging moves the raw weights there, and puts the average in their place
        lightning = "state_dict" in value and "current_model_state" in value
        for label in _nameless_copies(value, local_sets, path):
            unnamed[label] = value
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    if id(value) in visited:  # a pickle can hold itself
        return
    visited.add(id(value))
    for key, item in items:
        parts = key if isinstance(key, tuple) else (key,)
        label = ".".join(map(str, parts))
        known = any(_DECAY.fullmatch(str(part)) for part in parts)
        if lightning and isinstance(key, str):
            known = known or key == "state_dict"
        before = len(sets), len(unnamed)
        if isinstance(item, (Mapping, list, tuple)):
            _walk(item, (*path, label), averaged or known, sets, unnamed, visited)
        elif local_sets or (isinstance(key, str) and "." in key and not known):
            continue
        if (len(sets), len(unnamed)) != before or not is_average(label, known):
            continue
        if any(tensor.numel() > 1 for tensor in _tensors(item)):
            unnamed[".".join((*path, label))] = item


def _sets_of(mapping: Mapping[Any, Any], path: tuple[str, ...], averaged: bool) -> Iterator[WeightSet]:
    """The sets whose tensors lie in this very mapping, apart by the prefixes of their names."""
    names = {name: _unwrapped(name) for name in mapping if isinstance(name, str)}
    prefixes = {
        name.removesuffix(marker)
        for original, name in names.items()
        for marker in (OFFICIAL, DIFFUSERS)
        if name.endswith(marker) and name.removesuffix(marker)[-1:] in ("", ".")
        if isinstance(mapping[original], Tensor)
    }
    for prefix in sorted(prefixes):
        inner = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        entries = [
            (original, name.removeprefix(prefix), mapping[original])
            for original in mapping
            for name in [names.get(original, original)]
            if not prefix or (isinstance(name, str) and name.startswith(prefix))
            if not (isinstance(name, str) and name.startswith(inner))
        ]
        label = ".".join((*path, *filter(None, [prefix.rstrip(".")])))
        average = is_average(label, averaged) or any(name == "n_averaged" for _, name, _ in entries)
        yield WeightSet(label, entries, average)
        if not average:
            yield from _without_dots(mapping, entries, path)


def _without_dots(
    mapping: Mapping[Any, Any], entries: Sequence[tuple[Any, Any, Any]], path: tuple[str, ...]
) -> Iterator[WeightSet]:
    """The averages that latent-diffusion codebases keep beside a model, under its names without their dots."""
    for marker in {name.replace(".", "") for _, name, _ in entries if name in (OFFICIAL, DIFFUSERS)}:
        for key in [key for key in mapping if isinstance(key, str) and key.endswith(marker)]:
            prefix = key.removesuffix(marker)
            flat = {name: prefix + name.replace(".", "") for _, name, _ in entries if isinstance(name, str)}
            # the position table is frozen, and what is frozen is not averaged
            averaged = [
                (flat[name], name, mapping[flat[name]])
                if flat.get(name) in mapping
                else (original, name, value)
                for original, name, value in entries
                if flat.get(name) in mapping or name == "pos_embed"
            ]
            yield WeightSet(".".join((*path, prefix.rpartition(".")[0] or prefix)), averaged, True)


def _nameless_copies(
    mapping: Mapping[Any, Any], local_sets: Sequence[WeightSet], path: tuple[str, ...]
) -> Iterator[str]:
    """Averages of a DiT among tensors by name, whose names are none of its own: flattened some other way."""
    known = {original for each in local_sets for original, _, _ in each.entries}
    names = [name for name in mapping if isinstance(name, str) and "x_embedder" in name and name not in known]
    heads = {name.partition("x_embedder")[0] for name in names}
    yield from (".".join((*path, head.rstrip("._"))) for head in sorted(heads) if is_average(head))


def _is_log(value: object, size: int) -> bool:
    """Whether this, under an average's name, is too little for a model of ``size``: losses, not weights."""
    tensors = _tensors(value)
    if isinstance(value, (list, tuple)):
        # with a matrix in it, it more likely holds the trained weights
        if not all(isinstance(item, Tensor) and item.ndim < 2 for item in value):
            return False
    elif not isinstance(value, Tensor):
        return False
    return 2 * sum(tensor.numel() for tensor in tensors) < size


def _deepest(content: object) -> str:
    """The first entry of a file within which containers are nested too deep to walk; empty where it is unclear."""
    if isinstance(content, Mapping):
        for key, item in content.items():
            try:
                _walk(item, (str(key),), False, [], {}, set())
            except RecursionError:
                return str(key)
    return ""


def _tensors(value: object) -> list[Tensor]:
    """The tensors within, at any depth."""
    tensors, pending, visited = [], [value], set()
    while pending:
        each = pending.pop()
        if isinstance(each, Tensor):
            tensors.append(each)
        elif isinstance(each, (Mapping, list, tuple)) and id(each) not in visited:
            visited.add(id(each))
            pending += each.values() if isinstance(each, Mapping) else each
    return tensors


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
