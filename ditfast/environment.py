"""The environment of a measurement: versions, commit, processor and GPU, as plain JSON values; None where absent."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ditfast

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "triton", "numpy", "diffusers", "safetensors", "flash-attn")
_NO_SOURCE = ("test_", "conftest")
_SMI_FIELDS = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.current.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.current.memory",
    "power_limit_w": "power.limit",
    "power_draw_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


def collect(device_index: int | None = None) -> dict[str, Any]:
    """The environment of this process.

    Args:
        device_index: the CUDA device to describe; the current one by default.

    Returns:
        ``ditfast`` (version), ``commit`` and ``dirty`` (None outside a checkout), ``source`` (a digest of the code and
        its tables, which tells versions apart where there is no checkout), ``python``, ``packages``
        (name -> version), ``os``, ``cpu`` (``model``, ``cores``, ``torch_threads``) and ``gpu`` (None without one).
    """
    commit, dirty = _git_state()
    return {
        "ditfast": ditfast.__version__,
        "commit": commit,
        "dirty": dirty,
        "source": _source_digest(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in _PACKAGES},
        # not the kernel's release, which names a host rather than a condition
        "os": " ".join(part for part in (platform.system(), platform.machine(), *platform.libc_ver()) if part),
        "cpu": {"model": cpu_model(), "cores": cpu_cores(), "torch_threads": _torch_threads()},
        "gpu": _gpu(device_index),
    }


def gpu_readings() -> dict[str, Any]:
    """The current GPU's clocks, power and temperature at this moment; None where they cannot be read."""
    gpu = _gpu(None) or {}
    return {name: gpu.get(name) for name in _SMI_FIELDS if name != "driver"}


def parse_device(name: str | None) -> torch.device:
    """The device of "cpu", "cuda" (the first) or "cuda:N"; None is CUDA where there is a GPU, and else the CPU.

    Raises:
        ValueError: another name, or a device that is not there.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    # with its number: torch.cuda.set_device takes no other
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def package_version(name: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, bool | None]:
    """(commit, uncommitted changes) of the checkout ditfast runs from."""
    here = str(Path(ditfast.__file__).resolve().parent)
    # an environment that lies inside some other repository is no checkout of ditfast
    git = ("git", "-c", "safe.directory=*", "-C", here)  # reading a checkout of another user is harmless
    if _output(*git, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit = _output(*git, "rev-parse", "HEAD")
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


@lru_cache(maxsize=1)
def _source_digest() -> str:
    """A digest of the Python files and launch tables that run, by path and content: without results, and without what
    only plans and shows."""
    here = Path(ditfast.__file__).resolve().parent
    digest = hashlib.sha256()
    for room in ("", "kernels", "bench"):  # the latter two are links in a checkout
        base = (here / room).resolve()
        for path in sorted(item for item in base.rglob("*") if item.suffix in (".py", ".json")):
            name = path.relative_to(base)
            elsewhere = name.parts[0] in ("kernels", "bench", "results", "report", "campaign")
            if not elsewhere and not name.name.startswith(_NO_SOURCE):
                digest.update(f"{room}/{name.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cpu_model() -> str | None:
    """The processor's name, or None where the system does not tell it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or None


def cpu_cores() -> int | None:
    """The cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def gpu_properties(index: int) -> dict[str, Any]:
    """``name``, ``capability``, ``multiprocessors`` and ``memory_bytes`` of a CUDA device that is there."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def _gpu(device_index: int | None) -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device_index is None else device_index
    gpu = {
        **gpu_properties(index),
        "count": torch.cuda.device_count(),
        "l2_bytes": getattr(torch.cuda.get_device_properties(index), "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
    }
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    # by uuid, because CUDA_VISIBLE_DEVICES renumbers torch's devices and not nvidia-smi's
    return gpu | _nvidia_smi(f"GPU-{uuid}" if uuid is not None else str(index))


def _nvidia_smi(identifier: str) -> dict[str, Any]:
    absent: dict[str, Any] = dict.fromkeys(_SMI_FIELDS)
    query = f"--query-gpu={','.join(_SMI_FIELDS.values())}"
    line = _output("nvidia-smi", "-i", identifier, query, "--format=csv,noheader,nounits")
    values = [value.strip() for value in (line or "").splitlines()[0].split(",")] if line else []
    if len(values) != len(_SMI_FIELDS):
        return absent
    return {name: _value(name, text) for name, text in zip(_SMI_FIELDS, values, strict=True)}


def _value(name: str, text: str) -> str | float | None:
    """A field of nvidia-smi; it prints "[N/A]" and the like where the device has no such reading."""
    if name == "driver":
        return text or None
    try:
        return float(text)
    except ValueError:
        return None


def _output(*command: str) -> str | None:
    """A command's stdout, or None where the command is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return result.stdout.strip()


def cache_folder() -> Path:
    """Where Triton keeps what it compiles, in this process; no triton is needed to ask."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
