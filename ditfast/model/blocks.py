"""The reference's layers with a fused forward, which :class:`ditfast.DiT` is built of.

A gated residual and the norm after it are one operator, also across block borders: a block hands its last branch on
instead of adding it. In training each half of a block is one autograd node (:mod:`ditfast.ops.block`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.adaln import adaln
from ..ops.attention import chosen_backend
from ..ops.backend import takes_triton, wants_gradient
from ..ops.block import norm_attention, norm_linear, norm_mlp
from ..ops.inference import BlockSettings
from ..ops.linear import autocast, takes_gemm, working_dtype
from ..ops.modulations import attached
from ..plain import are_readable, child, has_global_hooks, is_plain, is_unchanged, parameters_of
from ..reference import dit as reference
from ..reference.transforms import in_trace

_NORM = "gated_residual_layer_norm_modulate"


def records_gradients() -> bool:
    """Whether autograd records, and not torch.jit.trace, whose check calls a model once more without gradients."""
    return torch.is_grad_enabled() and not in_trace()


#: of a layer: (B, parts * D), or its parts (B, D), views of one tensor
Modulation = Tensor | tuple[Tensor, ...]


def modulation_of(
    layers: nn.Sequential, c: Tensor | None, activated: bool, ahead: Modulation | None, parts: int, readable: bool
) -> tuple[Sequence[Tensor], Tensor | None]:
    """(the modulation of one layer in its parts (B, D), c for the next).

    Args:
        ahead: the modulation where it was computed ahead; its gradient is needed where c is given too.
        readable: whether the Linear may share a node with what reads c next.
    """
    if ahead is not None and c is None:
        return ahead if isinstance(ahead, tuple) else ahead.chunk(parts, dim=1), None
    c = cast(Tensor, c)
    if not activated:
        return layers(c).chunk(parts, dim=1), c
    linear = cast(nn.Linear, layers[1])
    if ahead is not None or (readable and are_readable(linear) and not torch.compiler.is_compiling()):
        c, weight, bias = autocast(c, linear.weight, linear.bias)
        modulation, c = attached(c, weight, bias, cast("Tensor | None", ahead))
        return modulation.chunk(parts, dim=1), c
    return linear(c).chunk(parts, dim=1), c


def split_modulation(modulation: Tensor, widths: Sequence[int], parts: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """The modulations (B, sum of widths) of layers side by side, each in so many parts."""
    counts = {width // count for width, count in zip(widths, parts, strict=True)}
    if len(counts) > 1:
        each = modulation.split_with_sizes(widths, dim=1)
        return [x.chunk(count, dim=1) for x, count in zip(each, parts, strict=True)]
    vectors = modulation.unflatten(1, (-1, counts.pop())).unbind(1)  # one call: a view costs what a launch does
    return [vectors[first:end] for first, end in pairwise(accumulate(parts, initial=0))]


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

    def parameters_read(self) -> list[Tensor | None] | None:
        """The parameters of qkv and proj, where they may be read and its forward does nothing else; else None."""
        modules = self._modules
        return parameters_of(modules.get("qkv"), modules.get("proj")) if self.fuses() else None

    def fused(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(ops.self_attention(self.qkv(x), self.num_heads, self.softmax_scale())))


class GeluMlp(nn.Module):
    """Mixin: an MLP that is fc2(gelu_tanh(fc1(x))) while it :meth:`fuses`."""

    fc1: nn.Linear
    fc2: nn.Linear

    def does_nothing_else(self) -> bool:
        """Whether its forward is that at present."""
        return True

    def fused(self, x: Tensor) -> Tensor | None:
        """None where its Linears must be called as modules, or its forward does something else."""
        parameters = self.parameters_read()
        return None if parameters is None else ops.gelu_mlp(x, *parameters)  # type: ignore[arg-type]

    def parameters_read(self) -> list[Tensor | None] | None:
        """The parameters of fc1 and fc2, where they may be read and its forward does nothing else; else None."""
        modules = self._modules
        return parameters_of(modules.get("fc1"), modules.get("fc2")) if self.does_nothing_else() else None



class FusedAttention(PackedAttention, reference.Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x) if self.fuses() else super().forward(x)

    def fuses(self) -> bool:
        # normalised queries and keys are no longer packed
        norms = child(self, "q_norm"), child(self, "k_norm")
        return not has_global_hooks() and all(is_unchanged(norm, nn.Identity) for norm in norms)

    def extra_repr(self) -> str:
        return "" if self.fuses() else "qk_norm: runs the reference's code"


class FusedMlp(GeluMlp, reference.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        out = self.fused(x)
        return super().forward(x) if out is None else out


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
        modulation: Modulation | None,
        hands_over: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(x, branch, gate, bias, c) for the next block; see :class:`Pending`.

        Args:
            c: (B, D), through its SiLU where ``activated``.
            modulation: (B, 4D) or (B, 6D) where it was computed ahead; c is given too where it needs its gradient.
            hands_over: whether only the next norm sees the branch, which may then compute its bias's gradient.
        """
        trains = records_gradients()
        parameters = self.parameters_read() if trains else None
        readable = trains and parameters is not None and self._takes_nodes(x, parameters)
        layers = cast(nn.Sequential, child(self, "adaLN_modulation"))
        parts, c = modulation_of(layers, c, activated, modulation, self.modulations, readable)
        attn: Any = child(self, "attn")
        eps1, eps2 = (float(child(self, name).eps) for name in ("norm1", "norm2"))
        pending = Pending(branch, gate, bias)
        shift1, scale1, *_ = parts
        shift2, scale2 = parts[-3:-1] if len(parts) == 6 else parts[2:]
        gate1, gate2 = (parts[2], parts[5]) if len(parts) == 6 else (None, None)
        norm1, norm2 = (shift1, scale1, eps1), (shift2, scale2, eps2)
        if not readable or parameters is None or not self._wants_gradient(x, shift1, parameters):
            x, h = add_and_norm(x, pending, *norm1)
            x, h = add_and_norm(x, Pending(attn(h), gate1), *norm2)
            return x, self.mlp(h), gate2, None, c
        qkv_weight, qkv_bias, proj_weight, proj_bias, w1, b1, w2, b2 = cast("list[Tensor]", parameters)
        qkv = autocast(qkv_weight, qkv_bias)
        num_heads, scale = attn.num_heads, attn.softmax_scale()
        head_dim = qkv_weight.shape[0] // (3 * num_heads)
        if chosen_backend(shift1, x.shape[1], head_dim, None, training=True) == "triton":
            scale = head_dim**-0.5 if scale is None else scale
            x, out = _norm_and(norm_attention, x, pending, *norm1, *qkv, num_heads, scale)
        else:
            x, packed = _norm_and(norm_linear, x, pending, *norm1, *qkv)
            out = ops.self_attention(packed, num_heads, scale)
        bias = proj_bias if gate1 is not None else None  # without a gate no operator adds the branch
        pending = Pending(F.linear(out, proj_weight, proj_bias if bias is None else bias.detach()), gate1, bias)
        handed_bias = b2 if hands_over and gate2 is not None else None
        mlp = autocast(w1, b1, w2, b2 if handed_bias is None else handed_bias.detach())
        x, branch = _norm_and(norm_mlp, x, pending, *norm2, *mlp, ops.current_backend() == "triton")
        return x, branch, gate2, handed_bias, c

    def block_settings(self) -> BlockSettings | None:
        """What it computes with, where it does nothing else."""
        parameters = self.parameters_read()
        if parameters is None:
            return None
        attn = child(self, "attn")
        epsilons = float(child(self, "norm1").eps), float(child(self, "norm2").eps)
        return BlockSettings(parameters, attn.num_heads, attn.softmax_scale(), *epsilons)

    def parameters_read(self) -> list[Tensor | None] | None:
        """The parameters of qkv, proj, fc1 and fc2, where attention and MLP read nothing else; else None."""
        attn, mlp = child(self, "attn"), child(self, "mlp")
        if not (isinstance(attn, PackedAttention) and isinstance(mlp, GeluMlp)):
            return None
        if not (_has_its_own_forward(attn) and _has_its_own_forward(mlp)):
            return None
        of_attention, of_mlp = attn.parameters_read(), mlp.parameters_read()
        return None if of_attention is None or of_mlp is None else of_attention + of_mlp

    def _takes_nodes(self, x: Tensor, parameters: Sequence[Tensor | None]) -> bool:
        """Whether the kernels run, of both halves of the block."""
        width, hidden = x.shape[2], cast(Tensor, parameters[4]).shape[0]
        if not takes_triton(_NORM, x, width, parameters):
            return False
        return not (width % 8 or hidden % 8) or takes_gemm("gelu_mlp", x, (width, hidden), ())

    def _wants_gradient(self, x: Tensor, modulation: Tensor, parameters: Sequence[Tensor | None]) -> bool:
        """Whether anything wants a gradient, in dtypes that the nodes take."""
        wants = x.requires_grad or modulation.requires_grad or wants_gradient(*parameters)
        return wants and modulation.dtype == working_dtype(cast(Tensor, parameters[0]))


_FORWARDS = {kind: kind.forward for kind in (FusedAttention, FusedMlp)}


def _has_its_own_forward(module: nn.Module) -> bool:
    """Whether calling an attention or an MLP would run the forward that ditfast gave its class, and nothing else."""
    kind = type(module)
    known = "_ditfast" in kind.__dict__ or (kind in _FORWARDS and kind.forward is _FORWARDS[kind])
    return known and is_unchanged(module, kind) and "_compiled_call_impl" not in module.__dict__


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
        modulation: Modulation | None,
    ) -> Tensor:
        layers = cast(nn.Sequential, self.adaLN_modulation)
        (shift, scale), _ = modulation_of(layers, c, activated, modulation, 2, False)
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
