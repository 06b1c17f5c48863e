"""The implementations of self_attention: what each library needs, how it is called, and which one "auto" takes."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import launch
from ..reference import ops as formulas
from ..reference.transforms import refuse_second_order

AttentionBackend = Literal[
    "triton", "sdpa", "cudnn", "flash", "efficient", "flash_attn", "flash_attn_3", "flash_attn_4"
]
MAX_HEAD_DIM = 128  # of this project's kernels: a head's accumulators stay in registers


def _can_use_cudnn(parameters: Any, debug: bool) -> bool:
    # a CUDA build of torch asks the driver whatever the tensors are, and raises where there is none
    return bool(parameters.query.is_cuda) and torch.backends.cuda.can_use_cudnn_attention(parameters, debug)


#: backend -> (the kernel of scaled_dot_product_attention, the function that says whether it can run)
_SDPA: dict[str, tuple[SDPBackend, Callable[[Any, bool], bool]]] = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, _can_use_cudnn),
    "flash": (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.can_use_flash_attention),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.can_use_efficient_attention),
}


class _Package(NamedTuple):
    """A package of FlashAttention: where its function is, how to get it, and for which GPUs and heads it is."""

    module: str
    function: str
    packed: bool  # takes (B, T, 3, H, head_dim), so that its gradient is one tensor too
    install: str
    majors: tuple[int, int]  # of the compute capability, from and to
    max_head_dim: int


PACKAGES = {
    "flash_attn": _Package(
        "flash_attn.flash_attn_interface",
        "flash_attn_qkvpacked_func",
        True,
        "flash-attn (pip install ditfast[flash])",
        (8, 12),
        256,
    ),
    "flash_attn_3": _Package(
        "flash_attn_interface",
        "flash_attn_qkvpacked_func",
        True,
        "flash-attn-3 (hopper/ of its repository)",
        (9, 9),
        256,
    ),
    "flash_attn_4": _Package(
        "flash_attn.cute", "flash_attn_func", False, "flash-attn-4 (pip install flash-attn-4)", (9, 11), 128
    ),
}


def machine_reason(backend: AttentionBackend, gpu: int | None) -> str | None:
    """Why a library's implementation cannot run on a CUDA device whatever the tensors, or None.

    Args:
        backend: any but "triton", whose kernels :mod:`ditfast.ops.backend` knows.
        gpu: index of the device; None for tensors elsewhere.
    """
    if backend == "sdpa":
        return None
    if gpu is None or not torch.cuda.is_available():
        return "it needs a CUDA GPU"
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs"
    package = PACKAGES.get(backend)
    if package is None:
        return None
    major, minor = torch.cuda.get_device_capability(gpu)
    first, last = package.majors
    if not first <= major <= last:
        supported = f"sm_{first}0" + ("" if last == first else f" to sm_{last}x")
        return f"it needs {supported}, the GPU is sm_{major}{minor}"
    return import_reason(backend)


@lru_cache(maxsize=8)
def import_reason(backend: str) -> str | None:
    """Why a package of FlashAttention cannot be imported, or None."""
    package = PACKAGES[backend]
    try:
        _function(backend)
    except ModuleNotFoundError as error:
        # the packages share a namespace: one may be installed without the other
        if error.name and package.module.startswith(error.name):
            return f"the package {package.install} is not installed"
        return f"the package {package.install} cannot be imported: {error}"
    except Exception as error:  # built for another torch or CUDA: anything from a linker's OSError on
        return f"the package {package.install} cannot be imported: {' '.join(str(error).split())}"
    return None


@lru_cache(maxsize=8)
def _function(backend: str) -> Callable[..., Any]:
    package = PACKAGES[backend]
    return cast("Callable[..., Any]", getattr(importlib.import_module(package.module), package.function))


def _traceable_function(backend: str) -> Callable[..., Any]:
    """Dynamo looks through a cache's wrapper, at an import that it cannot trace."""
    return _function(backend)


