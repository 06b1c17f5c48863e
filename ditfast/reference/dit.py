"""The reference DiT: the paper's model with its four block designs, in plain PyTorch.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023), section 3.2 and figure 3.
State-dict names are those of the official release. This file is the specification: the fast model is these
modules with another forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DiTConfig
from . import ops

_COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ROUNDED = (
    "t is bfloat16, which keeps 8 bits: timestep 999 has become 1000, and changes the output by several per cent; "
    "keep t in int64 or float32, whatever the model's dtype"
)


def input_dtype(module: nn.Module, layer: object, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of the input of a module that begins with this layer: that of the layer's weight.

    ``otherwise``, the model's, for quantised and float8 weights, for a layer without a weight, and where anything in
    the module has another forward or hooks before its own, which may cast the weight.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in _COMPUTED:
        return otherwise
    changed = any("forward" in part.__dict__ or part._forward_pre_hooks for part in module.modules())
    return otherwise if changed else weight.dtype


class PatchEmbed(nn.Module):
    """Latent (B, C, h, w) -> tokens (B, T, D): a p x p convolution of stride p."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(x)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) -> (B, D): a sinusoid, then Linear-SiLU-Linear."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.frequency_embedding_size = config.frequency_embedding_size
        self.freq_shift = config.timestep_freq_shift
        self.mlp = nn.Sequential(
            nn.Linear(config.frequency_embedding_size, config.hidden_size),
            nn.SiLU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def forward(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``dtype``: the model's, for a first Linear whose weight does not say what it computes in; by default that of
        the parameters here."""
        dtype = self.input_dtype(t, dtype)
        sinusoid = ops.timestep_embedding(t, self.frequency_embedding_size, self.freq_shift, dtype)
        return cast(Tensor, self.mlp(sinusoid.to(dtype)))

    def input_dtype(self, t: Tensor, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype in which the first Linear gets the sinusoid of t."""
        if getattr(t, "dtype", None) == torch.bfloat16 and not torch.compiler.is_compiling():
            warnings.warn(_ROUNDED, stacklevel=1)
        if dtype is None:
            stored = [parameter.dtype for parameter in self.parameters() if parameter.dtype in _COMPUTED]
            dtype = stored[0] if stored else torch.get_default_dtype()
        return input_dtype(self.mlp, self.mlp[0], dtype)


class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B, D). In training, labels are dropped to the null class with ``dropout_prob``."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_embeddings, config.hidden_size)
        self.null_class = config.null_class
        self.dropout_prob = config.class_dropout_prob

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.null_class is not None:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.null_class, y)
        return cast(Tensor, self.embedding_table(y))


