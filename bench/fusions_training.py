"""The places of a training step where ditfast's blocks differ from the reference's: what both run there.

A block's halves, from the norm to what its Linears made of it, with the Linear before the norm where its bias's
gradient falls off in the norm's backward. A last MLP's bias counts where its gradient is made: in the half or the
final norm after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditfast.ops._adaln_library import adaln
from ditfast.ops._block import norm_attention, norm_mlp
from ditfast.reference import ops as formulas

from .cases import Case

Call = Callable[[], object]
#: (fusion, uses in a call, the reference's code, ditfast's)
Site = tuple[str, int, Call, Call]

ATTENTION_HALF, MLP_HALF, FINAL = "norm, qkv, attention", "projection, norm, MLP", "last branch, norm"


def training_sites(case: Case, slow: Tensor, fast: Tensor) -> Iterator[Site]:
    """All of them, for the adaLN designs.

    Args:
        slow, fast: the tokens that the reference's and ditfast's first block are handed, in their layouts.
    """
    config = case.config
    gated = config.conditioning == "adaln_zero"
    make = _Tensors(slow.shape, case.dtype)
    width, hidden = config.hidden_size, config.mlp_hidden_size
    qkv, proj = (make.linear(3 * width, width), make.linear(width, width))
    fc1, fc2 = (make.linear(hidden, width), make.linear(width, hidden))
    heads, scale = config.num_heads, config.head_dim**-0.5
    gate, shift, factor = make.vectors()
    left = fc2[1] if gated else None

    def slow_norm(x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        if branch is not None:
            x = formulas.gated_residual(x, branch, gate) if gated else x + branch
        return x, formulas.layer_norm_modulate(x, shift, factor, 1e-6)

    def fast_norm(
        function: Callable[..., Any], x: Tensor, branch: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> Any:
        if branch is not None and not gated:
            x, branch = x + branch, None
        given = gate if branch is not None else None
        r, y = function(x, branch, given, bias if branch is not None else None, shift, factor, 1e-6, *rest)
        return (x if branch is None else r), y

    def slow_attention(x: Tensor, branch: Tensor | None) -> Sequence[Tensor]:
        x, norm = slow_norm(x, branch)
        return x, formulas.self_attention(F.linear(norm, *qkv), heads)

    def fast_attention(x: Tensor, branch: Tensor | None) -> Sequence[Tensor]:
        return tuple(fast_norm(norm_attention, x, branch, left, *qkv, heads, scale))

    def slow_mlp(x: Tensor, out: Tensor) -> Sequence[Tensor]:
        x, norm = slow_norm(x, F.linear(out, *proj))
        return x, formulas.gelu_mlp(norm, *fc1, *fc2)

    def fast_mlp(x: Tensor, out: Tensor) -> Sequence[Tensor]:
        branch = F.linear(out, proj[0], proj[1].detach() if gated else proj[1])
        return tuple(fast_norm(norm_mlp, x, branch, proj[1], *fc1, *fc2, gated, True))

    def slow_final(x: Tensor, branch: Tensor) -> Sequence[Tensor]:
        return slow_norm(x, branch)[1:]

    def fast_final(x: Tensor, branch: Tensor) -> Sequence[Tensor]:
        if not gated:
            return [adaln(x + branch, None, None, shift, factor, 1e-6)[1]]
        return [adaln(x, branch, gate, shift, factor, 1e-6, left)[1]]

    parameters = (*qkv, *proj, *fc1, *fc2, gate, shift, factor)
    tokens, branch, out = (make.tokens() for _ in range(3))

    def site(fusion: str, uses: int, functions: Sequence[Callable[..., Sequence[Tensor]]], *pairs: Any) -> Site:
        reference, ours = (partial(_step, *both, parameters) for both in zip(functions, pairs, strict=True))
        return fusion, uses, reference, ours

    attention, mlp, final = (slow_attention, fast_attention), (slow_mlp, fast_mlp), (slow_final, fast_final)
    yield site(ATTENTION_HALF, 1, attention, (slow, None), (fast, None))
    later = (tokens, branch)
    if config.depth > 1:
        yield site(ATTENTION_HALF, config.depth - 1, attention, later, later)
    # the first block's stream comes in the layout of the patch embedding
    yield site(MLP_HALF, 1, mlp, (slow, out), (fast, out))
    if config.depth > 1:
        yield site(MLP_HALF, config.depth - 1, mlp, (tokens, out), (tokens, out))
    yield site(FINAL, 1, final, later, later)


def _step(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> None:
    """Forward, and backward from every output to everything that learns."""
    outputs = [output for output in function(*inputs) if output.requires_grad]
    leaves = [item for item in inputs if item is not None]
    # a stream that went through unchanged adds its gradient elsewhere
    outputs = [output for output in outputs if all(output is not leaf for leaf in leaves)]
    grads = [torch.empty(output.shape, dtype=output.dtype) for output in outputs]
    torch.autograd.grad(outputs, [*leaves, *parameters], grads, allow_unused=True)


class _Tensors:
    """Leaves of a case on the meta device."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = tuple(shape), dtype

    def tokens(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, requires_grad=True)

    def vectors(self) -> tuple[Tensor, ...]:
        """gate, shift, scale: chunks of one modulation."""
        whole = torch.empty(self.shape[0], 3 * self.shape[2], dtype=self.dtype)
        return tuple(chunk.requires_grad_() for chunk in whole.chunk(3, dim=-1))

    def linear(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        weight = torch.empty(rows, columns, dtype=self.dtype, requires_grad=True)
        return weight, torch.empty(rows, dtype=self.dtype, requires_grad=True)
