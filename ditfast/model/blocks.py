"""The reference's layers with a fused forward, which :class:`ditfast.DiT` is built of.

A gated residual and the norm after it are one operator, also across block borders: a block hands its last branch on
instead of adding it. In training each half of a block is one autograd node (:mod:`ditfast.ops.block`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.adaln import adaln
from ..ops.attention import attention_backend
from ..ops.backend import takes_triton
from ..ops.block import norm_attention, norm_linear, norm_mlp
from ..ops.linear import autocast, takes_gemm, working_dtype
from ..ops.modulations import attached, modulations_of, takes_modulations
from ..plain import are_readable, is_plain
from ..reference import dit as reference
from ..reference.transforms import in_trace

_NORM = "gated_residual_layer_norm_modulate"


def records_gradients() -> bool:
    """Whether autograd records, and not torch.jit.trace, whose check calls a model once more without gradients."""
    return torch.is_grad_enabled() and not in_trace()


def all_modulations(linears: Sequence[nn.Module], c: Tensor) -> Tensor | None:
    """Linear(c) of all side by side (B, sum of N_i), without gradients; c (B, D). See :func:`ditfast.ops.modulations`.

    None where each runs on its own: no kernel runs, or they are no plain Linears of one dtype on c's device.
    """
    if not are_readable(*linears):
        return None
    weights = [cast(Tensor, linear.weight) for linear in linears]
    biases = [cast("Tensor | None", linear.bias) for linear in linears]
    if not takes_modulations(c, weights, biases):
        return None
    return modulations_of(c, weights, biases)


def modulation_of(
    layers: nn.Sequential, c: Tensor | None, activated: bool, ahead: Tensor | None, readable: bool
) -> tuple[Tensor, Tensor | None]:
    """(the modulation of one layer, c for the next).

    Args:
        ahead: the modulation where it was computed ahead; its gradient is needed where c is given too.
        readable: whether the Linear may share a node with what reads c next.
    """
    if ahead is not None and c is None:
        return ahead, None
    c = cast(Tensor, c)
    if not activated:
        return cast(Tensor, layers(c)), c
    linear = cast(nn.Linear, layers[1])
    if ahead is not None or (readable and are_readable(linear) and not torch.compiler.is_compiling()):
        c, weight, bias = autocast(c, linear.weight, linear.bias)
        return attached(c, weight, bias, ahead)
    return linear(c), c


class Pending(NamedTuple):
    """A branch that the next norm's operator adds to the residual stream.

    branch (B, T, D) and gate (B, D), no gate in the adaLN design, neither before the first block. bias (D,), where
    the branch's Linear left its bias's gradient to that operator, which has the sum at hand.
    """

    branch: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None

    def settled(self) -> Pending:
        """The same with the bias's gradient flowing through the branch: an exact zero is added."""
        if self.bias is None or self.branch is None:
            return self
        return Pending(self.branch + (self.bias - self.bias.detach()).to(self.branch.dtype), self.gate)


