"""adaLN-Zero blocks without gradients: what each launches beside its Linears, decided once for tensors laid out alike.

A block's operators, called one by one, ask again about tensors that follow from each other. Here a plan of all launches
follows from the layouts of the inputs and the shapes of the weights, which torch's own Linears check in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.launch import keep, kept, uses_tf32
from ..reference import ops as formulas
from . import linear
from .attention import attention_backend
from .attention_implementations import run_library
from .backend import current_backend, direct_layouts, takes_triton


class BlockSettings(NamedTuple):
    """What an adaLN-Zero block computes with besides its inputs.

    Attributes:
        parameters: weight and bias of qkv, proj, fc1 and fc2, which may be read.
        num_heads, softmax_scale: of attention; no scale for head_dim ** -0.5.
        eps1, eps2: of its norms.
    """

    parameters: Sequence[Tensor | None]
    num_heads: int
    softmax_scale: float | None
    eps1: float
    eps2: float

    def layout(self) -> Hashable:
        """What a plan depends on."""
        w_qkv, _, w_proj, _, w1, b1, _, _ = cast("list[Tensor]", self.parameters)
        return w_qkv.shape, w_proj.shape, w1.shape, b1 is None, *self[1:]


class _Plan:
    """What a block without gradients launches beside its Linears, kept by the layouts of all that these follow from."""

    __slots__ = ("activate", "add", "attend", "norm1", "norm2", "settings")

    settings: Hashable
    norm1: Callable[..., Any]  # as AdaLNForward
    attend: Callable[[Tensor], Tensor]
    norm2: Callable[..., Any]
    activate: Callable[..., Tensor]
    add: Callable[..., Any]  # the MLP's branch, where it is not left to the norm that follows

    def halves(
        self, x: Tensor, h: Tensor, modulation: Sequence[Tensor], parameters: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """(the stream, the MLP's branch (B * T, D)) from the stream and its modulated norm."""
        _, _, gate1, shift2, scale2, _ = modulation
        w_qkv, b_qkv, w_proj, b_proj, w1, b1, w2, b2 = cast("list[Tensor]", parameters)
        out = self.attend(F.linear(h, w_qkv, b_qkv))
        r, h, _, _ = self.norm2(x, F.linear(out, w_proj, b_proj), gate1, shift2, scale2)
        return r, F.linear(self.activate(h, w1, b1), w2, b2)


def infer_blocks(
    x: Tensor, blocks: Sequence[BlockSettings], modulations: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """adaLN-Zero blocks without gradients: (x, branch, gate), the last branch left to the norm that follows. None where
    they must be computed by their operators: something looks at them, autocast is on, no kernel runs, or dtypes differ.

    Args:
        x: the residual stream (B, T, D).
        modulations: of each, shift, scale and gate of attention, then of the MLP, (B, D) each, views of one tensor.
    """
    if x.stride()[-1:] != (1,):  # as a convolution's patches lie
        x = x.contiguous()
    branch: Tensor | None = None
    gate: Tensor | None = None
    plan: _Plan | None = None
    for index, (settings, modulation) in enumerate(zip(blocks, modulations, strict=True)):
        # from the second on tensors lie as the block before has made them
        if index < 2 or plan is None or plan.settings != settings.layout():
            plan = _block_plan(x, branch, gate, modulation, settings)
            if plan is None:
                return None
        r, h, _, _ = plan.norm1(x, branch, gate, modulation[0], modulation[1])
        x, branch = plan.halves(x if branch is None else r, h, modulation, settings.parameters)
        if branch.shape != h.shape:
            return None
        branch, gate = branch.view(x.shape), modulation[5]
    return x, cast(Tensor, branch), cast(Tensor, gate)


def infer_block(x: Tensor, modulation: Sequence[Tensor], settings: BlockSettings) -> Tensor | None:
    """One of :func:`infer_blocks` on its own, its last branch added."""
    if x.stride()[-1:] != (1,):
        x = x.contiguous()
    plan = _block_plan(x, None, None, modulation, settings)
    if plan is None:
        return None
    _, h, _, _ = plan.norm1(x, None, None, modulation[0], modulation[1])
    r, branch = plan.halves(x, h, modulation, settings.parameters)
    if branch.shape != h.shape:
        return None
    return cast(Tensor, plan.add(r, branch, modulation[5], None, None)[0])


def _block_plan(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    modulation: Sequence[Tensor],
    settings: BlockSettings,
) -> _Plan | None:
    layouts = direct_layouts(x, branch, gate, modulation[0])
    if layouts is None or torch._C._is_any_autocast_enabled():
        return None
    tf32 = uses_tf32(modulation[0].dtype)
    key = "block", layouts, settings.layout(), current_backend(), tf32
    plan: _Plan | None = kept(key)
    if plan is None:
        plan = _plan_block(x, branch, gate, modulation, settings)
        if plan is not None:
            keep(key, plan)
    return plan


def _plan_block(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    modulation: Sequence[Tensor],
    settings: BlockSettings,
) -> _Plan | None:
    w_qkv, _, w_proj, _, w1, b1, _, _ = cast("list[Tensor]", settings.parameters)
    num_heads = settings.num_heads
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    batch, tokens, width = x.shape
    inner, head_dim = w_qkv.shape[0] // 3, w_qkv.shape[0] // (3 * num_heads)
    tensors = [tensor for tensor in (branch, gate, *settings.parameters) if tensor is not None]
    fits = (
        x.numel() > 0
        and shift1.shape == (batch, width)
        and w_qkv.shape == (3 * num_heads * head_dim, width)
        and (w_proj.shape, w1.shape[1]) == ((width, inner), width)
        and x.dtype in (shift1.dtype, torch.float32)
        and all(tensor.dtype == shift1.dtype and tensor.device == x.device for tensor in (shift1, *tensors))
        and (branch is None or (gate is not None and branch.shape == x.shape and gate.shape == (batch, width)))
    )
    if not fits or not takes_triton("gated_residual_layer_norm_modulate", x, width):
        return None
    from ..kernels.adaln import AdaLNForward
    from ..kernels.attention import AttentionForward
    from ..kernels.configs.gemm import gemm_config

    # of whose layouts alone the plans are made
    h, qkv = shift1.new_empty(x.shape), shift1.new_empty((batch, tokens, w_qkv.shape[0]))
    r = x.new_empty(x.shape)
    plan = _Plan()
    plan.settings = settings.layout()
    plan.norm1 = AdaLNForward((x, branch, gate, shift1, scale1), settings.eps1, save=False, flat=True)
    stream = x if branch is None else r
    plan.norm2 = AdaLNForward((stream, h, gate1, shift2, scale2), settings.eps2, save=False, flat=True)
    plan.add = AdaLNForward((r, h, gate2, None, None), 0.0)
    backend = attention_backend(qkv, tokens, head_dim, training=False)
    if backend == "triton":
        scale = head_dim**-0.5 if settings.softmax_scale is None else settings.softmax_scale
        attention = AttentionForward((qkv, None), num_heads, scale, save=False, flat=True)
        plan.attend = lambda qkv: attention(qkv, None)[0]
    else:
        shape, softmax_scale = qkv.shape, settings.softmax_scale
        plan.attend = lambda qkv: run_library(backend, qkv.view(shape), num_heads, softmax_scale, None).flatten(0, 1)
    # by operators that look at the weights themselves, of which the plan knows little
    plan.activate = formulas.linear_gelu
    if linear.takes_gemm("gelu_mlp", h, (*w1.shape, width), ()):
        demanded = current_backend() == "triton"
        candidate = gemm_config("linear_gelu", batch * tokens, w1.shape[0], width, h, demanded).candidate
        if candidate == "cublaslt" and b1 is not None:
            plan.activate = lambda h, w1, b1: torch._addmm_activation(b1, h, w1.t(), use_gelu=True)
        elif candidate == "triton":
            plan.activate = linear.linear_gelu
    return plan
