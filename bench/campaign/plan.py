"""What a campaign does, in order of value: parity and the compilers' caches, then the figures, ours before rivals'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import ditfast

from ..cases.diffusers_dit import missing
from .run import Step

_BENCH = ("-m", "ditfast", "bench")
_SDPA = "sdpa-cudnn,sdpa-flash,sdpa-efficient,flash-attn-2,flash-attn-3,flash-attn-4"
# which models a step is about, by their size at patch size 2
_XL, _S, _OTHERS = ("XL",), ("S",), ("S", "B", "L")

#: what stands for sizes, and for who compiles, while the plan is rehearsed on a CPU
_TINY = {
    "--batch": {"256": "3", "128": "2", "64": "3", "32": "2", "16": "1", "8": "2"},
    "--tokens": {"256": "16", "1024": "17"},
    "--width": {"1152": "144", "1024": "64"},
    "--steps": {"50": "2"},
    "--image-size": {"256": "64"},
    # where nobody else is asked for
    "--providers": {
        "reference-compile": "reference",
        "reference-compile,ditfast-graph": "reference,ditfast",
        "reference-reduce-overhead,ditfast-graph": "ditfast",
    },
}
#: for the steps of a rehearsal: the formulas, and no compiler
REHEARSAL_VARIABLES = {
    "TRITON_INTERPRET": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


def plan(device: str = "cuda", rehearsal: bool = False) -> list[Step]:
    """The steps; in a rehearsal the same ones, on a CPU and with a tiny model in place of each.

    Args:
        device: "cuda" or "cuda:N".
        rehearsal: whether only the plan itself is tried.
    """
    steps = _steps()
    if rehearsal:
        return [_tiny(step) for step in steps]
    on = ("--device", device)
    return [step if step.name == "gpu-tests" else replace(step, command=(*step.command, *on)) for step in steps]


def _steps() -> list[Step]:
    few = "reference,reference-compile,ditfast"
    graphs = f"{few},ditfast-graph"
    eager = "eager,compile,ditfast"
    tuned = "reference-max-autotune,ditfast"
    fused = ("gated_residual_layer_norm_modulate",)
    return [
        # nothing of these is timed
        _warm_up("warm-up-forward", "forward-xl2", "forward", 256, "reference-compile,ditfast-graph"),
        _warm_up("warm-up-batch-1", "forward-xl2-1", "forward", 1, "reference-reduce-overhead,ditfast-graph"),
        _warm_up("warm-up-train", "train-xl2-compile", "train", 128, "reference-compile"),
        _verify(),
        _models("forward-xl2", 80, "DiT-XL/2, forward", _XL, "forward", 256, graphs),
        _ops("adaln", 30, "the fused adaLN operator", fused, *_of(_XL), *("--batch", "256", "--providers", eager)),
        _models("train-xl2", 50, "DiT-XL/2, training step", _XL, "train", 128, "reference,ditfast"),
        _attention("attention-256", 256, 64),
        _attention("attention-1024", 1024, 16),
        _models(
            *("forward-xl2-1", 60, "DiT-XL/2, one image", _XL, "forward", 1),
            "reference,reference-reduce-overhead,ditfast,ditfast-graph",
        ),
        _models("train-xl2-compile", 90, "the training step beside compile", _XL, "train", 128, few),
        _ops(
            *("epilogues", 40, "GEMMs with an epilogue beside the library's", ("linear_gelu", "linear_gated_residual")),
            *("--direction", "forward", *_of(_XL), "--batch", "256", "--providers", "eager,compile,gemm,ditfast"),
        ),
        _models("train-s2", 90, "DiT-S/2, training step", _S, "train", 256, few),
        _tune(),
        _models("forward-others", 200, "the other sizes, forward", _OTHERS, "forward", 256, graphs),
        _models("train-others", 200, "the other sizes, training step", _OTHERS, "train", 128, few),
        _gpu_tests(),
        _sample("sample", 100, "sampling with DiT-XL/2", *_of(_XL), "--batch", "1", "--batch", "8", "--steps", "50"),
        _memory("memory", 60, "memory of the training step", (*_XL, *_S), "train", 32, "reference,ditfast"),
        _models("guided", 100, "guided forward", (*_XL, *_OTHERS), "cfg", 32, graphs),
        _models("checkpointed", 100, "training with activation checkpointing", _XL, "train-checkpoint", 32, few),
        _ops("ops", 200, "every operator", (), *_of(_XL + _S), *("--batch", "256", "--providers", eager)),
        _suite("scaling", "scaling", 200, "time against tokens, batch and width", "--providers", "reference,ditfast"),
        _models("autotune", 200, "beside max-autotune", _XL, "forward", 256, f"{tuned},ditfast-graph"),
        _models("autotune-train", 200, "training beside max-autotune", _XL, "train", 128, tuned),
        _ops(
            *("autotune-ops", 200, "operators beside max-autotune", ()),
            *(*_of(_XL), "--batch", "256", "--providers", "max-autotune,ditfast"),
        ),
    ]


def _of(sizes: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for size in sizes for word in ("--model", f"DiT-{size}/2"))


def _case(sizes: Sequence[str], mode: str, batch: int, providers: str) -> tuple[str, ...]:
    return (*_of(sizes), "--mode", mode, "--batch", str(batch), "--providers", providers, "--image-size", "256")


def _warm_up(name: str, serves: str, mode: str, batch: int, providers: str) -> Step:
    command = (*_BENCH, "models", *_case(_XL, mode, batch, providers), "--warm-up")
    return Step(name, command, "the compilers' caches", limit=150, beside=True, fine=(), serves=(serves,))


def _verify() -> Step:
    command = ("-m", "ditfast", "verify", "--json", "{json}", "--continue")
    return Step("verify", command, "parity of every operator and design", limit=150, beside=True, suite=True)


def _suite(name: str, suite: str, limit: float, title: str, *arguments: str) -> Step:
    """A step of a suite that goes on with its file."""
    goes_on = ("--json", "{json}", "--continue", "--budget", "{seconds}")
    return Step(name, (*_BENCH, suite, *arguments, *goes_on), title, limit, suite=True)


def _models(name: str, limit: float, title: str, sizes: Sequence[str], mode: str, batch: int, providers: str) -> Step:
    return _suite(name, "models", limit, title, *_case(sizes, mode, batch, providers))


def _memory(name: str, limit: float, title: str, sizes: Sequence[str], mode: str, batch: int, providers: str) -> Step:
    return _suite(name, "memory", limit, title, *_case(sizes, mode, batch, providers), "--no-search")


def _ops(name: str, limit: float, title: str, operators: Sequence[str], *arguments: str) -> Step:
    return _suite(name, "ops", limit, title, *(word for name in operators for word in ("--operator", name)), *arguments)


def _attention(name: str, tokens: int, batch: int) -> Step:
    """Head dims 72 and 64, beside every other implementation."""
    shape = ("--width", "1152", "--width", "1024", "--tokens", str(tokens), "--batch", str(batch))
    providers = ("--providers", f"{_SDPA},ditfast,ditfast-triton,eager")
    return _ops(name, 40, f"attention, {tokens} tokens", ("self_attention",), *shape, *providers)


def _sample(name: str, limit: float, title: str, *arguments: str) -> Step:
    """A step of sampling, whose solvers are diffusers'."""
    return replace(_suite(name, "sample", limit, title, *arguments, "--image-size", "256"), skip=missing() or "")


