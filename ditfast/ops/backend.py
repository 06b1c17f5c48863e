"""Which implementation an operator runs (the switch, the reasons), and how kernels join torch.library and autograd."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd.function import Function
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map

from ..kernels.launch import Layouts, gpu, gpu_index, interpreting, layouts, on_gpu
from ..reference.transforms import (
    carries_tangents,
    in_forward_mode,
    in_nested_gradients,
    in_second_order,
    in_trace,
    in_vmap,
    refuse_derivatives,
)
from .attention_implementations import AttentionBackend, machine_reason

Backend = Literal["auto", "triton", "torch"]

_PLAIN = (Tensor, torch.nn.Parameter)

NOT_TWICE = "its gradient has no derivative (torch.func.grad within another gradient)"

MAX_WIDTH = 8192  # elements of a row: a row kernel keeps one in registers

_backend: ContextVar[Backend] = ContextVar("ditfast_backend", default="auto")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Chooses the operators' implementation within a ``with`` block, for this thread or task.

    "auto" (the default) takes the fastest implementation that fits the tensors, "torch" the formula. "triton"
    demands the Triton kernel of every operator that has one, or raises; meta tensors trace the launches of a GPU
    under it (timestep_embedding and conditioning run their formulas under torch.compile). A compiled function keeps the
    choice made when it was traced.

    The kernels have first gradients. Forward-mode derivatives (``torch.func.jvp``), vmap, gradients of gradients within
    torch.func's transforms and ``torch.jit.trace`` take the formula under "auto", and are refused under "triton". A
    kernel's gradient that is differentiated all the same raises an error that says what to do.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def current_backend() -> Backend:
    """The backend in force here: what ``use_backend`` set, or "auto"."""
    return _backend.get()


# Dynamo cannot trace ContextVar.get; torch.compiler.assume_constant_result sets this mark too, but imports
# Dynamo and Triton first
current_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records here and any of the tensors wants a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast casts to on a device type, or None where it is off (or unknown, as on meta)."""
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch 2.11's Dynamo refuses to trace it


def sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor. The first one registers the operators' sharding rules with torch."""
    if type(x) in _PLAIN or type(x).__name__ != "DTensor":  # by name: importing it takes half a second
        return False
    _register_sharding_rules()
    return True


@lru_cache(maxsize=1)
def _registered() -> None:
    from . import sharding

    sharding.register()


def _register_sharding_rules() -> None:
    _registered()  # Dynamo looks through a cache's wrapper and misses the mark below


def takes_triton(operator: str, x: Tensor, width: int, others: Iterable[Tensor | None] = ()) -> bool:
    """Whether an operator runs its Triton kernel for a tensor like x with rows of ``width`` elements.

    "auto" takes the kernel on a GPU that has it, "triton" also for CPU tensors in Triton's interpreter and for
    meta tensors, which trace the fused path. ``others`` are further tensors that may want a gradient: where that may be
    differentiated in turn, which a kernel's gradient does not support, "auto" takes the formula.

    Raises:
        RuntimeError: a kernel was asked for by ``use_backend("triton")`` and cannot run, with the reason.
    """
    backend = current_backend()
    if backend == "torch" or (backend == "auto" and not on_gpu(x)):
        return False
    sharded(x)  # whose rules torch needs before a kernel's operator is called
    reason = triton_reason(x, width)
    if reason is not None and backend == "triton":
        raise RuntimeError(f"ditfast.ops.{operator} cannot run its Triton kernel: {reason}")
    return reason is None and not (backend == "auto" and in_second_order(chain((x,), others)))


def direct_layouts(x: Tensor, *others: Tensor | None) -> Layouts | None:
    """The layouts of tensors for which a kernel may be launched without torch's operator in between; None where
    something looks at the operator: a compiler, a mode, a transform, a subclass."""
    if torch.compiler.is_compiling() or type(x) not in _PLAIN:
        return None  # at once: Dynamo traces nothing of what follows
    backend = _backend.get()
    if backend == "torch" or (torch._C._len_torch_dispatch_stack() and not _is_looked_past()):
        return None
    if torch._C._len_torch_function_stack() and not _are_default_devices():
        return None
    if torch._C._is_tracing() or in_forward_mode():
        return None
    if functorch.maybe_current_level() is not None:
        return None
    if not (on_gpu(x) or (backend == "triton" and x.is_cpu)):  # meta tensors trace the operator
        return None
    return layouts((x, *others))


