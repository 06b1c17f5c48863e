"""Reads files and folders safely: which files hold weights, what is in them, and what cannot be read.

It reads PyTorch and safetensors files, also in shards with an index, and folders of diffusers and accelerate. It
refuses folders of torch.distributed.checkpoint and DeepSpeed, whose readers unpickle, and names the command that
converts them.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .diffusers import CLASSES, CONFIG_FILE
from .infer import CheckpointError, some
from .select import WeightSet, choose, clean, find_weights, is_average, recorded_classes, without_names

_DIFFUSERS_STEM = "diffusion_pytorch_model"
# stem, variant, kind, and for an index its variant: model.safetensors, diffusion_pytorch_model.fp16.bin,
# diffusion_pytorch_model.safetensors.index.fp16.json; "-00001-of-00002" is a shard
_WEIGHTS_FILE = re.compile(
    r"(?!.*-\d{5}-of-\d{5})([^.]+)(?:\.([^.]+))?\.(safetensors|bin|pt|pth|ckpt|pkl)(\.index(?:\.([^.]+))?\.json)?"
)
_ACCELERATE_STEM = re.compile(r"(pytorch_)?model(_fsdp)?(_\d+)?|custom_checkpoint_\d+")
_KINDS = ("safetensors", "bin", "pt", "pth", "ckpt", "pkl")
_SHARDED = ".metadata"  # of torch.distributed.checkpoint


@dataclass(frozen=True)
class Loaded:
    """Weights by their names in the model, mapped, not read.

    ``files`` are those that they come from; ``config_file`` is diffusers', where the names are too; ``metadata`` is a
    safetensors file's own; ``recorded_classes`` is the number of classes in the arguments of a training file.
    """

    tensors: dict[str, Tensor]
    source: str
    files: list[Path]
    config_file: Path | None
    metadata: Mapping[str, str]
    recorded_classes: int | None


@dataclass(frozen=True)
class _File:
    path: Path
    content: object
    metadata: Mapping[str, str]
    shards: list[Path]


def read(path: Path, weights: str) -> Loaded:
    """The weights in a file or a folder.

    Args:
        path: a PyTorch or a safetensors file, told apart by their first bytes, an index of shards, or a folder.
        weights: as in :func:`ditfast.load_checkpoint`.

    Raises:
        CheckpointError: nothing can be read safely, or what is meant is not in it.
    """
    paths = _weight_files(path) if path.is_dir() else {"": path}
    candidates: list[tuple[WeightSet, _File, str]] = []
    unnamed = _averages_in_folders(path) if path.is_dir() else []
    for key, each in paths.items():
        try:
            file = _read_file(each)
        except CheckpointError:
            # accelerate keeps any registered object here, an average or a counter
            if not key.startswith("custom_checkpoint"):
                raise
            unnamed.append(key)
            continue
        sets, others = find_weights(file.content, str(each), (key,) if key else ())
        # within a folder a set is known by its file, within a file by its entry
        candidates += [(chosen, file, chosen.label.removeprefix(key).lstrip(".")) for chosen in sets]
        unnamed += others or ([key] if not sets and is_average(key) else [])
    if candidates:
        chosen = choose([entry[0] for entry in candidates], unnamed, weights, str(path))
        _, file, entry = next(entry for entry in candidates if entry[0] is chosen)
        source = f"{file.path}[{entry!r}]" if entry else str(file.path)
    elif path.is_dir() and (refusal := _refusal(path)):
        raise CheckpointError(refusal)
    elif len(paths) == 1 and not unnamed:
        chosen, source = without_names(file.content, str(file.path))
    else:
        raise CheckpointError(f"{path}: no tensors with the names of a DiT in {some([*paths])}")
    config = [path for path in [file.path.parent / CONFIG_FILE] if path.is_file()]
    if chosen.is_diffusers and not config:
        raise CheckpointError(
            f"{source}: the names are those of diffusers' DiTTransformer2DModel, which needs its {CONFIG_FILE}; "
            "give the folder that holds both"
        )
    # a file of diffusers' name is refused by its config where it holds something else
    if not chosen.is_diffusers and not file.path.name.startswith(_DIFFUSERS_STEM):
        config = []
    tensors, classes = clean(chosen, source), recorded_classes(file.content)
    files = [*config, file.path, *file.shards]
    return Loaded(tensors, source, files, config[0] if config else None, file.metadata, classes)


def _weight_files(folder: Path) -> dict[str, Path]:
    """The files of weights in a folder, and in those within it that hold a DiT of diffusers' or an average."""
    if (folder / _SHARDED).is_file():
        raise CheckpointError(_refusal(folder))
    paths = _named_files(folder)
    for inner in _folders(folder):
        if inner.name == "transformer" or is_average(inner.name) or _holds_dit(inner):
            for key, path in _named_files(inner).items():
                variant = key.removeprefix(_DIFFUSERS_STEM).lstrip(".")
                paths[f"{inner.name}.{variant}" if variant else inner.name] = path
    if paths:
        return paths
    raise CheckpointError(
        _refusal(folder)
        or f"{folder}: no weights in this folder or in transformer/; wanted diffusers' {CONFIG_FILE} and "
        f"{_DIFFUSERS_STEM}.safetensors, or accelerate's model.safetensors or pytorch_model.bin"
    )


