"""What a provider makes of a call: torch.compile, or a CUDA graph over static buffers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ...environment import cache_folder
from .workload import Call, Inputs


def compile_unavailable(device: torch.device) -> str | None:
    """Why torch.compile cannot work on a device, or None."""
    for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(name) == "1":  # what it returns would be eager under another name
            return f"torch.compile is switched off by {name}"
    if device.type == "cuda":
        return None if find_spec("triton") is not None else "torch.compile on a GPU needs the package triton"
    return _no_compiler()


def compiled(call: Call, mode: str = "default") -> Call:
    """The call under torch.compile, with nothing left to eager."""
    # Inductor points all of Triton to a folder of its own where nobody has chosen one: past what is compiled ahead
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder()))
    # a graph break or an exhausted recompile limit would quietly time eager code under this name
    function = torch.compile(call, fullgraph=True, dynamic=False, mode=mode)
    if mode != "reduce-overhead":
        return function
    from torch._dynamo.utils import counters

    skipped = counters["inductor"]["cudagraph_skips"]

    def step(inputs: Inputs) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last step's output may be overwritten
        output = function(inputs)
        if counters["inductor"]["cudagraph_skips"] > skipped:
            # which it only logs; without graphs this would be the default mode under another name
            raise RuntimeError("torch.compile has skipped CUDA graphs, which this mode is for")
        return output

    return step


def graphed(call: Call) -> Call:
    """A CUDA graph over static buffers, captured at the first call; the copies in are part of each call."""
    static: Inputs = ()
    output: Tensor | None = None
    graph = torch.cuda.CUDAGraph()

    def step(inputs: Inputs) -> Tensor:
        nonlocal static, output
        if output is None:
            static = tuple(tensor.clone() for tensor in inputs)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries set up their workspaces outside the capture
                    call(static)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                output = call(static)
        for buffer, tensor in zip(static, inputs, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return output

    return step


def captured(call: Callable[[int], object], count: int) -> Callable[[], object]:
    """A CUDA graph of ``count`` calls, numbered from 0, to replay: their time without that of launching.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a backward runs on the stream of its forward, which must be the captured one
        for number in range(count):
            call(number)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for number in range(count):
            call(number)

    def replay() -> None:
        _ = call  # what it keeps between calls, such as what a forward saved, is what the graph reads
        graph.replay()

    return replay


@lru_cache(maxsize=1)
def _no_compiler() -> str | None:
    """Why torch.compile cannot work on the CPU: it builds C++ with Python's headers and OpenMP."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        return f"torch.compile on the CPU needs a C++ compiler, and there is no {name}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n")
        include = f"-I{sysconfig.get_paths()['include']}"
        command = [name, "-shared", "-fPIC", "-fopenmp", include, str(source), "-o", str(source.with_suffix(".so"))]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        except subprocess.CalledProcessError as error:
            first = next((line for line in error.stderr.splitlines() if "error" in line), "it fails on a small program")
            return f"torch.compile on the CPU needs a working C++ compiler; {name} says: {first.strip()}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"torch.compile on the CPU needs a working C++ compiler; {name}: {error}"
    return None
