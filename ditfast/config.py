"""DiTConfig: everything that determines a DiT's shape and arithmetic, and the 12 named models as data.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", table 1 and section 3.2.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

Conditioning = Literal["in_context", "cross_attention", "adaln", "adaln_zero"]
CONDITIONINGS: tuple[str, ...] = get_args(Conditioning)

VAE_FACTOR = 8  # the Stable Diffusion autoencoder maps 8x8 pixels to one latent position

_POSITIVE_INTS = ("depth", "hidden_size", "num_heads", "patch_size", "in_channels", "num_classes")
_BOOLS = ("learn_sigma", "qk_norm")
_EPSILONS = ("norm1_eps", "norm2_eps", "norm_final_eps")
_NUMBERS = ("mlp_ratio", "class_dropout_prob", "timestep_freq_shift", *_EPSILONS)


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The configuration of a DiT. Defaults are the official DiT-XL/2 at 256 px.

    Attributes:
        depth: number of transformer blocks.
        hidden_size: width D of the residual stream; a multiple of 4 and of ``num_heads``.
        num_heads: attention heads H; the head dim is D / H.
        patch_size: side p of a patch, in latent positions.
        mlp_ratio: hidden width of the MLP over D.
        in_channels: channels of the latent.
        num_classes: classes, without the null class.
        class_dropout_prob: probability of replacing a label by the null class in training; the null
            class has a row in the label table only where this is above 0.
        learn_sigma: predict a variance beside the noise, which doubles the output channels.
        latent_size: latent (height, width); an int means a square. Always stored as a tuple.
        conditioning: the block design (paper, section 3.2).
        qk_norm: LayerNorm over the head dim on queries and keys, as in timm's Attention.
        norm1_eps, norm2_eps, norm_final_eps: epsilons of a block's two norms and of the final one
            (diffusers uses 1e-5 for the second).
        timestep_freq_shift: the timestep sinusoid's frequencies divide by ``128 - shift``
            (0 officially, 1 in diffusers).
        frequency_embedding_size: width of the timestep sinusoid.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field's value is out of range or does not fit another field.
    """

    depth: int = 28
    hidden_size: int = 1152
    num_heads: int = 16
    patch_size: int = 2
    mlp_ratio: float = 4.0
    in_channels: int = 4
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    latent_size: int | tuple[int, int] = (32, 32)
    conditioning: Conditioning = "adaln_zero"
    qk_norm: bool = False
    norm1_eps: float = 1e-6
    norm2_eps: float = 1e-6
    norm_final_eps: float = 1e-6
    timestep_freq_shift: float = 0.0
    frequency_embedding_size: int = 256

    def __post_init__(self) -> None:
        for name in (*_POSITIVE_INTS, "frequency_embedding_size"):
            _check_positive_int(name, getattr(self, name))
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        object.__setattr__(self, "latent_size", _pair("latent_size", self.latent_size))

        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, got {self.conditioning!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads={self.num_heads}, got {self.hidden_size}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4 (2-D sine-cosine table), got {self.hidden_size}")
        if self.frequency_embedding_size % 2:
            raise ValueError(f"frequency_embedding_size must be even, got {self.frequency_embedding_size}")
        for axis, size in zip(("height", "width"), self.latent_hw, strict=True):
            if size % self.patch_size:
                raise ValueError(f"latent_size {axis} must be a multiple of patch_size={self.patch_size}, got {size}")
        if not 0.0 <= self.class_dropout_prob < 1.0:
            raise ValueError(f"class_dropout_prob must be in [0, 1), got {self.class_dropout_prob}")
        for name in _EPSILONS:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        half = self.frequency_embedding_size // 2
        if not 0 <= self.timestep_freq_shift < half:
            raise ValueError(f"timestep_freq_shift must be in [0, {half}), got {self.timestep_freq_shift}")
        if not self.mlp_ratio > 0 or self.mlp_hidden_size < 1:
            raise ValueError(f"mlp_ratio must give a hidden width of at least 1, got {self.mlp_ratio}")

    @classmethod
    def named(
        cls,
        name: str,
        image_size: int | tuple[int, int] | None = None,
        **overrides: Any,
    ) -> DiTConfig:
        """The configuration of a named model, e.g. ``DiTConfig.named("DiT-XL/2", image_size=512)``.

        Args:
            name: one of ``ditfast.MODELS``.
            image_size: pixels, an int or (height, width); 256 by default. ``latent_size`` may be
                given instead.
            **overrides: any other field of the configuration.

        Raises:
            ValueError: unknown name, or an image size that is no multiple of 8 * patch_size.
            TypeError: unknown field, or both image_size and latent_size.
        """
        if name not in MODELS:
            close = difflib.get_close_matches(str(name), MODELS, n=1, cutoff=0.0)
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}; did you mean {close[0]!r}?")
        if image_size is not None:
            if "latent_size" in overrides:
                raise TypeError("give image_size or latent_size, not both")
            patch_size = overrides.get("patch_size", MODELS[name].patch_size)
            height, width = _pair("image_size", image_size)
            for axis, size in (("height", height), ("width", width)):
                if size % (VAE_FACTOR * patch_size):
                    raise ValueError(
                        f"image_size {axis} must be a multiple of {VAE_FACTOR} * patch_size={patch_size}, got {size}"
                    )
            overrides["latent_size"] = (height // VAE_FACTOR, width // VAE_FACTOR)
        _check_fields(overrides)
        return replace(MODELS[name], **overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiTConfig:
        """The inverse of :meth:`to_dict`; unknown keys are a TypeError."""
        _check_fields(values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON-ready values."""
        return {**asdict(self), "latent_size": list(self.latent_hw)}

    @property
    def name(self) -> str:
        """The model's name in ``ditfast.MODELS``, or a description where it has none."""
        for name, model in MODELS.items():
            if all(getattr(self, key) == getattr(model, key) for key in (*_POSITIVE_INTS[:4], "mlp_ratio")):
                return name
        return f"DiT({self.depth} x {self.hidden_size}, {self.num_heads} heads)/{self.patch_size}"

    @property
    def latent_hw(self) -> tuple[int, int]:
        """Latent (height, width)."""
        return cast("tuple[int, int]", self.latent_size)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_size(self) -> int:
        """Hidden width F of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches (rows, columns)."""
        return self.latent_hw[0] // self.patch_size, self.latent_hw[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def null_class(self) -> int | None:
        """The label of the null class, or None where the label table has no row for it."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    @property
    def num_embeddings(self) -> int:
        """Rows of the label table."""
        return self.num_classes + (self.null_class is not None)


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _pair(name: str, value: object) -> tuple[int, int]:
    """(height, width) from an int or a pair."""
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be an int or a pair (height, width), got {value!r}")
    for item in pair:
        _check_positive_int(name, item)
    return int(pair[0]), int(pair[1])


def _check_fields(values: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(DiTConfig)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; fields are {', '.join(known)}"
            raise TypeError(f"DiTConfig has no field {key!r}{hint}")


# name: depth, hidden_size, num_heads
_SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}

#: The paper's 12 models at 256 px, by name.
MODELS: Mapping[str, DiTConfig] = MappingProxyType(
    {
        f"DiT-{size}/{patch_size}": DiTConfig(
            depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size
        )
        for size, (depth, hidden_size, num_heads) in _SIZES.items()
        for patch_size in (2, 4, 8)
    }
)