def promoted(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """A residual stream and what is computed with it, in dtypes that one operator takes, as arithmetic promotes them:
    under autocast a wrapped Linear (LoRA) may give fp32 beside the others' bf16."""
    dtype = others[0].dtype
    if torch.promote_types(x.dtype, dtype) == x.dtype and all(other.dtype == dtype for other in others):
        return x, *others
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return x.to(torch.promote_types(x.dtype, dtype)), *(other.to(dtype) for other in others)


def add_and_norm(x: Tensor, pending: Pending, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds the pending branch: (new x, its modulated norm)."""
    if pending.bias is not None and takes_triton(_NORM, x, x.shape[2], (*pending, shift, scale)):
        return adaln(x, pending.branch, pending.gate, shift, scale, eps, pending.bias)
    branch, gate, _ = pending.settled()
    if branch is not None and gate is not None:
        x, branch, gate, shift, scale = promoted(x, branch, gate, shift, scale)
        return ops.gated_residual_layer_norm_modulate(x, branch, gate, shift, scale, eps)
    if branch is not None:
        x = x + branch
    x, shift, scale = promoted(x, shift, scale)
    return x, ops.layer_norm_modulate(x, shift, scale, eps)


def _norm_and(
    function: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    pending: Pending,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Adds the pending branch, then ``function`` of its modulated norm in the same node: (new x, result)."""
    branch, gate, bias = pending
    if branch is not None and gate is None:
        x, branch, bias = x + branch, None, None
    r, y = function(x, branch, gate, bias, shift, scale, eps, *rest)
    return (x if branch is None else r), y


class FusedTimestepEmbedder(reference.TimestepEmbedder):
    def forward(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = self.input_dtype(t, dtype)
        return cast(Tensor, self.mlp(ops.timestep_embedding(t, self.frequency_embedding_size, self.freq_shift, dtype)))


class FusedLabelEmbedder(reference.LabelEmbedder):
    def forward(self, y: Tensor, t_emb: Tensor, activated: bool) -> Tensor:  # type: ignore[override]
        """The summed embeddings (B, D), through SiLU where ``activated``."""
        table = self.embedding_table
        learns = records_gradients() and any(x.requires_grad for x in (t_emb, *table.parameters()))
        if not activated or self.training or learns or not is_plain(table, nn.Embedding):
            c = t_emb + super().forward(y)
            return F.silu(c) if activated else c
        return ops.conditioning(t_emb, y, table.weight)


class PackedAttention(nn.Module):
    """Mixin: an attention that is proj(self_attention(qkv(x))) while it :meth:`fuses`."""

    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int

    def fuses(self) -> bool:
        """Whether its forward does nothing else at present."""
        raise NotImplementedError

    def softmax_scale(self) -> float | None:
        """Of the logits; None for head_dim ** -0.5."""
        return None

    def fused(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(ops.self_attention(self.qkv(x), self.num_heads, self.softmax_scale())))


class GeluMlp(nn.Module):
    """Mixin: an MLP that is fc2(gelu_tanh(fc1(x))) while it :meth:`fuses`."""

    fc1: nn.Linear
    fc2: nn.Linear

    def fuses(self) -> bool:
        """Whether its forward does nothing else at present, and its Linears may be read as their parameters."""
        return are_readable(self.fc1, self.fc2)

    def fused(self, x: Tensor) -> Tensor:
        return ops.gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class FusedAttention(PackedAttention, reference.Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x) if self.fuses() else super().forward(x)

    def fuses(self) -> bool:
        # normalised queries and keys are no longer packed
        return is_plain(self.q_norm, nn.Identity) and is_plain(self.k_norm, nn.Identity)

    def extra_repr(self) -> str:
        return "" if self.fuses() else "qk_norm: runs the reference's code"


class FusedMlp(GeluMlp, reference.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x) if self.fuses() else super().forward(x)


class AdaLNForward(nn.Module):
    """Mixin: an adaLN or adaLN-Zero block's forward with the residual's last addition left pending.

    In training on the kernels' path each half is one node that saves neither its modulated norm nor the MLP's
    activation (:mod:`ditfast.ops.block`), as long as its Linears are what they were built as.
    """

    modulations: int
    norm1: nn.LayerNorm
    attn: Any  # fused where it is a PackedAttention
    norm2: nn.LayerNorm
    mlp: Any  # fused where it is a GeluMlp
    adaLN_modulation: nn.Sequential

    def fused(
        self,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        bias: Tensor | None,
        c: Tensor | None,
        activated: bool,
        modulation: Tensor | None,
        hands_over: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(x, branch, gate, bias, c) for the next block; see :class:`Pending`.

        Args:
            c: (B, D), through its SiLU where ``activated``.
            modulation: (B, 4D) or (B, 6D) where it was computed ahead; c is given too where it needs its gradient.
            hands_over: whether only the next norm sees the branch, which may then compute its bias's gradient.
        """
        pending = Pending(branch, gate, bias)
        readable = records_gradients() and self._is_readable(x)
        modulation, c = modulation_of(self.adaLN_modulation, c, activated, modulation, readable)
        shift1, scale1, gate1, shift2, scale2, gate2 = self._chunks(modulation)
        norm1, norm2 = (shift1, scale1, self.norm1.eps), (shift2, scale2, self.norm2.eps)
        if not (readable and self._wants_gradient(x, modulation)):
            x, h = add_and_norm(x, pending, *norm1)
            x, h = add_and_norm(x, Pending(self.attn(h), gate1), *norm2)
            return x, self.mlp(h), gate2, None, c
        attn: PackedAttention = self.attn
        proj, fc1, fc2 = attn.proj, self.mlp.fc1, self.mlp.fc2
        qkv = autocast(attn.qkv.weight, attn.qkv.bias)
        num_heads, scale = attn.num_heads, attn.softmax_scale()
        head_dim = attn.qkv.out_features // (3 * num_heads)
        if attention_backend(modulation, x.shape[1], head_dim, training=True) == "triton":
            scale = head_dim**-0.5 if scale is None else scale
            x, out = _norm_and(norm_attention, x, pending, *norm1, *qkv, num_heads, scale)
        else:
            x, packed = _norm_and(norm_linear, x, pending, *norm1, *qkv)
            out = ops.self_attention(packed, num_heads, scale)
        bias = proj.bias if gate1 is not None else None  # without a gate no operator adds the branch
        pending = Pending(F.linear(out, proj.weight, proj.bias if bias is None else bias.detach()), gate1, bias)
        handed_bias = fc2.bias if hands_over and gate2 is not None else None
        bias = fc2.bias if handed_bias is None else handed_bias.detach()
        parameters = autocast(fc1.weight, fc1.bias, fc2.weight, bias)
        demanded = ops.current_backend() == "triton"
        x, branch = _norm_and(norm_mlp, x, pending, *norm2, *parameters, demanded)
        return x, branch, gate2, handed_bias, c

    def _is_readable(self, x: Tensor) -> bool:
        """Whether the kernels run, and every Linear but the modulation's may be read as its parameters."""
        attn, mlp = self.attn, self.mlp
        if not (isinstance(attn, PackedAttention) and isinstance(mlp, GeluMlp) and attn.fuses() and mlp.fuses()):
            return False
        if not (is_plain(attn, type(attn)) and is_plain(mlp, type(mlp)) and are_readable(attn.qkv, attn.proj)):
            return False
        widths = (x.shape[2], len(mlp.fc1.weight))
        return takes_triton(_NORM, x, x.shape[2], self.parameters()) and takes_gemm("gelu_mlp", x, widths, ())

    def _wants_gradient(self, x: Tensor, modulation: Tensor) -> bool:
        """Whether anything wants a gradient, in dtypes that the nodes take."""
        linears = (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2)
        parameters = [tensor for layer in linears for tensor in (layer.weight, layer.bias) if tensor is not None]
        wants = any(tensor.requires_grad for tensor in (x, modulation, *parameters))
        return wants and modulation.dtype == working_dtype(self.attn.qkv.weight)

    def _chunks(self, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        if self.modulations == 6:
            return modulation.chunk(6, dim=-1)  # type: ignore[return-value]
        shift1, scale1, shift2, scale2 = modulation.chunk(4, dim=-1)
        return shift1, scale1, None, shift2, scale2, None


class FusedAdaLNBlock(AdaLNForward, reference.AdaLNBlock):
    forward = AdaLNForward.fused  # type: ignore[assignment]


class FusedAdaLNZeroBlock(AdaLNForward, reference.AdaLNZeroBlock):
    forward = AdaLNForward.fused  # type: ignore[assignment]


class FusedFinalLayer(reference.FinalLayer):
    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        bias: Tensor | None,
        c: Tensor | None,
        activated: bool,
        modulation: Tensor | None,
    ) -> Tensor:
        modulation, _ = modulation_of(cast(nn.Sequential, self.adaLN_modulation), c, activated, modulation, False)
        shift, scale = modulation.chunk(2, dim=-1)
        _, h = add_and_norm(x, Pending(branch, gate, bias), shift, scale, self.norm_final.eps)
        return cast(Tensor, self.linear(h))


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    reference.TimestepEmbedder: FusedTimestepEmbedder,
    reference.LabelEmbedder: FusedLabelEmbedder,
    reference.Attention: FusedAttention,
    reference.Mlp: FusedMlp,
    reference.AdaLNBlock: FusedAdaLNBlock,
    reference.AdaLNZeroBlock: FusedAdaLNZeroBlock,
    reference.FinalLayer: FusedFinalLayer,
}
