"""What a model launches, moves and computes, counted without a device: traced on meta tensors, views free.

A launch is an operator that computes or copies. Its bytes are its tensor inputs, each element read once (a table
that is gathered from counts whole), and its outputs, written once; its FLOPs are those of matmuls, convolutions and
attention, 2 for a multiply-accumulate, and none for the rest. Attention is one kernel forward and one backward for
everyone, and never causal: on meta tensors PyTorch takes it apart into its math path, which no GPU runs. A copy that
a CUDA operator makes of a tensor whose layout its kernel does not take is a launch of its own, "contiguous".
Otherwise an operator counts as one launch, though a few small ones (indexed and sliced gradients) run two or three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ATTENTION, ATTENTION_BACKWARD = "scaled_dot_product_attention", "scaled_dot_product_attention_backward"

_SDPA = torch.nn.functional.scaled_dot_product_attention
# allocations, and reinterpretations that carry no alias in their schema
_FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "promote_types"}
# they take a shape from their first tensor, or overwrite it, and do not read it
_UNREAD = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "zero_", "fill_", "copy_"}
# the arguments that CUDA's kernels take in one layout only, and copy where they come in another: ours with a
# contiguous last axis, torch's contiguous
_ROWS = {"adaln_forward": range(5), "adaln_backward": range(7)}
# ditfast's, of a matrix (M, K) and a weight (N, K) or (K, N)
_GEMMS = ("linear_gelu", "linear_gelu_backward", "linear_gated_residual")
# ditfast's, counted as everyone's: (name, matmuls of T x T x head_dim a head)
_ATTENTION = {"attention_forward": (ATTENTION, 2), "attention_backward": (ATTENTION_BACKWARD, 5)}
_CONTIGUOUS = {
    "native_layer_norm": range(1),
    "native_layer_norm_backward": range(2),
    "convolution": range(2),
    "convolution_backward": range(3),
}


@dataclass(frozen=True)
class Launch:
    """One kernel."""

    name: str
    flops: int
    bytes: int


@dataclass
class Cost:
    """The launches of a call, in order."""

    records: list[Launch] = field(default_factory=list, repr=False)

    @property
    def launches(self) -> Counter[str]:
        """Launches by operator."""
        return Counter(launch.name for launch in self.records)

    @property
    def bytes(self) -> Counter[str]:
        """Bytes by operator."""
        return self._sum("bytes")

    @property
    def flops(self) -> Counter[str]:
        """FLOPs by operator, of those that have any."""
        return +self._sum("flops")

    @property
    def total_launches(self) -> int:
        return len(self.records)

    @property
    def total_bytes(self) -> int:
        return sum(launch.bytes for launch in self.records)

    @property
    def total_flops(self) -> int:
        return sum(launch.flops for launch in self.records)

    @property
    def intensity(self) -> float:
        """FLOPs a byte; 0 where nothing moves."""
        return self.total_flops / self.total_bytes if self.records else 0.0

    def add(self, name: str, read: Iterable[object], written: Iterable[object], flops: int = 0) -> None:
        """Counts one launch."""
        once = {id(item): item for item in read}.values()  # what is given twice is read from memory once
        self.records.append(Launch(name, flops, sum(_bytes(item) for side in (once, written) for item in side)))

    def _sum(self, field: str) -> Counter[str]:
        total: Counter[str] = Counter()
        for launch in self.records:
            total[launch.name] += getattr(launch, field)
        return total


def count(call: Callable[[], Any], grad: bool = False) -> Cost:
    """Counts what a call on meta tensors would launch, move and compute on a GPU.

    Args:
        call: what to run, once; with ``grad`` it may run a backward, whose launches count too. On tensors of
            another device its operators are counted as that device's PyTorch runs them.
        grad: whether gradients are recorded; otherwise the call runs under ``torch.no_grad``.
    """
    cost = Cost()
    with torch.set_grad_enabled(grad), AttentionAsOne(cost), _Operators(cost):
        call()
    return cost


class AttentionAsOne(TorchFunctionMode):
    """Puts one counted kernel in the place of attention on meta tensors."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA and (args[0] if args else kwargs["query"]).is_meta:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        inputs = (query, key, value, attn_mask)
        wants = torch.is_grad_enabled() and any(item is not None and item.requires_grad for item in inputs)
        return cast(Tensor, _Attend.apply(*inputs, self.cost, wants))  # type: ignore[no-untyped-call]