def _is_looked_past() -> bool:
    """Whether the modes in force leave this project's operators as they are: those with ``looks_past_ditfast``."""
    return all(getattr(mode, "looks_past_ditfast", False) for mode in _get_current_dispatch_mode_stack())


def _are_default_devices() -> bool:
    """Whether the function modes in force only choose where new tensors are made (``torch.set_default_device``)."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def triton_reason(x: Tensor, width: int) -> str | None:
    """Why no Triton kernel runs for a tensor like x with rows of ``width`` elements, or None."""
    reason = transform_reason()
    if reason is not None:
        reason = f"{reason}; use_backend(\"torch\") takes the formula"
    elif x.dtype == torch.float64:
        reason = "the kernels compute in fp32, and their input is fp64"
    elif width > MAX_WIDTH:
        reason = f"the kernels take rows of at most {MAX_WIDTH} elements, got {width}"
    elif on_gpu(x):
        reason = _gpu_unavailable(gpu_index(x) or 0)
    elif x.device.type == "cpu":
        reason = interpreter_unavailable()
    elif x.device.type != "meta":
        reason = f"there are no kernels for {x.device.type} tensors"
    return reason


def transform_reason() -> str | None:
    """Which of torch's transforms in force here a fused kernel does not serve, or None."""
    if in_forward_mode():
        return "it has no forward-mode derivative (torch.func.jvp)"
    if in_vmap():
        return "it has no rule for torch.vmap"
    if in_nested_gradients():
        return NOT_TWICE
    if in_trace():
        return "torch.jit.trace would not record its gradient"
    return None


def _gpu_unavailable(index: int) -> str | None:
    """Why the kernels cannot run on a GPU, or None."""
    return _gpu_reason(index)  # Dynamo looks through a cache's wrapper and misses the mark below


@lru_cache(maxsize=32)
def _gpu_reason(index: int) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    major, minor = gpu(index).capability
    return None if major >= 8 else f"the kernels need sm_80 or newer, the GPU is sm_{major}{minor}"


def interpreter_unavailable() -> str | None:
    """Why CPU tensors cannot run a kernel, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreting():
        return None
    return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the process starts"


_register_sharding_rules._dynamo_marked_constant = True  # type: ignore[attr-defined]
_gpu_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]
interpreter_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def available_backends() -> list[tuple[str, str, str | None]]:
    """(operator family, backend, why it is unavailable or None), for ``ditfast info``."""
    current = torch.cuda.current_device() if torch.cuda.is_available() else None
    no_cuda = "it needs a CUDA GPU" if current is None else None
    adaln = interpreter_unavailable() if current is None else _gpu_unavailable(current)
    return [
        ("adaln", "torch", None),
        ("adaln", "triton", adaln),
        ("conditioning", "torch", None),
        ("conditioning", "triton", adaln),
        ("linear", "torch", None),
        ("linear", "cublaslt", no_cuda),
        ("linear", "triton", adaln),
        ("attention", "triton", adaln),
        *(
            ("attention", name, machine_reason(name, current))
            for name in get_args(AttentionBackend)
            if name != "triton"
        ),
    ]


library = torch.library.Library("ditfast", "FRAGMENT")


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def run(name: str, tensors: Sequence[Tensor | None], *arguments: Any) -> Any:
    """One of this project's operators: by its implementation, where nothing looks at the operator in between, which
    costs 10 to 40 microseconds; results that there are not are None then, and empty tensors else.

    Args:
        tensors: all tensors among the arguments, the first no None.
    """
    key = direct_layouts(*tensors)  # type: ignore[arg-type]
    if key is None:
        return getattr(torch.ops.ditfast, name).default(*arguments)
    return _IMPLEMENTATIONS[name](*arguments, key=key)


def register(name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Gives a defined operator its implementation, for CUDA and for the CPU in Triton's interpreter, its fake, and a
    rule for batches of gradients: one after another, as torch.func.jacrev and autograd's ``is_grads_batched`` ask.

    The implementation takes also ``key``, the layouts of the tensors, where :func:`run` calls it.
    """
    _IMPLEMENTATIONS[name] = implementation

    def kernel(*arguments: Any) -> Any:
        return implementation(*arguments, key=None)

    for key in ("CUDA", "CPU"):
        library.impl(name, kernel, key)
    torch.library.register_fake(f"ditfast::{name}", fake, lib=library)

    def one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        out = _each(name, info.batch_size, args, in_dims)
        return out, tree_map(lambda _: 0, out)

    torch.library.register_vmap(f"ditfast::{name}", one_by_one, lib=library)
    library.impl(name, partial(_of_legacy_batches, name), "Batched")


