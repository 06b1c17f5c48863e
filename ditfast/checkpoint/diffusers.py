"""diffusers' ``DiTTransformer2DModel``: its folder, its names, and the constants it hard-codes.

It is adaLN-Zero on a square grid with an MLP of ratio 4, a null class, no qk-norm, a 256-wide sinusoid with
frequency shift 1 and eps 1e-6 in the first and the final norm; its ``norm_eps`` is the second norm's. The
time and label embedders are repeated in every block, the queries, keys and values are apart, and
``pos_embed`` is not stored. Nothing here needs diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..config import DiTConfig
from ..reference import ops
from .infer import CheckpointError, check_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

#: What the class hard-codes, by the config's field.
CONSTANTS: Mapping[str, float] = MappingProxyType(
    {"norm1_eps": 1e-6, "norm_final_eps": 1e-6, "timestep_freq_shift": 1.0}
)

_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# once in the official names, in every block here
_SHARED = {
    "t_embedder.mlp.0.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "norm1.emb.class_embedder.embedding_table.weight",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")

# the class's own defaults for fields that config.json may leave out; norm_eps came later than the first files
_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
# DiT's class before diffusers 0.28 served other models too, with other defaults
CLASSES: Mapping[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {},
    "Transformer2DModel": {
        "attention_bias": False,
        "activation_fn": "geglu",
        "norm_type": "layer_norm",
        "norm_elementwise_affine": True,
    },
}
_REQUIRED = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}


def config_from_diffusers(values: Mapping[str, Any], source: str) -> DiTConfig:
    """The configuration that computes what ``DiTTransformer2DModel`` computes under this ``config.json``.

    The label dropout is the class's fixed 0.1. In training the class draws it anew in every block; here it is
    drawn once a sample, as in the paper.
    """
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise CheckpointError(f"{source}: _class_name must be one of {', '.join(CLASSES)}, got {name!r}")
    fields = {**_DEFAULTS, **CLASSES[name], **values}
    for key, wanted in _REQUIRED.items():
        if fields[key] != wanted:
            raise CheckpointError(f"{source}: {key} must be {wanted!r} for a DiT, got {fields[key]!r}")
    channels, outputs = fields["in_channels"], fields["out_channels"]
    if outputs is not None and outputs not in (channels, 2 * channels):
        raise CheckpointError(
            f"{source}: out_channels must be in_channels={channels} or twice that, got {outputs}"
        )
    try:
        return DiTConfig(
            depth=fields["num_layers"],
            hidden_size=fields["num_attention_heads"] * fields["attention_head_dim"],
            num_heads=fields["num_attention_heads"],
            patch_size=fields["patch_size"],
            in_channels=channels,
            num_classes=fields["num_embeds_ada_norm"],
            class_dropout_prob=0.1,
            learn_sigma=outputs == 2 * channels,
            latent_size=fields["sample_size"],
            norm2_eps=fields["norm_eps"],
            norm1_eps=CONSTANTS["norm1_eps"],
            norm_final_eps=CONSTANTS["norm_final_eps"],
            timestep_freq_shift=CONSTANTS["timestep_freq_shift"],
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: not the configuration of a DiT: {error}") from error


def config_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """The ``config.json`` of a model; the constants that the class hard-codes are the caller's concern.

    Raises:
        CheckpointError: the class has no such model at all.
    """
    height, width = config.latent_hw
    faults = [
        (config.conditioning != "adaln_zero", f"conditioning={config.conditioning!r} (only adaln_zero)"),
        (config.qk_norm, "qk_norm"),
        (height != width, f"latent_size={config.latent_hw} (only squares)"),
        (
            config.mlp_hidden_size != 4 * config.hidden_size,
            f"mlp_ratio={config.mlp_ratio} (only 4)",
        ),
        (config.null_class is None, "class_dropout_prob=0 (it always has a row for the null class)"),
        (
            config.frequency_embedding_size != 256,
            f"frequency_embedding_size={config.frequency_embedding_size}",
        ),
    ]
    if reasons := [fault for present, fault in faults if present]:
        raise CheckpointError(f"diffusers' DiTTransformer2DModel cannot hold this model: {', '.join(reasons)}")
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.head_dim,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": config.norm2_eps,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": height,
        "upcast_attention": False,
    }


def tensors_to_diffusers(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Official names to diffusers'. Views where possible: repeated entries share their storage."""
    result: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for ours, theirs in _TOP.items():
            result[f"{theirs}.{kind}"] = tensors[f"{ours}.{kind}"]
    for index in range(depth):
        block = f"transformer_blocks.{index}"
        for ours, theirs in _SHARED.items():
            result[f"{block}.{theirs}"] = tensors[ours]
        for kind in ("weight", "bias"):
            for ours, theirs in _BLOCK.items():
                result[f"{block}.{theirs}.{kind}"] = tensors[f"blocks.{index}.{ours}.{kind}"]
            for theirs, part in zip(_QKV, tensors[f"blocks.{index}.attn.qkv.{kind}"].chunk(3), strict=True):
                result[f"{block}.{theirs}.{kind}"] = part
    return result


