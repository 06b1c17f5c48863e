"""The conditioning vector: the timestep's sinusoid, and SiLU of the summed embeddings."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.launch import Layouts, planned
from ..reference import ops as formulas
from . import check
from .backend import current_backend, library, register, run, sharded, takes_triton

library.define("timestep_embedding(Tensor t, int dim, float freq_shift, ScalarType dtype) -> Tensor")
library.define("conditioning(Tensor t_emb, Tensor y, Tensor table) -> Tensor")


def timestep_embedding(t: Tensor, dim: int, freq_shift: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sinusoid of the timesteps, [cos, sin]. The kernel has no gradient: for a t that wants one the formula runs.

    Source: Vaswani et al. 2017, section 3.5, with DiT's order of the halves.

    Args:
        t: (B,), int or float.
        dim: even.
        freq_shift: frequencies are 10000 ** (-i / (dim / 2 - freq_shift)).
        dtype: of the result.

    Returns:
        (B, dim); computed in fp64 by the kernel, at least in fp32 by the formula.

    Raises:
        TypeError, ValueError: an argument does not fit, naming it.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor, got {type(t).__name__}")
    if t.ndim != 1:
        raise ValueError(f"t must have shape (B,), got {tuple(t.shape)}")
    if t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"t must be int or float, got {t.dtype}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r}")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, got {dim}")
    if not 0 <= freq_shift < dim // 2:
        raise ValueError(f"freq_shift must be in [0, {dim // 2}), got {freq_shift}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating, got {dtype}")
    if dtype != torch.float64 and _takes_kernel("timestep_embedding", t, t=t):
        return cast(Tensor, run("timestep_embedding", (t,), t, dim, float(freq_shift), dtype))
    if sharded(t):  # the frequencies are no DTensor
        from .sharding import by_samples

        return by_samples(partial(_timestep_formula, dim=dim, freq_shift=freq_shift, dtype=dtype), t)
    return _timestep_formula(t, dim, freq_shift, dtype)


def _timestep_formula(t: Tensor, dim: int, freq_shift: float, dtype: torch.dtype) -> Tensor:
    return formulas.timestep_embedding(t, dim, freq_shift, dtype).to(dtype)


def conditioning(t_emb: Tensor, y: Tensor, table: Tensor) -> Tensor:
    """silu(t_emb + table[y]): what every adaLN Linear reads.

    Source: Peebles & Xie, section 3.2, and figure 3.

    Args:
        t_emb: (B, D).
        y: (B,), int64 or int32, rows of the table.
        table: (rows, D).

    Returns:
        (B, D) in the wider of the two dtypes. The kernel has no gradient: where one is wanted the formula runs.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit, naming the argument.
    """
    check.tensor("t_emb", t_emb, 2)
    check.tensor("table", table, 2)
    if table.shape[1] != t_emb.shape[1]:
        raise ValueError(f"table must have shape (rows, {t_emb.shape[1]}), got {tuple(table.shape)}")
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor, got {type(y).__name__}")
    if y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"y must be int64 or int32, got {y.dtype}")
    check.shape("y", y, (t_emb.shape[0],))
    for name, value in (("y", y), ("table", table)):
        check.same_device(name, value, t_emb)
    if _takes_kernel("conditioning", t_emb, t_emb=t_emb, table=table):
        return cast(Tensor, run("conditioning", (t_emb, y, table), t_emb, y, table))
    return F.silu(t_emb + F.embedding(y, table))


def _takes_kernel(operator: str, like: Tensor, **wanting: Tensor) -> bool:
    # Inductor fuses these formulas with what stands around them; an opaque kernel would stop it
    if torch.compiler.is_compiling() or not takes_triton(operator, like, 1, wanting.values()):
        return False
    wants = [name for name, tensor in wanting.items() if tensor.requires_grad] if torch.is_grad_enabled() else []
    if wants and current_backend() == "triton":
        raise RuntimeError(
            f"ditfast.ops.{operator} cannot run its Triton kernel: {wants[0]} wants a gradient, which it does not "
            'give; use_backend("torch") takes the formula'
        )
    return not wants


def _timestep_embedding(t: Tensor, *args: Any, key: Layouts | None) -> Tensor:
    from ..kernels.conditioning import TimestepEmbedding  # imports triton

    return planned(TimestepEmbedding, (t,), *args, key=key)(t)


def _conditioning(*tensors: Tensor, key: Layouts | None) -> Tensor:
    from ..kernels.conditioning import Conditioning

    return planned(Conditioning, tensors, key=key)(*tensors)


def _timestep_embedding_fake(t: Tensor, dim: int, freq_shift: float, dtype: torch.dtype) -> Tensor:
    return t.new_empty((t.shape[0], dim), dtype=dtype)


def _conditioning_fake(t_emb: Tensor, y: Tensor, table: Tensor) -> Tensor:
    return t_emb.new_empty(t_emb.shape, dtype=torch.promote_types(t_emb.dtype, table.dtype))


register("timestep_embedding", _timestep_embedding, _timestep_embedding_fake)
register("conditioning", _conditioning, _conditioning_fake)