def _each(name: str, count: int, args: Sequence[Any], dims: Sequence[Any]) -> Any:
    """The operator's results for each of ``count`` slices of the arguments that have such an axis, stacked."""
    operator = getattr(torch.ops.ditfast, name).default
    results = [operator(*_picked(args, dims, index)) for index in range(count)]
    return tree_map(lambda *each: torch.stack(each), *results)


def _picked(args: Sequence[Any], dims: Sequence[Any], index: int) -> list[Any]:
    return [
        _picked(arg, dim, index)
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple))
        else arg
        if dim is None
        else arg.select(dim, index)
        for arg, dim in zip(args, dims, strict=True)
    ]


def _of_legacy_batches(name: str, *args: Any) -> Any:
    """Runs an operator on the batched tensors of ``is_grads_batched``, which are not torch.func's."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()

    def batched(x: Any) -> bool:
        return isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x)

    plain = tree_map(lambda x: torch._remove_batch_dim(x, level, 1, 0) if batched(x) else x, args)
    dims = tree_map(lambda x: 0 if batched(x) else None, args)
    count = next(len(x) for x, dim in zip(tree_leaves(plain), tree_leaves(tree_map(batched, args)), strict=True) if dim)
    return tree_map(lambda x: torch._add_batch_dim(x, 0, level), _each(name, count, plain, dims))


_KERNELS: dict[str, type[Kernel]] = {}


class Kernel(Function):
    """Base of the Functions: a subclass has ``forward``, ``setup_context`` and ``gradients`` in backward's place.

    Whatever the gradients depend on must be saved, but for the incoming ones: only through these tensors is a second
    derivative noticed.

    Attributes:
        operator: the public operators it belongs to, for messages.
        gradients: static, (ctx, saved, *incoming) -> those of all inputs; saved is ctx.saved_tensors, which can be read
            only once under activation checkpointing.
    """

    operator: str
    gradients: Callable[..., Sequence[Tensor | None]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _KERNELS[cls.__name__] = cls
        # no classmethod: compiled autograd takes none
        cls.backward = staticmethod(_backward(cls.gradients, cls.operator))  # type: ignore[method-assign]


def _backward(gradients: Callable[..., Sequence[Tensor | None]], operator: str) -> Callable[..., Any]:
    """The Function's backward: its gradients, which refuse to be differentiated in turn."""
    message = (
        f"ditfast: the gradient of {operator} has no derivative where kernels computed it; compute the forward under "
        'ditfast.ops.use_backend("torch"), and attention also under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)'
    )

    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return tuple(gradients(ctx, saved, *incoming))
        if carries_tangents((*saved, *incoming)):
            raise RuntimeError(message)
        if not torch.is_grad_enabled():
            return tuple(gradients(ctx, saved, *incoming))
        with torch.no_grad():
            results = gradients(ctx, saved, *incoming)
        return refuse_derivatives(message, results, (*saved, *incoming))

    return backward


def apply(name: str, *inputs: Any) -> Any:
    """``apply`` of the :class:`Kernel` of this name. torch.compile puts the call into its graph unchanged: Dynamo's own
    tracing of a Function fails on dynamic shapes, and on a tensor that is passed twice."""
    if torch.compiler.is_compiling():
        _allow_in_graph()
    return _apply(name, *inputs)


def _alive(x: Any) -> Any:
    """A transform's tensor that has outlived it is what it wraps."""
    return functorch.unwrap_if_dead(x) if isinstance(x, Tensor) else x


def _apply(name: str, *inputs: Any) -> Any:
    kernel = _KERNELS[name]
    if functorch.maybe_current_level() is not None:
        return kernel.apply(*inputs)  # type: ignore[no-untyped-call]
    # what that does without a transform, but for a look at the forward's signature, which takes 20 microseconds
    return super(Function, kernel).apply(*map(_alive, inputs))  # type: ignore[misc]


def _allow_in_graph() -> None:
    torch.compiler.allow_in_graph(_apply)  # imports Dynamo


_allow_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]
