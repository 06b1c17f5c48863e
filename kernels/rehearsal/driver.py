"""Rehearsals on a GPU that is not there: everything up to the launch happens, and nothing is computed.

Triton's just-in-time compiler specialises and compiles each kernel for the architecture, its launchers are built and
called, and a stub of libcuda.so.1 (stub.c) checks grids, shared memory and tensor maps as the driver would. CPU tensors
are taken to be on that GPU (launch.py); what kernels would write there is whatever the memory held.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

from .. import launch
from ..launch import Gpu

#: architecture -> the GPU that stands for it
GPUS = {
    "sm_80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108),
    "sm_86": Gpu("NVIDIA A10", (8, 6), 72),
    "sm_89": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128),
    "sm_90": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132),
    "sm_120": Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170),
}
# bytes of shared memory that a block may take (CUDA programming guide, compute capabilities)
_SHARED = {name: 1024 * {"sm_80": 163, "sm_90": 227}.get(name, 99) for name in GPUS}


# one a rehearsal: Triton keeps kernels by device, so that each begins with none
_INDICES = itertools.count(1000)


class Compilation(NamedTuple):
    """One kernel as it was compiled: what makes it another than its siblings.

    Attributes:
        kernel: its name.
        ones: run-time integers that were 1, and became constants.
        divisible: run-time integers that were multiples of 16, and are known to be.
        key: everything, these and dtypes, alignments, constants, warps and stages, as text.
    """

    kernel: str
    ones: frozenset[str]
    divisible: frozenset[str]
    key: str


@dataclass
class Rehearsal:
    """What was seen while kernels were rehearsed on ``gpu``."""

    gpu: Gpu
    compilations: list[Compilation] = field(default_factory=list)
    _counted: tuple[int, int] | None = None  # once it has ended: the library counts on

    @property
    def launches(self) -> int:
        return self._counts()[0]

    @property
    def tensor_maps(self) -> int:
        """Described to the driver, one for each operand of a kernel with TMA and launch."""
        return self._counts()[1]

    def _counts(self) -> tuple[int, int]:
        library = stub_library()
        return self._counted or (library.rehearsal_launches(), library.rehearsal_tensor_maps())

    def _note(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> None:
        """What Triton calls after each compilation, and after each that its cache on the disk saved."""
        parameters = {parameter.name: parameter for parameter in fn.jit_function.params}
        constants = {path[0]: value for path, value in compile["constants"].items() if len(path) == 1}
        divisible, ones = set(), set()
        for index, (name, parameter) in enumerate(parameters.items()):
            kind = compile["signature"][name]
            if kind == "constexpr" and not parameter.is_constexpr and constants.get(index) == 1:
                ones.add(name)
            elif isinstance(kind, str) and kind.startswith("i") and (index,) in compile["configs"][0]:
                divisible.add(name)
        self.compilations.append(
            Compilation(fn.name.rpartition(".")[2], frozenset(ones), frozenset(divisible), compile["key"])
        )


class _Driver(CudaDriver):
    """Triton's own, of a GPU that does not ask torch.cuda."""

    def __init__(self, index: int, gpu: Gpu) -> None:
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.index, self.gpu = index, gpu

    def get_current_device(self) -> int:
        return self.index

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return self.gpu.capability

    def get_current_target(self) -> GPUTarget:
        major, minor = self.gpu.capability
        return GPUTarget("cuda", 10 * major + minor, 32)


def unavailable() -> str | None:
    """Why kernels cannot be rehearsed in this process, or None."""
    if stub_library.cache_info().currsize == 0 and _has_driver():
        return "this machine has NVIDIA's driver, whose library would be taken for the stub"
    if launch.interpreting():
        return "kernels run in Triton's interpreter: unset TRITON_INTERPRET before the process starts"
    if shutil.which("gcc") is None:
        return "gcc, which builds the driver's stub and Triton's launchers, is not on the PATH"
    return None


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@contextmanager
def rehearse(arch: str) -> Iterator[Rehearsal]:
    """Within a ``with`` block the kernels launch on a GPU of this architecture that is not there, on CPU tensors.

    Args:
        arch: a key of GPUS.

    Raises:
        ValueError: unknown architecture.
        RuntimeError: kernels cannot be rehearsed in this process, with the reason, or a rehearsal is under way. Within
            the block also a launch, a tensor map or a kernel's shared memory that the GPU would refuse.
    """
    if arch not in GPUS:
        raise ValueError(f"arch must be one of {', '.join(GPUS)}, got {arch!r}")
    reason = unavailable()
    if reason is not None or launch.rehearsed is not None:
        raise RuntimeError(f"cannot rehearse: {reason or 'a rehearsal is under way'}")
    index = next(_INDICES)
    rehearsal = Rehearsal(GPUS[arch])
    library, active = stub_library(), triton.runtime.driver._active
    library.rehearsal_begin(rehearsal.gpu.multiprocessors, _SHARED[arch])
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.runtime.driver.set_active(_Driver(index, rehearsal.gpu))
    triton.knobs.runtime.jit_post_compile_hook = rehearsal._note
    launch.rehearsed = index, rehearsal.gpu
    try:
        yield rehearsal
    finally:
        rehearsal._counted = rehearsal._counts()
        launch.rehearsed = None
        triton.knobs.runtime.jit_post_compile_hook = hook
        triton.runtime.driver._active = active


@lru_cache(maxsize=1)
def stub_library() -> ctypes.CDLL:
    """The stub, built against the cuda.h in Triton's wheel, and in the place where launchers look for the driver."""
    folder = Path(tempfile.mkdtemp(prefix="ditfast-rehearsal-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("stub.c")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-I", str(include)]
    built = subprocess.run([*command, str(source), "-o", str(library)], capture_output=True, text=True, check=False)
    if built.returncode:
        raise RuntimeError(f"gcc could not build the driver's stub: {built.stderr.strip()}")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    torch.cuda.is_available()  # answered once and for all, before a driver is found that torch cannot use
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    for name in ("launches", "tensor_maps", "replaced_calls"):
        getattr(loaded, f"rehearsal_{name}").restype = ctypes.c_long
    return loaded
