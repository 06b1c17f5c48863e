"""Infers a model's configuration from the tensors of a file, and checks that none is missing.

``source`` names the file (and the entry in it) in every message.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import MODELS, Conditioning, DiTConfig
from ..reference import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_SHOWN = 5


class CheckpointError(ValueError):
    """A checkpoint that is unreadable, does not fit, or cannot hold the model; names file and tensor."""


def some(names: Sequence[str]) -> str:
    """Up to five of the names, for a message."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, model: str
) -> None:
    """Refuses missing, unexpected and misshapen tensors: up to five of each by name, and their number."""
    missing = [f"{name} {tuple(expected[name].shape)}" for name in expected if name not in tensors]
    unexpected = [f"{name} {tuple(tensors[name].shape)}" for name in tensors if name not in expected]
    wrong = [
        f"{name} {tuple(tensors[name].shape)} (wanted {tuple(tensor.shape)})"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong))
    faults = [f"{len(names)} {kind}: {some(names)}" for kind, names in kinds if names]
    if faults:
        raise CheckpointError(f"{source}: the tensors are not those of {model}; {'; '.join(faults)}")


def common_dtype(tensors: Mapping[str, Tensor], source: str) -> torch.dtype:
    """The one dtype of the parameters. The frozen ``pos_embed``, often kept in fp32, follows the others."""
    examples: dict[torch.dtype, str] = {}
    for name, tensor in tensors.items():
        if name != "pos_embed":
            examples.setdefault(tensor.dtype, name)
    if len(examples) > 1:
        listed = ", ".join(f"{dtype} ({name})" for dtype, name in examples.items())
        raise CheckpointError(
            f"{source}: the parameters have several dtypes: {listed}; give dtype= to choose one"
        )
    return next(iter(examples))


def check_model_name(values: Mapping[str, Any], model: str | None, source: str) -> None:
    """Refuses sizes that are not those of the named model."""
    if model is None:
        return
    expected = DiTConfig.named(model)
    keys = ("depth", "hidden_size", "patch_size", "mlp_ratio", "num_heads")
    wrong = [key for key in keys if key in values and values[key] != getattr(expected, key)]
    if wrong:
        listed = ", ".join(f"{key}={values[key]} (wanted {getattr(expected, key)})" for key in wrong)
        raise CheckpointError(f"{source}: wanted {model}, but the file holds another model: {listed}")


def infer_config(
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    model: str | None = None,
    num_heads: int | None = None,
    latent_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    recorded_classes: int | None = None,
) -> DiTConfig:
    """The configuration of an official state dict, from its names and shapes.

    The number of heads is taken from the named models (by depth and width) or from qk-norm's width; the grid
    from the sine-cosine table that ``pos_embed`` is. The label table's last row is taken for the null class, unless
    ``recorded_classes``, of the file, says that there is none; ``num_classes``, of the caller, may confirm it.

    Warns:
        UserWarning: the label table looks as if it had no row for the null class, and nothing says so.
    """
    width, channels, patch, columns = _shape(tensors, "x_embedder.proj.weight", 4, source)
    if patch != columns:
        raise CheckpointError(
            f"{source}: tensor 'x_embedder.proj.weight' must be square, got {patch}x{columns}"
        )
    outputs = _shape(tensors, "final_layer.linear.weight", 2, source)[0]
    if outputs not in (patch**2 * channels, 2 * patch**2 * channels):
        raise CheckpointError(
            f"{source}: tensor 'final_layer.linear.weight' must have {patch**2 * channels} rows "
            f"(patch_size^2 * channels), or twice as many with learn_sigma, got {outputs}"
        )
    hidden = _shape(tensors, "blocks.0.mlp.fc1.weight", 2, source)[0]
    sizes: dict[str, Any] = {
        "depth": _depth(tensors, source),
        "hidden_size": width,
        "patch_size": patch,
        "mlp_ratio": _ratio(hidden, width),
    }
    check_model_name(sizes, model, source)
    qk_norm = "blocks.0.attn.q_norm.weight" in tensors
    if num_heads is None and qk_norm:
        num_heads = width // max(1, _shape(tensors, "blocks.0.attn.q_norm.weight", 1, source)[0])
    if num_heads is None:
        heads = {(named.depth, named.hidden_size): named.num_heads for named in MODELS.values()}
        num_heads = heads.get((sizes["depth"], width))
    if num_heads is None:
        raise CheckpointError(
            f"{source}: depth {sizes['depth']} with width {width} is no named model, and the tensors do not "
            "show the number of heads; give num_heads= or config="
        )
    rows = _shape(tensors, "y_embedder.embedding_table.weight", 2, source)[0]
    try:
        return DiTConfig(
            **sizes,
            num_heads=num_heads,
            in_channels=channels,
            **_classes(rows, num_classes, recorded_classes, source),
            learn_sigma=outputs == 2 * patch**2 * channels,
            latent_size=_latent_size(tensors, patch, latent_size, source),
            conditioning=_conditioning(tensors, width, source),
            qk_norm=qk_norm,
            frequency_embedding_size=_shape(tensors, "t_embedder.mlp.0.weight", 2, source)[1],
        )
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: the tensors are not those of a DiT: {error}") from error


