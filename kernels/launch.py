"""Where kernels run: which GPU a tensor is on, what that GPU is, and launches that go there.

Kernels and operators learn about a GPU only here, so that a rehearsal (rehearsal/) can replace torch.cuda's answers.
Importing this needs no triton.

Triton compiles a kernel once more where an integer argument becomes 1, or a multiple of 16. Those that change with the
batch or the tokens and gain nothing by it are kept out of this (do_not_specialize, at each kernel).

A launcher is a plan: a class made from tensors, which decides grids and arguments by their layouts alone, and whose
call takes tensors of these layouts, allocates the results and launches. :func:`planned` keeps the plans, so that a
layout is looked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import lru_cache, reduce
from operator import or_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


class Gpu(NamedTuple):
    """A GPU as far as a launch depends on it.

    Attributes:
        name: as its driver gives it.
        capability: major and minor.
        multiprocessors: their number.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int


#: while kernels are rehearsed: (index, GPU) that CPU tensors are taken to be on
rehearsed: tuple[int, Gpu] | None = None


def on_gpu(x: Tensor) -> bool:
    """Whether x is on a CUDA device."""
    return x.is_cuda or (rehearsed is not None and x.is_cpu)


def gpu_index(x: Tensor) -> int | None:
    """x's CUDA device, or None."""
    if x.is_cuda:
        return x.get_device()
    return rehearsed[0] if rehearsed is not None and x.is_cpu else None


def gpu_exists() -> bool:
    """Whether there is any; a fake tensor may be on one all the same."""
    return rehearsed is not None or torch.cuda.is_available()


def gpu(index: int) -> Gpu:
    """The GPU of this index."""
    return rehearsed[1] if rehearsed is not None and rehearsed[0] == index else _cuda_gpu(index)


@lru_cache(maxsize=64)
def _cuda_gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: decided by TRITON_INTERPRET when they were defined."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def uses_tf32(dtype: torch.dtype) -> bool:
    """Whether matmuls of this dtype run in TF32: fp32's, by whichever of torch's two interfaces that was allowed."""
    return dtype is torch.float32 and bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory of x's shape and device."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


Layouts = tuple[Hashable, ...]
Plan = TypeVar("Plan", bound=Callable[..., Any])
Kept = TypeVar("Kept")

_MOST_PLANS = 4096
_plans: dict[Hashable, Any] = {}


def layouts(tensors: Sequence[Tensor | None]) -> Layouts | None:
    """What a launch depends on besides addresses and values; None where a tensor is not plain, is not contiguous along
    its last axis, or is a view that negates what it reads."""
    key: list[Hashable] = [rehearsed]
    for x in tensors:
        if x is None:
            key.append(None)
            continue
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
            return None
        stride = x.stride()
        if stride[-1:] != (1,) or x.is_neg() or not _has_memory(x):
            return None
        key += (x.shape, stride, x.dtype, x.device)
    return tuple(key)


def _has_memory(x: Tensor) -> bool:
    """Not so a batch of vmap's, what outlives a transform, or zeros that autograd has not made yet."""
    try:
        return x.data_ptr() != 0 or not x.numel()
    except RuntimeError:
        return False


def kept(key: Hashable) -> Any:
    """The plan that was kept by this key, or None; None of None, which Dynamo traces without a look at the plans."""
    return None if key is None else _plans.get(key)


def keep(key: Hashable, plan: Kept) -> Kept:
    """Keeps a plan by a key of the layouts and of all else that it was made from."""
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def planned(
    make: Callable[..., Plan],
    tensors: Sequence[Tensor | None],
    *constants: Hashable,
    key: Layouts | None = None,
    tf32: bool = False,
) -> Plan:
    """make(tensors, *constants), or the plan that was made of such tensors before.

    Args:
        key: the tensors' layouts, where they are known.
        tf32: whether matmuls of fp32 tensors run in TF32, where there are any: the plan goes by it.
    """
    key = key or layouts(tensors)
    if key is None:
        return make(tensors, *constants)
    full = make, constants, key, tf32
    return _plans.get(full) or keep(full, make(tensors, *constants))


