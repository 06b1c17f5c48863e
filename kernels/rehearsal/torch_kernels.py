"""torch's own CPU kernels replaced by one that returns at once, so that an operator costs what comes before a launch.

torch calls most kernels of the CPU through a pointer, one for each (ATen/native/DispatchStub.h). What an operator does
before that is what it does on a GPU: the dispatcher, autograd, shapes and strides, the allocation. A GEMM in bf16 goes
that way where oneDNN is off, so it is switched off too; fp32's calls a library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .driver import stub_library, unavailable

# all return nothing; the names are those of at::native
KERNELS = (
    *("cpublas::gemm_stub", "cpublas::copy_stub", "bf16_gemv_trans_stub", "unfolded2d_copy_stub"),
    *("flash_attention_kernel", "flash_attention_backward_kernel"),
    *("LayerNormKernel", "LayerNormBackwardKernel"),
    *("GeluKernel", "GeluBackwardKernel", "silu_stub", "silu_backward_stub"),
    *("add_stub", "mul_stub", "div_true_stub", "neg_stub", "pow_tensor_scalar_stub", "exp_stub", "log_stub"),
    *("sin_stub", "cos_stub", "erf_stub", "clamp_min_scalar_stub"),
    *("eq_stub", "lt_stub", "gt_stub", "where_kernel", "index_stub"),
    *("sum_stub", "copy_stub", "fill_stub", "cat_serial_stub"),
)


@contextmanager
def nothing_computed() -> Iterator[Callable[[], int]]:
    """Within a ``with`` block none of KERNELS runs, in any thread: their results are whatever the memory held.

    Models in bf16, their losses and backwards compute nothing of size in it. What is not replaced runs, and may meet
    such values: an index must not be computed within.

    Yields:
        How many calls a replacement has taken so far.

    Raises:
        RuntimeError: no stub of the driver can be built here, with the reason, or this version of torch keeps its
            kernels elsewhere.
    """
    if (reason := unavailable()) is not None:
        raise RuntimeError(f"torch's kernels cannot be replaced: {reason}")
    stub, pointers = stub_library(), _pointers()
    replacement = ctypes.cast(stub.rehearsal_torch_kernel, ctypes.c_void_p).value
    addresses = [pointer.value for pointer in pointers]
    onednn = torch.backends.mkldnn.set_flags(False)[0]  # type: ignore[no-untyped-call]
    for pointer in pointers:
        pointer.value = replacement
    try:
        _check(stub.rehearsal_replaced_calls)
        before = stub.rehearsal_replaced_calls()
        yield lambda: int(stub.rehearsal_replaced_calls() - before)
    finally:
        for pointer, address in zip(pointers, addresses, strict=True):
            pointer.value = address
        torch.backends.mkldnn.set_flags(onednn)  # type: ignore[no-untyped-call]


def _pointers() -> list[ctypes.c_void_p]:
    """Where torch looks for kernels before it chooses among its own by the CPU's instructions."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    symbols = []
    for kernel in KERNELS:
        parts = ["at", "native", *kernel.split("::")]
        try:
            symbols.append(ctypes.c_void_p.in_dll(library, f"_ZN{''.join(f'{len(part)}{part}' for part in parts)}E"))
        except ValueError:
            raise _elsewhere(f"it has no at::native::{kernel}") from None
    return symbols


def _check(calls: Callable[[], int]) -> None:
    """Raises where a sum or a GEMM is computed all the same, or does not reach the replacement."""
    two, out = torch.empty(4, 4, dtype=torch.bfloat16), torch.empty(4, 4, dtype=torch.bfloat16)
    memory = [(ctypes.c_uint16 * 16).from_address(x.data_ptr()) for x in (two, out)]
    for function in (torch.add, torch.mm):
        for values, value in zip(memory, (0x4000, 0), strict=True):  # 2.0 and 0.0, written past torch
            values[:] = [value] * 16
        before = calls()
        function(two, two, out=out)
        if calls() == before or any(memory[1]):
            raise _elsewhere(f"{function.__name__} in bf16 was computed")


def _elsewhere(reason: str) -> RuntimeError:
    return RuntimeError(f"torch's kernels cannot be replaced: torch {torch.__version__} keeps them elsewhere, {reason}")