_traceable_function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def case_reason(
    backend: AttentionBackend, head_dim: int, dtype: torch.dtype, biased: bool, training: bool, major: int
) -> str | None:
    """Why a package of FlashAttention does not take such tensors on a GPU of this major capability, or None."""
    package = PACKAGES.get(backend)
    if package is None:
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bf16 or fp16, qkv has {dtype}"
    if biased:
        return "it takes no additive bias"
    if head_dim % 8 or head_dim > package.max_head_dim:
        return f"it needs a head dim that is a multiple of 8 and at most {package.max_head_dim}, got {head_dim}"
    if training and backend == "flash_attn_4" and major == 9:
        return "its backward is not deterministic on Hopper"
    return None


def library_reason(
    backend: AttentionBackend, qkv: Tensor, num_heads: int, bias: Tensor | None, training: bool
) -> str | None:
    """Why a library's implementation cannot take these tensors, or None."""
    head_dim = qkv.shape[2] // (3 * num_heads)
    gpu = qkv.get_device() if qkv.is_cuda else None
    if backend == "cudnn" and training and bias is not None and bias.requires_grad:
        return "torch has no gradient of a bias for cuDNN's attention"
    reason = machine_reason(backend, gpu)
    if reason is None and backend in PACKAGES:
        major = torch.cuda.get_device_capability(gpu)[0]
        reason = case_reason(backend, head_dim, qkv.dtype, bias is not None, training, major)
    if reason is not None or backend not in _SDPA or torch.compiler.is_compiling():
        return reason
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if _sdpa_runs(backend, qkv, num_heads, bias, debug=True):
            return None
    if backend == "cudnn" and _cudnn_is_wrong_at(qkv.shape[1]):
        return "cuDNN before 9.15.1 is wrong where the tokens are no multiple of 128"
    return "; ".join(" ".join(str(warning.message).split()) for warning in caught) or "torch refuses these tensors"


def _sdpa_runs(backend: str, qkv: Tensor, num_heads: int, bias: Tensor | None, debug: bool = False) -> bool:
    """Whether a kernel of SDPA takes these tensors; with ``debug`` torch warns of why not."""
    if backend == "cudnn" and _cudnn_is_wrong_at(qkv.shape[1]):
        return False
    q, k, v = formulas.split_heads(qkv, num_heads)
    if bias is not None:
        bias = bias.expand(len(q), num_heads, qkv.shape[1], qkv.shape[1])
    kernel, can_use = _SDPA[backend]
    # no dropout, no causal mask, no grouped queries
    parameters = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, False, False)
    with sdpa_kernel(kernel):
        return can_use(parameters, debug)


def _cudnn_is_wrong_at(tokens: int) -> bool:
    """pytorch/pytorch#169849: the wheels for CUDA 12 come with such a version."""
    return tokens % 128 != 0 and (torch.backends.cudnn.version() or 0) < 91501


def run_library(
    backend: AttentionBackend,
    qkv: Tensor,
    num_heads: int,
    scale: float | None,
    bias: Tensor | None,
    deterministic: bool = True,
    alone: bool = False,
) -> Tensor:
    """(B, T, D) by a library's implementation.

    Args:
        deterministic: of a package of FlashAttention: with the backward that adds in a fixed order.
        alone: of SDPA: only this kernel; else torch chooses another where it cannot run.
    """
    if backend in PACKAGES:
        return _flash_attention(backend, qkv, num_heads, scale, deterministic)
    if backend == "sdpa" or not (alone or _sdpa_runs(backend, qkv, num_heads, bias)):
        return formulas.self_attention(qkv, num_heads, scale, bias)
    with sdpa_kernel(_SDPA[backend][0]):
        return formulas.self_attention(qkv, num_heads, scale, bias)