def forget() -> None:
    """Makes the next launches read the tuned tables again."""
    _plans.clear()


class Launch:
    """A kernel's launch on one GPU but for its tensors, the kernel's first parameters.

    It serves tensors of one set of dtypes. Triton's JIT compiles in the first call and launches the first ones; once
    all tensors began at multiples of 16 bytes, which the JIT compiles another kernel for, calls with such tensors
    launch that kernel directly.
    """

    __slots__ = ("_compiled", "grid", "index", "kernel", "options", "rest")

    def __init__(self, x: Tensor, kernel: Any, grid: tuple[int, ...], rest: tuple[Any, ...], **options: Any) -> None:
        """x: a tensor on the GPU; rest: the arguments after the tensors; options: warps, stages, registers."""
        self.index = gpu_index(x)
        self.kernel, self.grid, self.rest, self.options = kernel, grid, rest, options
        self._compiled: tuple[Any, ...] | None = None

    @classmethod
    def named(cls, x: Tensor, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> Launch:
        """From arguments by name, among them tensors, which are left out, and options."""
        names = [name for name in kernel.arg_names if not name.endswith("_ptr")]
        options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
        return cls(x, kernel, grid, tuple(arguments[name] for name in names), **options)

    def __call__(self, *tensors: Any) -> None:
        """tensors: or None, tuples of tensors, or Triton's TensorDescriptors."""
        low_bits = 0
        addresses: list[Any] = []
        for x in tensors:
            if x is None:
                addresses.append(None)
            elif isinstance(x, Tensor):
                addresses.append(x.data_ptr())
                low_bits |= addresses[-1]
            elif type(x) is tuple:
                addresses.append(tuple([part.data_ptr() for part in x]))
                low_bits = reduce(or_, addresses[-1], low_bits)
            else:
                addresses.append(x)  # whose address must be aligned
        compiled = self._compiled
        if compiled is None or low_bits & 15 or _is_watched(self.kernel, compiled[0]):
            self._by_jit(tensors, aligned=not low_bits & 15)
            return
        _, run = compiled
        if rehearsed is not None:
            run(0, *addresses, *self.rest)
        elif torch._C._cuda_getDevice() == self.index:
            run(torch._C._cuda_getCurrentRawStream(self.index), *addresses, *self.rest)
        else:
            with torch.cuda.device(self.index):
                run(torch._C._cuda_getCurrentRawStream(self.index), *addresses, *self.rest)

    def _by_jit(self, tensors: tuple[Any, ...], aligned: bool) -> None:
        from triton import knobs

        on_gpu = rehearsed is None and self.index is not None
        with torch.cuda.device(self.index) if on_gpu else nullcontext():
            compiled = self.kernel[self.grid](*tensors, *self.rest, **self.options)
        # Triton's interpreter returns nothing
        if aligned and compiled is not None:
            self._compiled = knobs.runtime, _runner(compiled, (*self.grid, 1, 1)[:3])


def _runner(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """(stream, *arguments) -> a launch of Triton's compiled kernel, as its JIT makes it but for hooks."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(stream: int, *arguments: Any) -> None:
        run(*grid, stream, function, metadata, None, None, None, *arguments)

    if run.global_scratch_size or run.profile_scratch_size:
        return launch
    # what run does without memory of its own, a microsecond sooner
    flags = run.launch_cooperative_grid, run.launch_pdl
    if hasattr(run, "kernel_signature"):  # triton 3.7
        raw, annotations, signature = run.launch, run.arg_annotations, run.kernel_signature
        rest = *flags, metadata, None, None, None, None, None, annotations, signature
        return lambda stream, *arguments: raw(*grid, stream, function, *rest, arguments)
    rest = *flags, None, None, metadata, None, None, None
    return lambda stream, *arguments: run.launch(*grid, stream, function, *rest, *arguments)


def _is_watched(kernel: Any, knobs: Any) -> bool:
    """Whether hooks (a profiler's) want to know of launches."""
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    return bool(kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