def tensors_from_diffusers(
    tensors: Mapping[str, Tensor], config: DiTConfig, expected: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """diffusers' names to the official ones, ``pos_embed`` computed as the class does: rounded to fp32.

    Args:
        tensors: the folder's weights.
        config: of :func:`config_from_diffusers`.
        expected: the official state dict of the model, for its names and shapes only.
        source: names the file in messages.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors, or embedders that differ between blocks.
    """
    check_tensors(tensors, tensors_to_diffusers(expected, config.depth), source, f"diffusers' {config.name}")
    result: dict[str, Tensor] = {}
    for ours, theirs in _SHARED.items():
        first = result[ours] = tensors[f"transformer_blocks.0.{theirs}"]
        for index in range(1, config.depth):
            name = f"transformer_blocks.{index}.{theirs}"
            if not torch.equal(tensors[name], first):
                raise CheckpointError(
                    f"{source}: tensor {name!r} differs from block 0's; a DiT has one for all blocks"
                )
    for kind in ("weight", "bias"):
        for ours, theirs in _TOP.items():
            result[f"{ours}.{kind}"] = tensors[f"{theirs}.{kind}"]
        for index in range(config.depth):
            block = f"transformer_blocks.{index}"
            for ours, theirs in _BLOCK.items():
                result[f"blocks.{index}.{ours}.{kind}"] = tensors[f"{block}.{theirs}.{kind}"]
            parts = [tensors[f"{block}.{theirs}.{kind}"] for theirs in _QKV]
            result[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
    result["pos_embed"] = (
        ops.sincos_position_table(config.hidden_size, *config.grid_size).float().unsqueeze(0)
    )
    return result


def read_config(path: Path) -> DiTConfig:
    """:func:`config_from_diffusers` of a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, got {type(values).__name__}")
    return config_from_diffusers(values, str(path))


def inexact_changes(config: DiTConfig, constants: Mapping[str, float]) -> list[str]:
    """What a reader with these constants computes otherwise, and by how much."""
    changes = {name: (getattr(config, name), value) for name, value in constants.items()}
    texts = [
        f"{name} becomes {new:g} instead of {old:g}" for name, (old, new) in changes.items() if old != new
    ]
    old, new = changes["timestep_freq_shift"]
    if old != new:
        t = torch.tensor([100, 500, 999])
        ours, theirs = (
            ops.timestep_embedding(t, config.frequency_embedding_size, shift, torch.float64)
            for shift in (old, new)
        )
        errors = (theirs - ours).norm(dim=1) / ours.norm(dim=1)
        listed = ", ".join(
            f"{error:.2f} at t={step}" for error, step in zip(errors.tolist(), t.tolist(), strict=True)
        )
        texts.append(f"which moves the timestep sinusoid by a relative L2 distance of {listed}")
    return texts