def _flash_attention(
    backend: str, qkv: Tensor, num_heads: int, scale: float | None, deterministic: bool
) -> Tensor:
    batch, tokens, width = qkv.shape
    packed = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads))
    inputs = (packed,) if PACKAGES[backend].packed else packed.unbind(2)
    out = _traceable_function(backend)(*inputs, softmax_scale=scale, deterministic=deterministic)
    if isinstance(out, tuple):  # some versions return the log-sum-exp too
        out = out[0]
    refuse_second_order(
        out, "", f'ditfast: the gradient of self_attention by "{backend}" has no derivative; give backend="sdpa" under '
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)",
    )  # fmt: skip
    return cast(Tensor, out).reshape(batch, tokens, width // 3)


class Case(NamedTuple):
    """What the choice depends on besides the GPU; ``training``: whether a gradient will be wanted."""

    tokens: int
    head_dim: int
    dtype: torch.dtype
    biased: bool
    training: bool


# what a GPU's table says: (training, dtype, head_dim, tokens at most, backend) of each entry
_Entries = tuple[tuple[bool, torch.dtype, int, int, AttentionBackend], ...]


def choose(case: Case, gpu: int | None) -> AttentionBackend:
    """The implementation "auto" takes on a CUDA device that runs the Triton kernels.

    Args:
        gpu: its index; None for a fake one, which has neither packages nor a table.
    """
    return _choose(case, gpu) if torch.compiler.is_compiling() else _chosen_before(case, gpu)


def _choose(case: Case, gpu: int | None) -> AttentionBackend:
    major, entries = _gpu_facts(gpu)
    for training, dtype, head_dim, tokens, backend in () if case.biased else entries:
        # a bucket ends at its power of two and begins behind the one before
        same = (training, dtype, head_dim) == (case.training, case.dtype, case.head_dim)
        if same and tokens < 2 * max(case.tokens, 1) <= 2 * tokens and _applies(backend, case, major, gpu):
            return backend
    return heuristic(case, major, lambda package: _applies(package, case, major, gpu))


_chosen_before = lru_cache(maxsize=4096)(_choose)


def _applies(backend: AttentionBackend, case: Case, major: int, gpu: int | None) -> bool:
    if backend == "triton":
        return case.head_dim <= MAX_HEAD_DIM
    if backend == "sdpa" or torch.compiler.is_compiling():
        return backend == "sdpa"
    refused = case_reason(backend, case.head_dim, case.dtype, case.biased, case.training, major)
    return gpu is not None and refused is None and machine_reason(backend, gpu) is None


def heuristic(
    case: Case, major: int, installed: Callable[[AttentionBackend], bool] = lambda package: False
) -> AttentionBackend:
    """The choice without a table.

    This project's kernels take head dims that the libraries pad (72 runs as 80 here, as 96 or 128 there), and
    training, where their gradients land in the packed projection and SDPA's are copied twice. The rest is
    inference at 64 and 128: FlashAttention's package for the architecture where it is installed (by its authors' and
    others' figures the fastest there), else SDPA, which runs FlashAttention 2, or on Hopper a recent cuDNN.

    Args:
        major: of the compute capability.
        installed: whether a package of FlashAttention is installed and takes the case.
    """
    # rows of other head dims are no multiples of 16 bytes
    fits = case.head_dim % 8 == 0 and case.head_dim <= MAX_HEAD_DIM
    if fits and (case.training or case.head_dim & (case.head_dim - 1) != 0):
        return "triton"
    package: AttentionBackend = "flash_attn_3" if major == 9 else "flash_attn_4"
    return package if major >= 9 and installed(package) else "sdpa"


def _gpu_facts(gpu: int | None) -> tuple[int, _Entries]:
    """A GPU's major capability and its table: constant while a process runs (but for tuning), and so for Dynamo. No
    NamedTuple: Dynamo does not unpack one that is a constant."""
    return _facts(gpu)


_gpu_facts._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=32)
def _facts(gpu: int | None) -> tuple[int, _Entries]:
    if gpu is None:
        return 8, ()
    from ..kernels.configs import tables  # imports triton

    entries = []
    for key, fields in tables.load(launch.gpu(gpu).name).items():
        operator, dtype, *sizes = key.split("/")
        if operator in ("attention_inference", "attention_training") and len(sizes) == 2 and "candidate" in fields:
            head_dim, tokens = map(int, sizes)
            training = operator == "attention_training"
            entries.append((training, getattr(torch, dtype), head_dim, tokens, fields["candidate"]))
    return launch.gpu(gpu).capability[0], tuple(entries)


def forget() -> None:
    """Makes the next choice read the tables again."""
    _facts.cache_clear()
    _chosen_before.cache_clear()