def _named_files(folder: Path) -> dict[str, Path]:
    """By stem and variant; safetensors before pickles, and as in diffusers an index before a file."""
    ranked: dict[str, tuple[tuple[int, bool], Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _WEIGHTS_FILE.fullmatch(path.name)
        if match is None or not path.is_file():
            continue
        stem, variant, kind, index, index_variant = match.groups()
        if not (stem == _DIFFUSERS_STEM or _ACCELERATE_STEM.fullmatch(stem) or is_average(stem)):
            continue
        key = ".".join(filter(None, (stem.removeprefix("pytorch_"), variant or index_variant)))
        rank = _KINDS.index(kind), index is None
        if key not in ranked or rank < ranked[key][0]:
            ranked[key] = rank, path
    return {key: path for key, (_, path) in ranked.items()}


def _holds_dit(folder: Path) -> bool:
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("_class_name") in [*CLASSES]


def _folders(folder: Path) -> list[Path]:
    return sorted(inner for inner in folder.iterdir() if inner.is_dir())


def _averages_in_folders(folder: Path) -> list[str]:
    return [
        inner.name for inner in _folders(folder) if is_average(inner.name) and (inner / _SHARDED).is_file()
    ]


def _refusal(folder: Path) -> str:
    """The command that makes a file of a folder that is not read; empty where none is known."""
    if (folder / "zero_to_fp32.py").is_file():
        script, quoted = (shlex.quote(str(path)) for path in (folder / "zero_to_fp32.py", folder))
        return (
            f"{folder}: a folder of DeepSpeed, whose own script makes a file of it: python {script} {quoted} OUT; it "
            "unpickles what it reads, so the folder must be one that you trust"
        )
    for place in (folder, *(inner for inner in _folders(folder) if not inner.name.startswith("optim"))):
        if (place / _SHARDED).is_file():
            quoted = shlex.quote(str(place))
            return (
                f"{place}: a folder of torch.distributed.checkpoint; torch makes a file of it: python -m "
                f"torch.distributed.checkpoint.format_utils dcp_to_torch {quoted} OUT.pt; it unpickles what it reads, "
                "so the folder must be one that you trust"
            )
    return ""


def _read_file(path: Path) -> _File:
    if path.suffix == ".distcp" or path.name == _SHARDED:
        raise CheckpointError(_refusal(path.parent) or f"{path}: a shard without its {_SHARDED}")
    if not _is_index(path):
        content, metadata = _read_content(path)
        return _File(path, content, metadata, [])
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        places = {str(name): str(place) for name, place in dict(values["weight_map"]).items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: no index of shards, a JSON object with a 'weight_map': {error}"
        ) from error
    names = sorted({*places.values()})
    if outside := [name for name in names if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}]:
        raise CheckpointError(f"{path}: shards must be files beside the index, got {some(outside)}")
    shards = {name: path.parent / name for name in names}
    if missing := [name for name, shard in shards.items() if not shard.is_file()]:
        raise CheckpointError(f"{path}: {len(missing)} of {len(shards)} shards are missing: {some(missing)}")
    contents = {name: _read_content(shard)[0] for name, shard in shards.items()}
    tensors = {}
    for name, place in places.items():
        content = contents[place]
        if not isinstance(content, Mapping) or name not in content:
            raise CheckpointError(
                f"{shards[place]}: tensor {name!r} is missing, which {path.name} says is in it"
            )
        tensors[name] = content[name]
    return _File(path, tensors, {}, [*shards.values()])


def _is_index(path: Path) -> bool:
    return path.suffix == ".json" and ".index." in path.name


def _read_content(path: Path) -> tuple[object, Mapping[str, str]]:
    """What is in a file, and its metadata."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path}: the file is empty")
    # safetensors first: its header's length, of any value, comes before the brace
    if head[8:] == b"{":
        try:
            with safe_open(path, framework="pt") as handle:
                return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: truncated or damaged safetensors file: {error}") from error
    if head.startswith((b"PK\x03\x04", b"\x80")):
        # only the zip container can be mapped; b"\x80" opens a bare pickle, torch's format before 1.6
        return _load_pickle(path, mapped=head.startswith(b"PK")), {}
    raise CheckpointError(
        f"{path}: not a checkpoint; wanted a PyTorch file, a safetensors file, or a folder of diffusers or accelerate"
    )


def _load_pickle(path: Path, mapped: bool) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        refused = re.search(r"(?:GLOBAL|function|but got) (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise CheckpointError(
                f"{path}: refused, because its pickle calls for {refused[1]} and could run code; wanted only "
                "tensors, plain containers and argparse.Namespace. Nothing was run"
            ) from error
        first = str(error).strip().partition("\n")[0]
        if "weights_only" in first:  # torch's advice to switch the guard off
            first = "its pickle holds more than tensors and plain containers"
        raise CheckpointError(
            f"{path}: truncated or damaged PyTorch file, or an unsafe one; nothing in it was run: "
            f"{first or type(error).__name__}"
        ) from error
