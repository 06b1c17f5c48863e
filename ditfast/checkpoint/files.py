"""Checkpoints, read and written safely: official state dicts, training files, safetensors, diffusers folders.

Nothing in a file is ever run: pickles are read with ``weights_only=True``, and beyond tensors and plain
containers only ``argparse.Namespace`` is allowed, which official training files hold. Files are
memory-mapped, so what is not asked for (an optimiser's state) is not read. A file is written beside its
target, then renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor

from ..config import VAE_FACTOR, DiTConfig
from ..files import replacing
from ..model.dit import DiT
from ..reference.dit import DiT as ReferenceDiT
from . import diffusers
from . import read as files
from .infer import (
    DTYPES,
    CheckpointError,
    check_grid,
    check_model_name,
    check_tensors,
    common_dtype,
    infer_config,
    is_position_table,
)

__all__ = ["CheckpointError", "convert", "load_checkpoint", "save_checkpoint"]

Format = Literal["official", "safetensors", "diffusers"]
PathLike = str | os.PathLike[str]
Size = int | tuple[int, int]

_SUFFIXES: dict[str, Format] = {
    ".pt": "official",
    ".pth": "official",
    ".ckpt": "official",
    ".safetensors": "safetensors",
    "": "diffusers",
}
_METADATA_KEY = "ditfast_config"
# what an official state dict cannot say: its readers assume these
_OFFICIAL_CONSTANTS = {
    name: getattr(DiTConfig(), name)
    for name in ("norm1_eps", "norm2_eps", "norm_final_eps", "timestep_freq_shift")
}
_NULL_ROW = {"class_dropout_prob"}
_MAX_TOKENS = 1 << 20  # a damaged or hostile configuration must not fill the memory with a position table


def load_checkpoint(
    path: PathLike,
    *,
    weights: str = "auto",
    config: DiTConfig | None = None,
    model: str | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    image_size: Size | None = None,
    latent_size: Size | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> DiT:
    """Loads a DiT in eval mode. The file may be deleted or overwritten afterwards.

    The configuration comes from the file (safetensors written by ditfast, diffusers folders), or is inferred
    from the tensors. What tensors cannot show: the number of heads is that of the named model with this depth
    and width; the label table's last row is the null class, as in every official checkpoint, unless a training
    file's ``args.num_classes`` says otherwise; epsilons and the timestep's frequency shift are the official ones.
    ``config`` overrides these.

    A DiT is found by its tensors' names in any container and under any prefix. The wrappers of DistributedDataParallel,
    FSDP, torch.compile and activation checkpointing are left out of the names.

    Args:
        path: an official state dict, bare or in a training file (.pt), a .safetensors file, an index of shards, or
            the folder of diffusers' ``DiTTransformer2DModel`` (safetensors or .bin, variants, shards), of a pipeline
            or a training around it, or of accelerate. Folders of torch.distributed.checkpoint and of DeepSpeed are
            refused with the command that converts them.
        weights: what to take where there are several: "ema", the average, whatever it is called (``model_ema``,
            ``ema_model``, ``state_dict_ema``, ``transformer_ema``, ...); "model", what is no average; "auto", the
            average where there is one, else the model; or an entry by its name ("ema_0.9999"; "state.ema" within
            another), which may be a diffusers variant ("fp16").
        config: the configuration of the file's model. Where the file carries its own, only the epsilons, the
            frequency shift and the label dropout may differ from it.
        model: a name such as "DiT-XL/2"; a file that holds another model is refused.
        num_heads: attention heads, for sizes that are no named model's.
        num_classes: classes of the loaded model, where they should differ from the file's. Rows of classes
            that both have are kept, further ones are drawn from N(0, 0.02) with torch's global generator, and
            the null class's row moves to the new last index.
        image_size: pixels, and
        latent_size: latent positions, as an int or (height, width): either names the grid where ``pos_embed``
            is no sine-cosine table; a grid other than the file's is refused.
        device: where the weights go.
        dtype: of the weights; by default the file's own. A file with parameters of several dtypes needs it
            (``pos_embed`` does not count and takes the parameters' dtype).

    Warns:
        UserWarning: the label table has as many rows as data sets have classes (10, 100, 365, 1000, ...), and nothing
            says whether the last is the null class.

    Raises:
        CheckpointError: the file is missing, broken, unsafe or no DiT, or it is not the model asked for; or several
            entries could be meant, or the average is there in a form that cannot be read.
        TypeError, ValueError: an argument is wrong in itself.
    """
    if not isinstance(weights, str) or not weights:
        raise TypeError(f"weights must be auto, ema, model or the name of an entry, got {weights!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    if config is not None and not isinstance(config, DiTConfig):
        raise TypeError(f"config must be a DiTConfig, got {type(config).__name__}")
    latent_hw = _requested_latent_size(image_size, latent_size)
    tensors, stored, source, recorded_classes = _read(Path(path), weights)

    requested = config
    config = (
        requested
        or stored
        or infer_config(
            tensors,
            source,
            model=model,
            num_heads=num_heads,
            latent_size=latent_hw,
            num_classes=num_classes,
            recorded_classes=recorded_classes,
        )
    )
    if stored is not None and requested is not None:
        free = {*_OFFICIAL_CONSTANTS, *_NULL_ROW}
        _check_equal(asdict(stored), {k: v for k, v in asdict(requested).items() if k not in free}, source)
    requested_sizes = {"num_heads": num_heads, "latent_size": latent_hw}
    _check_equal(asdict(config), {key: value for key, value in requested_sizes.items() if value is not None}, source)
    check_model_name(asdict(config), model, source)
    check_tensors(
        tensors, _expected(config, tensors, source), source, f"{config.name} ({config.conditioning})"
    )
    check_grid(tensors["pos_embed"], config, source)
    dtype = dtype or common_dtype(tensors, source)
    if num_classes is not None and num_classes != config.num_classes:
        if requested is None and stored is None and recorded_classes is None and num_classes == config.num_embeddings:
            raise CheckpointError(
                f"{source}: tensor 'y_embedder.embedding_table.weight' has {num_classes} rows: {num_classes} "
                f"classes, or {num_classes - 1} and the null class; give config= with its class_dropout_prob"
            )
        key, resized = "y_embedder.embedding_table.weight", replace(config, num_classes=num_classes)
        tensors[key] = _resize_label_table(tensors[key], config, resized)
        config = resized
    with torch.device("meta"):
        result = DiT(config)
    # copies, not the mapped file, which may change; each entry is released as the next is copied
    state = {name: tensors.pop(name).to(device, dtype, copy=True).contiguous() for name in list(tensors)}
    result.load_state_dict(state, strict=True, assign=True)
    return result.eval()


def save_checkpoint(
    model: ReferenceDiT, path: PathLike, *, to: Format | None = None, allow_inexact: bool = False
) -> None:
    """Writes a model's weights and, where the format has a place for it, its configuration.

    A save that fails leaves what was at ``path`` as it was, and nothing beside it.

    Args:
        model: a :class:`ditfast.DiT` or :class:`ditfast.reference.DiT`.
        path: the file, or the folder for diffusers (made if missing).
        to: "official", a bare state dict; "safetensors", with the configuration in its metadata; "diffusers",
            the folder of a ``DiTTransformer2DModel`` (diffusers' pipeline around it assumes 1000 classes). By
            default .pt, .pth and .ckpt are official, .safetensors is safetensors, and a path without a suffix
            or a folder is diffusers.
        allow_inexact: write also where the format's reader computes with other epsilons or another timestep
            frequency shift, so that outputs change. diffusers' own conversion of the official weights does.

    Raises:
        CheckpointError: the format cannot hold this model, or only inexactly.
        TypeError, ValueError: an argument is wrong in itself.
        OSError: the file cannot be written.
    """
    if not isinstance(model, ReferenceDiT):
        raise TypeError(f"model must be a ditfast.DiT or ditfast.reference.DiT, got {type(model).__name__}")
    target = Path(os.path.realpath(path))  # a link stays a link, its target is replaced
    format = _format(target, to)
    if target.exists() and target.is_dir() != (format == "diffusers"):
        raise ValueError(
            f"path must be a {'folder' if format == 'diffusers' else 'file'} for {format}, got {target}"
        )
    if not target.parent.is_dir():
        raise ValueError(f"path must be in a folder that exists, got {target}")
    state = model.state_dict()
    if absent := next((name for name, tensor in state.items() if tensor.is_meta), None):
        raise ValueError(f"model must hold weights, but its {absent} is on the meta device")
    if format == "diffusers":
        _save_diffusers(model.config, state, target, allow_inexact)
        return
    if format == "official" and not allow_inexact:
        changes = diffusers.inexact_changes(model.config, _OFFICIAL_CONSTANTS)
        _refuse_inexact(changes, f"{target}: an official state dict")
    state = _own_storage(state)
    with replacing(target) as temporary:
        if format == "official":
            torch.save(state, temporary)
        else:
            metadata = {"format": "pt", _METADATA_KEY: json.dumps(model.config.to_dict())}
            safetensors.torch.save_file(state, temporary, metadata=metadata)


def convert(
    source: PathLike,
    destination: PathLike,
    *,
    to: Format | None = None,
    allow_inexact: bool = False,
    **load_options: Any,
) -> DiTConfig:
    """Loads ``source`` and saves it to ``destination``; returns the configuration.

    Args:
        source, destination: as in :func:`load_checkpoint` and :func:`save_checkpoint`.
        to, allow_inexact: as in :func:`save_checkpoint`.
        **load_options: passed on to :func:`load_checkpoint`.

    Raises:
        As these two.
    """
    _format(Path(os.path.realpath(destination)), to)  # a wrong suffix is refused before the load
    model = load_checkpoint(source, **load_options)
    save_checkpoint(model, destination, to=to, allow_inexact=allow_inexact)
    return model.config


def _read(path: Path, weights: str) -> tuple[dict[str, Tensor], DiTConfig | None, str, int | None]:
    """The weights under official names, the configuration where it is stored, the source, the recorded class count."""
    loaded = files.read(path, weights)
    tensors, source = loaded.tensors, loaded.source
    if loaded.config_file is not None:
        config = diffusers.read_config(loaded.config_file)
        tensors = diffusers.tensors_from_diffusers(tensors, config, _expected(config, tensors, source), source)
        return tensors, config, source, None
    if _METADATA_KEY not in loaded.metadata:
        return tensors, None, source, loaded.recorded_classes
    try:
        return tensors, DiTConfig.from_dict(json.loads(loaded.metadata[_METADATA_KEY])), source, None
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: metadata {_METADATA_KEY!r} is no DiTConfig in JSON: {error}"
        ) from error


def _requested_latent_size(image_size: Size | None, latent_size: Size | None) -> tuple[int, int] | None:
    if image_size is not None and latent_size is not None:
        raise TypeError("give image_size or latent_size, not both")
    size, name, unit = (
        (latent_size, "latent_size", 1) if image_size is None else (image_size, "image_size", VAE_FACTOR)
    )
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(item, int) and item > 0 and item % unit == 0 for item in pair):
        raise ValueError(
            f"{name} must be an int or (height, width), positive multiples of {unit}, got {size!r}"
        )
    return pair[0] // unit, pair[1] // unit


def _check_equal(values: Mapping[str, Any], expected: Mapping[str, Any], source: str) -> None:
    wrong = [f"{key}={values[key]} (wanted {value})" for key, value in expected.items() if values[key] != value]
    if wrong:
        raise CheckpointError(f"{source}: the file holds a model of {', '.join(wrong)}")


def _expected(config: DiTConfig, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The state dict of the configuration's model, on the meta device."""
    if config.depth > len(tensors):
        raise CheckpointError(
            f"{source}: the configuration has {config.depth} blocks, the file {len(tensors)} tensors"
        )
    if config.num_tokens > _MAX_TOKENS:
        raise CheckpointError(f"{source}: the configuration has {config.num_tokens} tokens, at most {_MAX_TOKENS} fit")
    try:
        with torch.device("meta"):
            return ReferenceDiT(config).state_dict()
    except RuntimeError as error:  # sizes past what a tensor can have
        raise CheckpointError(f"{source}: no model has the configuration's sizes: {error}") from error


def _resize_label_table(table: Tensor, old: DiTConfig, new: DiTConfig) -> Tensor:
    resized = torch.empty(new.num_embeddings, table.shape[1], dtype=table.dtype).normal_(std=0.02)
    common = min(old.num_classes, new.num_classes)
    resized[:common] = table[:common]
    if old.null_class is not None:
        resized[-1] = table[-1]
    return resized


def _format(path: Path, to: Format | None) -> Format:
    if to is not None and to not in get_args(Format):
        raise ValueError(f"to must be one of {', '.join(get_args(Format))}, got {to!r}")
    implied = "diffusers" if path.is_dir() else _SUFFIXES.get(path.suffix.lower())
    if to is None and implied is None:
        raise ValueError(
            f"to must be given where the suffix does not imply it ({', '.join(_SUFFIXES)}), got {path}"
        )
    if to is not None and path.suffix.lower() in _SUFFIXES and path.suffix and implied != to:
        raise ValueError(f"path must have a suffix of the format {to!r}, got {path}")
    return to or implied  # type: ignore[return-value]


def _refuse_inexact(changes: list[str], target: str) -> None:
    if changes:
        raise CheckpointError(
            f"{target} cannot say what this model computes: its readers hard-code other constants. "
            f"{', '.join(changes)}. allow_inexact=True (--allow-inexact) writes it all the same"
        )


def _save_diffusers(
    config: DiTConfig, state: Mapping[str, Tensor], folder: Path, allow_inexact: bool
) -> None:
    try:
        values = diffusers.config_to_diffusers(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    changes = diffusers.inexact_changes(config, diffusers.CONSTANTS)
    if not is_position_table(state["pos_embed"], config.grid_size):
        changes.append("pos_embed becomes the sine-cosine table")
    if not allow_inexact:
        _refuse_inexact(changes, f"{folder}: diffusers' DiTTransformer2DModel")
    tensors = _own_storage(diffusers.tensors_to_diffusers(state, config.depth))
    created = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        # both are complete before either is renamed; the config goes last
        with (
            replacing(folder / diffusers.CONFIG_FILE) as config_file,
            replacing(folder / diffusers.WEIGHTS_FILE) as weights_file,
        ):
            config_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            safetensors.torch.save_file(tensors, weights_file, metadata={"format": "pt"})
    except BaseException:
        if created and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _own_storage(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with its own storage: writers store shared ones whole, or refuse them."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result