def find_grids(pos_embed: Tensor) -> list[tuple[int, int]]:
    """Every grid (rows, columns) whose sine-cosine table ``pos_embed`` (1, T, D) is, up to rounding."""
    tokens = pos_embed.shape[1]
    rows = [divisor for divisor in range(1, tokens + 1) if tokens % divisor == 0]
    return [(r, tokens // r) for r in rows if is_position_table(pos_embed, (r, tokens // r))]


def is_position_table(pos_embed: Tensor, grid_size: tuple[int, int]) -> bool:
    """Whether ``pos_embed`` (1, T, D) is the sine-cosine table of the grid, up to its dtype's rounding."""
    if pos_embed.ndim != 3 or pos_embed.shape[1] != math.prod(grid_size) or pos_embed.shape[2] % 4:
        return False
    table = ops.sincos_position_table(pos_embed.shape[2], *grid_size)
    # entries are at most 1; some tables are made with angles in fp32, whose error grows with the coordinate
    rounding = torch.finfo(pos_embed.dtype).eps + torch.finfo(torch.float32).eps * max(grid_size)
    return bool((pos_embed[0].detach().double().cpu() - table).abs().max() <= rounding)


def check_grid(pos_embed: Tensor, config: DiTConfig, source: str) -> None:
    """Refuses a ``pos_embed`` that is the table of another grid than the config's; other tables pass."""
    if is_position_table(pos_embed, config.grid_size):
        return
    if grids := find_grids(pos_embed):
        raise CheckpointError(
            f"{source}: tensor 'pos_embed' is the table of a grid of {_grids(grids)} patches, wanted "
            f"{_grids([config.grid_size])} (latent_size {config.latent_hw})"
        )


def _latent_size(
    tensors: Mapping[str, Tensor], patch: int, latent_size: tuple[int, int] | None, source: str
) -> tuple[int, int]:
    tokens = _shape(tensors, "pos_embed", 3, source)[1]
    if latent_size is not None:
        if (latent_size[0] // patch) * (latent_size[1] // patch) != tokens:
            raise CheckpointError(
                f"{source}: tensor 'pos_embed' holds {tokens} positions; latent_size {latent_size} in "
                f"patches of {patch} wants {(latent_size[0] // patch) * (latent_size[1] // patch)}"
            )
        return latent_size
    grids = find_grids(tensors["pos_embed"])
    if len(grids) != 1:
        fit = (
            f"the sine-cosine table of several grids ({_grids(grids)})"
            if grids
            else "no grid's sine-cosine table"
        )
        raise CheckpointError(
            f"{source}: tensor 'pos_embed' holds {tokens} positions and is {fit}, so the grid is not known; "
            "give latent_size= or image_size="
        )
    return grids[0][0] * patch, grids[0][1] * patch


def _conditioning(tensors: Mapping[str, Tensor], width: int, source: str) -> Conditioning:
    name = "blocks.0.adaLN_modulation.1.weight"
    if "blocks.0.cross_attn.q.weight" in tensors:
        return "cross_attention"
    if "blocks.0.norm1.weight" in tensors and name not in tensors:
        return "in_context"
    rows = _shape(tensors, name, 2, source)[0]
    if rows not in (4 * width, 6 * width):
        raise CheckpointError(
            f"{source}: tensor {name!r} must have {6 * width} rows (adaln_zero) or {4 * width} (adaln), "
            f"got {rows}"
        )
    return "adaln_zero" if rows == 6 * width else "adaln"


def _classes(rows: int, confirmed: int | None, recorded: int | None, source: str) -> dict[str, Any]:
    """How many classes a label table of so many rows has, and its label dropout where that is not the usual one."""
    if recorded == rows:
        return {"num_classes": rows, "class_dropout_prob": 0.0}
    # data sets have a round number of classes, and their tables with the null class one more: 10, 100, 365, 1000
    suspicious = rows % 10 == 0 or rows == 365 or recorded is not None
    if suspicious and rows - 1 not in (recorded, confirmed):
        clause = "nothing says" if recorded is None else f"its args, with num_classes={recorded}, do not say"
        warnings.warn(
            f"{source}: the label table has {rows} rows, and {clause} whether the last is the null class: taken for "
            f"{rows - 1} classes and the null class. The data's number of classes tells: if it is {rows}, there is "
            f"none, and config= must be given, with num_classes={rows} and class_dropout_prob=0; num_classes="
            f"{rows - 1} confirms what was taken",
            stacklevel=4,
        )
    return {"num_classes": rows - 1}


def _depth(tensors: Mapping[str, Tensor], source: str) -> int:
    blocks = sorted({int(match[1]) for match in map(_BLOCK.match, tensors) if match})
    # not the largest index: a file must not be able to ask for a billion blocks
    if blocks != list(range(len(blocks))):
        gap = next(index for index, block in enumerate(blocks) if index != block)
        raise CheckpointError(
            f"{source}: tensors 'blocks.{gap}.*' are missing; wanted blocks 0 to {blocks[-1]}"
        )
    return len(blocks)


def _ratio(hidden: int, width: int) -> float:
    ratio = hidden / max(1, width)
    # the config truncates hidden_size * mlp_ratio, so a quotient rounded down would lose a row
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _shape(tensors: Mapping[str, Tensor], name: str, ndim: int, source: str) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(
            f"{source}: tensor {name!r} is missing; wanted a DiT's state dict with the official names, "
            f"got {len(tensors)} tensors: {some(list(tensors))}"
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim or not all(shape):
        raise CheckpointError(
            f"{source}: tensor {name!r} must have {ndim} non-empty dimensions, got shape {shape}"
        )
    return shape


def _grids(grids: list[tuple[int, int]]) -> str:
    return ", ".join(f"{rows}x{columns}" for rows, columns in grids)