class _Attend(torch.autograd.Function):
    """One launch forward and one backward, in the layouts that a GPU's kernels write."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cost: Cost, wants: bool) -> Tensor:
        shape = (*q.shape[:-1], v.shape[-1])
        # a GPU's kernels write (B, T, H, head_dim), so that merging the heads is a view
        heads = len(shape) == 4
        out = q.new_empty([shape[i] for i in (0, 2, 1, 3)]).transpose(1, 2) if heads else q.new_empty(shape)
        log_sums = q.new_empty(q.shape[:-1], dtype=torch.float32) if wants else None
        cost.add(ATTENTION, (q, k, v, mask), (out, log_sums), _attention_flops(q, k, v))
        ctx.save_for_backward(q, k, v, mask, out, log_sums)
        ctx.cost = cost
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, log_sums = ctx.saved_tensors
        # in the inputs' order of axes in memory, without the gaps of a packed projection
        grads = [torch.empty_like(item) for item in (q, k, v)]
        d_mask = torch.empty_like(mask) if ctx.needs_input_grad[3] else None
        # five matmuls where the forward has two: the logits are computed again
        flops = _attention_flops(q, k, v) * 5 // 2
        ctx.cost.add(ATTENTION_BACKWARD, (q, k, v, mask, out, grad, log_sums), (*grads, d_mask), flops)
        return (*grads, d_mask, None, None)


def _attention_flops(q: Tensor, k: Tensor, v: Tensor) -> int:
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


class _Operators(TorchDispatchMode):
    """Counts every operator that is no view and no allocation."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        if is_free(func):
            return out
        for index in (*_ROWS.get(name, ()), *_CONTIGUOUS.get(name, ())):
            if isinstance(args[index], Tensor) and not _is_taken(name, args[index]):
                self.cost.add("contiguous", (args[index],), (args[index],))
        if name == "adaln_backward":
            self._add_adaln_backward(args, out)
        elif name in _ATTENTION:
            one, products = _ATTENTION[name]
            batch, tokens, width = args[name == "attention_backward"].shape
            self.cost.add(one, tree_leaves(args), tree_leaves(out), products * 2 * batch * tokens**2 * (width // 3))
        else:
            read = args[1:] if name in _UNREAD else args
            flops = _flops(func, name, args, kwargs, out)
            self.cost.add(name, tree_leaves((read, kwargs)), tree_leaves(out), flops)
        return out

    def _add_adaln_backward(self, args: tuple[Any, ...], out: tuple[Any, ...]) -> None:
        """Two launches: the second adds up the slabs' shares of the sums over tokens, and other kernels' shares."""
        from ditfast.kernels.configs.rows import row_config  # imports triton

        d_x, d_branch, norm, d_vectors, d_bias, sums = out
        *read, partials = args
        r = read[2]
        batch, tokens, width = r.shape
        slabs = -(-tokens // row_config("adaln_bwd", width, tokens, batch, r).rows)
        vectors = len(d_vectors) + (d_bias.numel() > 0)
        partial = r.new_empty((vectors, batch, slabs, width), dtype=torch.float32)
        self.cost.add("adaln_backward", read, (d_x, d_branch, norm, partial))
        if vectors or partials:
            self.cost.add("sum_partials", (partial, *partials), (d_vectors, d_bias, *sums))


def _flops(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    if name == "modulations":
        return sum(2 * len(args[0]) * weight.numel() for weight in args[1])
    if name in _GEMMS:
        (rows, inner), weight = args[0].shape, args[1]
        return 2 * int(rows) * int(inner) * int(weight.numel() // inner)
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def _is_taken(name: str, item: Tensor) -> bool:
    """Whether an operator's kernel takes a tensor's layout."""
    if name in _ROWS:
        return item.numel() == 0 or item.stride(-1) == 1 or item.shape[-1] == 1
    return item.is_contiguous()


def is_free(func: Any) -> bool:
    """Whether an operator is a view or an allocation."""
    name = func._schema.name.split("::")[-1]
    returned = func._schema.returns
    views = bool(returned) and all(item.alias_info is not None and not item.alias_info.is_write for item in returned)
    return views or name in _FREE


def _bytes(item: object) -> int:
    """Bytes of the elements a tensor holds; those that an expansion repeats are read once."""
    if not isinstance(item, Tensor):
        return 0
    elements = 1
    for size, stride in zip(item.shape, item.stride(), strict=True):
        elements *= size if stride != 0 or size == 0 else 1
    return elements * item.element_size()