def _tune() -> Step:
    """``ditfast tune``, into a file of its own: tables that changed on the way would be other conditions. Not .json,
    for it is no result; copied to kernels/configs/<gpu>.json it is in use."""
    command = ("-m", "ditfast", "tune", *_of(_XL), "--out", "{json}.table", "--budget", "{seconds}")
    left_over = r"\b[1-9]\d* left for another run"
    return Step("tune", command, "launch configurations of DiT-XL/2", limit=60, left_over=left_over, fine=())


def _gpu_tests() -> Step:
    """``pytest -m gpu``, where the tests are there: an installed ditfast does not bring them."""
    tests = Path(ditfast.__file__).resolve().parents[1] / "tests"
    skip = "" if (tests / "conftest.py").exists() else "no tests beside an installed ditfast; run from a checkout"
    if not skip and find_spec("pytest") is None:
        skip = "the package pytest is not installed"
    # not the strict configuration of the development environment, whose plugins may be absent here
    lenient = ("-o", "addopts=--import-mode=importlib", "--rootdir", str(tests.parent))
    side_by_side = ("-n", "8") if find_spec("xdist") is not None else ()
    command = ("-m", "pytest", "-q", "-m", "gpu", *side_by_side, *lenient, str(tests))
    return Step("gpu-tests", command, "the tests that need a GPU", limit=200, fine=(), skip=skip)


def _tiny(step: Step) -> Step:
    """The step on a CPU, with small models of the same names and every other size replaced."""
    if step.name == "gpu-tests":
        return replace(step, skip=step.skip or "they need a GPU")
    words: list[str] = []
    for word in step.command:
        words.append(_TINY.get(words[-1], {}).get(word, word) if words else word)
    words[1] = "ditfast.cli.rehearsed"
    suite = words[3] if words[2] == "bench" else words[2]
    untimed = suite == "memory" or "--warm-up" in words
    more = {
        "tune": ("--dry-run",),
        "verify": ("--device", "cpu", "--dtype", "fp32"),
        "scaling": ("--device", "cpu", "--seconds", "0.01", "--batch", "1", "--tokens", "16", "--width", "36"),
    }
    usual = ("--device", "cpu", *(() if untimed else ("--seconds", "0.01")))
    return replace(step, command=(*words, *more.get(suite, usual)))