class Attention(nn.Module):
    """Multi-head self-attention on (B, T, D) with one packed qkv projection."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        # timm's qk-norm, as SiT and REPA use it: affine, over the head dim, torch's default epsilon
        self.q_norm: nn.Module = nn.LayerNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = ops.attention(self.q_norm(q), self.k_norm(k), v)
        return cast(Tensor, self.proj(ops.merge_heads(out)))


class CrossAttention(nn.Module):
    """Multi-head attention of the tokens (B, T, D) to the conditioning sequence (B, 2, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.q, self.k, self.v, self.proj = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(y.shape[0], y.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

        out = ops.attention(heads(self.q(x)), heads(self.k(context)), heads(self.v(context)))
        return cast(Tensor, self.proj(ops.merge_heads(out)))


class Mlp(nn.Module):
    """Linear, tanh GELU, Linear."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden_size)
        self.fc2 = nn.Linear(config.mlp_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class InContextBlock(nn.Module):
    """A plain ViT block; t and the class are two more tokens of the sequence."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm1_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm2_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class CrossAttentionBlock(nn.Module):
    """Self-attention, cross-attention to the sequence [t, class], MLP.

    The paper's parameter count (598.1 M at XL/2) leaves room for the biases of the cross-attention or for
    affine norms, not for both; the norms have no parameters here, as in the adaLN blocks.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, elementwise_affine=False, eps=config.norm1_eps)
        self.attn = Attention(config)
        self.norm_cross = nn.LayerNorm(config.hidden_size, elementwise_affine=False, eps=config.norm1_eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, elementwise_affine=False, eps=config.norm2_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), context)
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class AdaLNBlock(nn.Module):
    """adaLN: shift and scale of both norms are regressed from c (B, D)."""

    modulations = 4

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, elementwise_affine=False, eps=config.norm1_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, elementwise_affine=False, eps=config.norm2_eps)
        self.mlp = Mlp(config)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.hidden_size, self.modulations * config.hidden_size)
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).chunk(4, dim=-1)
        x = x + self.attn(ops.layer_norm_modulate(x, shift1, scale1, self.norm1.eps))
        return cast(Tensor, x + self.mlp(ops.layer_norm_modulate(x, shift2, scale2, self.norm2.eps)))


class AdaLNZeroBlock(AdaLNBlock):
    """adaLN-Zero: adds a gate before each residual; at initialisation the block is the identity."""

    modulations = 6

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        branch = self.attn(ops.layer_norm_modulate(x, shift1, scale1, self.norm1.eps))
        x = ops.gated_residual(x, branch, gate1)
        branch = self.mlp(ops.layer_norm_modulate(x, shift2, scale2, self.norm2.eps))
        return ops.gated_residual(x, branch, gate2)


class FinalLayer(nn.Module):
    """Tokens (B, T, D) -> patch vectors (B, T, p * p * C_out): LayerNorm, adaptive or plain, then Linear."""

    def __init__(self, config: DiTConfig, adaptive: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=config.norm_final_eps)
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)) if adaptive else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.adaLN_modulation is None:
            return cast(Tensor, self.linear(self.norm_final(x)))
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return cast(Tensor, self.linear(ops.layer_norm_modulate(x, shift, scale, self.norm_final.eps)))


_BLOCKS: dict[str, Callable[[DiTConfig], nn.Module]] = {
    "in_context": InContextBlock,
    "cross_attention": CrossAttentionBlock,
    "adaln": AdaLNBlock,
    "adaln_zero": AdaLNZeroBlock,
}


class DiT(nn.Module):
    """Diffusion transformer over latents.

    Args:
        config: sizes, block design and numeric constants.
    """

    _embedders: tuple[type[nn.Module], ...] = (TimestepEmbedder,)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        if not isinstance(config, DiTConfig):
            raise TypeError(f"config must be a DiTConfig, got {type(config).__name__}; see DiTConfig.named")
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, config.hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(_BLOCKS[config.conditioning](config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, adaptive=config.conditioning in ("adaln", "adaln_zero"))
        self.initialize_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The predicted noise, and variance where ``learn_sigma``.

        Args:
            x: latents (B, C, height, width) of ``config.latent_size``, any floating dtype.
            t: timesteps (B,), int or float; bf16, which rounds them, is warned of.
            y: labels (B,), int32 or int64; ``config.null_class`` is the null class. A label outside the table
                is torch's IndexError on the CPU; a GPU's kernels answer it with an assertion or with NaN.

        Returns:
            (B, C_out, height, width) in the model's dtype.

        Raises:
            TypeError, ValueError: an input's dtype or shape does not fit, naming the argument.
        """
        self._check_inputs(x, t, y)
        x, c, context = self._embed(x, t, y)
        for block in self.blocks:
            x = block(x, context)
        # the appended tokens of the in-context design are dropped here
        x = self.final_layer(x[:, : self.config.num_tokens], c)
        return ops.unpatchify(x, self.config.patch_size, self.config.grid_size)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int | Literal["all"] = 3
    ) -> Tensor:
        """Classifier-free guidance as one batch of 2N, with the official release's interface.

        Args:
            x: latents (2N, C, height, width); only the first half is read.
            t: timesteps (2N,).
            y: labels (2N,), the first half conditional and the second the null class; or (N,), to which
                the null class of the config is appended.
            cfg_scale: 1 is no guidance; above, eps_u + cfg_scale * (eps_c - eps_u).
            guided_channels: how many leading latent channels are guided: 3 as in the official release (or
                fewer where the latent has fewer), or "all" of the noise prediction, as in diffusers. The variance
                is never guided.

        Returns:
            (2N, C_out, height, width); both halves hold the guided channels.

        Raises:
            TypeError, ValueError: as :meth:`forward`; an odd batch; no null class in the config.
        """
        channels = self.config.in_channels
        guided = {"all": channels, 3: min(3, channels)}.get(guided_channels, guided_channels)
        if isinstance(guided, bool) or not isinstance(guided, int) or not 1 <= guided <= channels:
            raise ValueError(f'guided_channels must be "all" or in 1..{channels}, got {guided_channels!r}')
        if x.ndim != 4 or x.shape[0] % 2:
            raise ValueError(f"x must be a batch of 2N latents (2N, C, height, width), got shape {tuple(x.shape)}")
        half = x.shape[0] // 2
        if y.shape == (half,) and half:
            if self.config.null_class is None:
                raise ValueError("guidance needs a null class; this config has class_dropout_prob=0 and no row for it")
            y = torch.cat([y, torch.full_like(y, self.config.null_class)])
        output = self.forward(torch.cat([x[:half], x[:half]]), t, y)
        return ops.guide(output, cfg_scale, guided)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        shape = (self.config.in_channels, *self.config.latent_hw)
        for name, value in (("x", x), ("t", t), ("y", y)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"x must have a floating dtype, got {x.dtype}")
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape ({x.shape[0]},), got {tuple(t.shape)}")
        if y.shape != x.shape[:1]:
            raise ValueError(f"y must have shape ({x.shape[0]},), got {tuple(y.shape)}")
        if y.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"y must be int64 or int32 labels, got {y.dtype}")

    def _embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, c, and what the blocks are conditioned on: c, or the length-2 sequence [t, class]."""
        x = self._tokens(x)
        t_emb, y_emb = self._embedded_times(t), self.y_embedder(y)
        c = t_emb + y_emb
        if self.config.conditioning in ("adaln", "adaln_zero"):
            return x, c, c
        context = torch.stack([t_emb, y_emb], dim=1)
        if self.config.conditioning == "in_context":
            x = torch.cat([x, context.to(x.dtype)], dim=1)
        return x, c, context

    def _tokens(self, x: Tensor) -> Tensor:
        # in this order: a pointwise result has its first operand's memory layout, and the patches' is channels first,
        # which every block would then carry on and every norm would have to copy
        dtype = input_dtype(self.x_embedder, getattr(self.x_embedder, "proj", None), self.pos_embed.dtype)
        return cast(Tensor, self.pos_embed + self.x_embedder(x.to(dtype)))

    def _embedded_times(self, t: Tensor) -> Tensor:
        # a replaced, wrapped or hooked embedder takes t alone
        embedder = self.t_embedder
        plain = type(embedder) in self._embedders and "forward" not in vars(embedder)
        takes_dtype = plain and not embedder._forward_pre_hooks
        return cast(Tensor, embedder(t, self.pos_embed.dtype) if takes_dtype else embedder(t))

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The paper's initialisation: every parameter anew, the position table included."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                # the patch kernel counts as a Linear of its flattened patch
                flat = module.weight.contiguous().flatten(1)
                nn.init.xavier_uniform_(flat)
                if not module.weight.is_contiguous():  # channels_last: flat is a copy
                    module.weight.copy_(flat.view(module.weight.shape))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(cast(Tensor, layer.weight), std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.config.conditioning == "adaln_zero":
            for adaptive in (*self.blocks, self.final_layer):
                nn.init.zeros_(cast(nn.Sequential, adaptive.adaLN_modulation)[1].weight)  # type: ignore[arg-type]
        rows, columns = self.config.grid_size
        table = ops.sincos_position_table(self.config.hidden_size, rows, columns, self.pos_embed.device)
        self.pos_embed.copy_(table.unsqueeze(0))
