"""What a forward computes, operation by operation, as torch dispatches it.

Two kinds of operations are told apart. Analytic ones (sums, products, matrix products, norms, softmax, ...): two
compositions of them that agree on random numbers agree everywhere, so numbers decide about them. The others hide from
numbers: they do nothing (a clamp, a mask beyond the last token, a factor of 1) or hardly anything (tanh) until a value,
a size, a dtype or a draw of chance has them do something.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_LIBRARIES = tuple(os.path.dirname(os.path.dirname(path)) + os.sep + name + os.sep
                   for path, name in ((torch.__file__, "torch"), (os.path.dirname(__file__), "ditfast")))  # fmt: skip

# these only move or store values: random numbers show where two forwards differ
_LAYOUT = frozenset("""
    view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze expand alias detach clone _to_copy to
    contiguous copy empty empty_like new_empty empty_strided movedim swapaxes view_as expand_as as_strided lift
    promote_types
    """.split())  # noqa: SIM905  # fmt: skip
# the same along an axis of fixed length; along samples or tokens they may leave some out
_CUTS = frozenset(("slice", "select", "split", "split_with_sizes", "unbind", "chunk", "narrow", "unsafe_split"))
_PRODUCTS = frozenset(("mm", "bmm", "addmm", "addmv", "mv", "dot", "baddbmm", "linear", "matmul"))
_ANALYTIC = _PRODUCTS | frozenset("""
    add sub rsub mul div neg pow square sqrt rsqrt reciprocal exp log sin cos sum mean var var_mean std convolution
    native_layer_norm native_group_norm _fused_rms_norm rms_norm embedding addcdiv cat stack repeat einsum
    linalg_vector_norm
    """.split())  # noqa: SIM905  # fmt: skip
# what these are made of: by hand or as one operation they count the same
_SOFTMAX = ("amax", "add", "exp", "sum", "div")
_PARTS = {
    "silu": ("sigmoid", "mul"),
    "_softmax": _SOFTMAX,
    "_safe_softmax": _SOFTMAX,
    "_log_softmax": _SOFTMAX,
    "logsumexp": _SOFTMAX,
    "sub": ("add",),
    "rsub": ("add",),
    "neg": ("mul",),
    "addcmul": ("mul", "add"),
    "lerp": ("mul", "add"),
}
_NAMES = {"max": "amax", "min": "amin", "_local_scalar_dense": "item"}
# what bounds or replaces gradients
_GUARDS = frozenset("""
    clamp clamp_min clamp_max where masked_fill nan_to_num ge gt le lt isnan isfinite sign round maximum minimum
    hardtanh linalg_vector_norm item
    """.split())  # noqa: SIM905  # fmt: skip


class Operations(TorchDispatchMode):
    """Records what runs under it.

    Attributes:
        counts: operation -> how often it ran.
        numbers: (operation, number among its arguments) -> how often.
        hidden: what random numbers do not show, in words -> how often.
        places: where each of these was first called, as "file.py:line".
        opaque: operations of other libraries.
        backward: set while gradients are computed; only guards are recorded then.
    """

    def __init__(self, lengths: tuple[int, int], tensors: dict[int, tuple[Tensor, str]]) -> None:
        """``lengths`` of the axes of samples and tokens; ``tensors``: what is no parameter or input, and what it is."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.lengths, self.tensors = lengths, tensors
        self.counts: Counter[str] = Counter()
        self.numbers: Counter[tuple[str, float]] = Counter()
        self.hidden: Counter[str] = Counter()
        self.places: dict[str, str] = {}
        self.opaque: set[str] = set()
        self.backward = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if space == "aten":
            self._record(name.removesuffix("_") if name != "_" else name, func, args, kwargs)
        elif space not in ("prim", "prims", "profiler"):
            self.opaque.add(func._schema.name)
        return func(*args, **kwargs)

    def _record(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = _NAMES.get(name, name)
        names = (argument.name for argument in func._schema.arguments)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if name.startswith("_scaled_dot_product"):  # its tag is that of a dropout, alive or not
            return None if self.backward else self._attention(arguments)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self.note(f"draws random numbers ({name})")
        if self.backward:
            return self.note(f"computes {name} in the backward") if name in _GUARDS else None
        for value in arguments.values():
            if isinstance(value, Tensor):
                self._look_at(value)
            elif isinstance(value, float):
                self.numbers[name, value] += 1
        if isinstance(number := arguments.get("other", arguments.get("exponent")), int):
            self.numbers[name, number] += 1
        if name in _LAYOUT or (name in _CUTS and not self._leaves_out(name, arguments)):
            return None
        parts = _PARTS.get(name, (name,))
        if name == "gelu":
            parts = ("tanh" if arguments.get("approximate") == "tanh" else "erf", "mul", "add")
        if name == "div" and not isinstance(arguments.get("other"), Tensor):
            parts = ("mul",)
        for part in parts:
            self.counts["matmul" if part in _PRODUCTS else part] += 1
            if part not in _ANALYTIC:
                self.note(f"computes {part}" if part != "item" else "reads a value out of a tensor")
        if idle := self._idle(name, arguments):
            self.note(idle)
        return None

    def note(self, text: str) -> None:
        """Records something that numbers do not show."""
        self.hidden[text] += 1
        self.places.setdefault(text, place())

    def _look_at(self, tensor: Tensor) -> None:
        is_real = not isinstance(tensor, FakeTensor)
        _, description = (None, "a tensor made outside of it") if is_real else self.tensors.get(id(tensor), (None, ""))
        if description and not self.hidden[f"reads {description}"]:
            self.note(f"reads {description}")

    def _leaves_out(self, name: str, arguments: dict[str, Any]) -> bool:
        tensor, axis = arguments["self"], arguments.get("dim", 0)
        length = tensor.shape[axis]
        if isinstance(length, int) and length not in self.lengths:
            return False
        if name != "slice":
            return True
        start, end = arguments.get("start") or 0, arguments.get("end")
        return not (start == 0 and (end is None or end >= sys.maxsize // 2) and arguments.get("step", 1) == 1)

    def _attention(self, arguments: dict[str, Any]) -> None:
        """torch's attention, as what it does by hand."""
        self.numbers["mul", arguments.get("scale") or 0.0] += 1
        self.counts.update(["matmul", "matmul", "mul", *_SOFTMAX])
        self.note("computes amax")
        if arguments.get("is_causal"):
            self.note("computes a causal mask")
        if arguments.get("attn_bias") is not None or arguments.get("attn_mask") is not None:
            self.note("adds a mask to its logits")
        if arguments.get("dropout_p"):
            self.note("draws random numbers (dropout)")

    def _idle(self, name: str, arguments: dict[str, Any]) -> str | None:
        """An operation whose number (nearly) does nothing now, and may be another later, in words; or None."""
        alpha = arguments.get("alpha", 1) if name in ("add", "sub") else 1
        if alpha != 1:
            self.counts["mul"] += 1
            if is_near(alpha, 0) or is_near(alpha, 1):
                return f"adds {alpha} times"
        names = ("other", "exponent", "weight", "value")
        number = next((arguments[name] for name in names if name in arguments), None)
        if isinstance(number, (torch.SymInt, torch.SymFloat)):
            return "goes by a size"
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            return None
        if name == "mul" and (is_near(number, 1) or is_near(number, 0)):
            return f"multiplies by {number}"
        if name == "div" and (is_near(number, 1) or abs(number) > 1e4):
            return f"divides by {number}"
        if name in ("add", "sub") and number == 0:
            return f"adds {number}"
        if name == "lerp" and (is_near(number, 1) or is_near(number, 0)):
            return f"interpolates by {number}"
        return f"raises to the power {number}" if name == "pow" and is_near(number, 1) else None


def is_near(value: Any, target: float) -> bool:
    """Whether a value is a number near ``target``."""
    return isinstance(value, (int, float)) and abs(value - target) < 1e-4


def place() -> str:
    """The innermost line that is neither torch's nor ditfast's, as "file.py:line", or ""."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_LIBRARIES):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@contextmanager
def autocast_watched(operations: Operations) -> Iterator[None]:
    """Records every autocast that begins meanwhile, on any device: the module may go there later."""
    enter, thread = torch.autocast.__enter__, threading.get_ident()

    def watched(self: Any) -> Any:
        if threading.get_ident() == thread:
            operations.note(f"{'turns autocast on' if self._enabled else 'keeps autocast out'} on {self.device}")
        return enter(self)  # type: ignore[no-untyped-call]

    torch.autocast.__enter__ = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def sizes_watched(env: Any) -> Iterator[Counter[str]]:
    """Counts where a module's own code, not torch's or ditfast's, compares sizes of ``env`` or reads their numbers."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    reads: Counter[str] = Counter()

    def watched(method: Callable[[Any], Any], text: str) -> Callable[[Any], Any]:
        def read(self: Any) -> Any:
            frame = sys._getframe(1)
            file = frame.f_code.co_filename
            if getattr(self.node, "shape_env", None) is env and not file.startswith(_LIBRARIES):
                # without symbols the value is known, as of a size and itself; unbacked symbols are values of tensors
                of_sizes = self.node.expr.free_symbols - free_unbacked_symbols(self.node.expr)
                reads[f"{text} ({os.path.basename(file)}:{frame.f_lineno})"] += bool(of_sizes)
            return method(self)

        return read

    watches = [
        (torch.SymBool, "__bool__", "compares a size"),
        (torch.SymInt, "__bool__", "compares a size"),
        (torch.SymInt, "__int__", "reads a size as a number"),
        (torch.SymInt, "__index__", "reads a size as a number"),
        (torch.SymFloat, "__float__", "reads a size as a number"),
    ]
    methods = [(kind, name, getattr(kind, name)) for kind, name, _ in watches]
    for kind, name, text in watches:
        setattr(kind, name, watched(getattr(kind, name), text))
    try:
        yield reads
        reads += Counter()  # drops what was never of sizes
    finally:
        for kind, name, method in methods:
            setattr(kind, name, method)
