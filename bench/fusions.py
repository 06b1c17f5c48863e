"""What each of ditfast's fusions saves in one call of a model: the reference's launches and bytes less ditfast's.

Each fusion's formula and operator are counted on their own, at the model's shapes and in the layouts the model hands
them, times their uses in a call. What belongs to none is the last row, "rest", so that the rows always add up to
the difference of the two models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditfast import DiT, ops, reference
from ditfast.config import DiTConfig
from ditfast.reference import ops as formulas

from .cases import Case
from .cost import Cost, count
from .rows import Saving

REST = "rest"

# shifts, scales and gates of a block
_BLOCK_VECTORS = {"adaln": 4, "adaln_zero": 6}

Call = Callable[[], object]


@dataclass(frozen=True)
class _Site:
    """One kind of place in the model: how often a call passes it, and what both models run there."""

    fusion: str
    uses: int
    reference: Call
    ditfast: Call


def savings(case: Case, slow: Cost, fast: Cost) -> list[Saving]:
    """The table of one case; its launches and bytes add up to ``slow`` less ``fast``.

    Args:
        case: forward, cfg or train.
        slow, fast: the reference's and ditfast's whole call.

    Returns:
        A row a fusion, in the order of the model, and "rest" where something is left; nothing for the block
        designs that ditfast does not fuse.
    """
    total: dict[str, Saving] = {}
    with torch.device("meta"), ops.use_backend("triton"):
        for site in _sites(case):
            before, after = (count(call, grad=case.training) for call in (site.reference, site.ditfast))
            known = total.get(site.fusion, Saving(site.fusion, 0, 0, 0))
            total[site.fusion] = Saving(
                site.fusion,
                known.uses + site.uses,
                known.launches + site.uses * (before.total_launches - after.total_launches),
                known.bytes + site.uses * (before.total_bytes - after.total_bytes),
            )
    rows = list(total.values())
    launches = slow.total_launches - fast.total_launches - sum(row.launches for row in rows)
    moved = slow.total_bytes - fast.total_bytes - sum(row.bytes for row in rows)
    return [*rows, Saving(REST, 1, launches, moved)] if launches or moved else rows


def _sites(case: Case) -> Iterator[_Site]:
    config = case.config
    if config.conditioning not in ("adaln", "adaln_zero"):
        return
    samples = case.batch * (2 if case.mode == "cfg" else 1)
    yield from _conditioning(case, samples)
    yield from _norms(case, samples)
    if not case.training:  # whose backward needs what the GELU read
        x = torch.empty(samples, config.num_tokens, config.hidden_size, dtype=case.dtype)
        weight = torch.empty(config.mlp_hidden_size, config.hidden_size, dtype=case.dtype)
        inputs = (x, weight, weight[:, 0].contiguous())
        yield _Site("GELU in the GEMM", config.depth, *_calls("linear_gelu", inputs, inputs))


def _conditioning(case: Case, samples: int) -> Iterator[_Site]:
    config, dtype, width = case.config, case.dtype, case.config.hidden_size
    t = torch.empty(samples, dtype=torch.int64)
    size, shift = config.frequency_embedding_size, config.timestep_freq_shift
    yield _Site(
        "timestep sinusoid",
        1,
        lambda: formulas.timestep_embedding(t, size, shift, dtype).to(dtype),
        lambda: ops.timestep_embedding(t, size, shift, dtype),
    )
    rows = [_BLOCK_VECTORS[config.conditioning] * width] * config.depth + [2 * width]
    c = torch.empty(samples, width, dtype=dtype, requires_grad=case.training)
    if case.training:
        grads = [torch.empty_like(c) for _ in rows]

        def once() -> None:
            activated = F.silu(c)
            torch.autograd.grad([activated.view_as(c) for _ in grads], c, grads)

        def apart() -> None:
            torch.autograd.grad([F.silu(c) for _ in grads], c, grads)

        yield _Site("one SiLU for all layers", 1, apart, once)
        return
    table = torch.empty(config.num_embeddings, width, dtype=dtype)
    yield _Site("label, sum, SiLU", 1, lambda: c + F.embedding(t, table), lambda: ops.conditioning(c, t, table))
    weights = [torch.empty(row, width, dtype=dtype) for row in (*rows, sum(rows))]
    biases = [torch.empty(row, dtype=dtype) for row in (*rows, sum(rows))]
    yield _Site(
        "adaLN Linears in one GEMM",
        1,
        lambda: [F.linear(F.silu(c), w, b) for w, b in zip(weights[:-1], biases[:-1], strict=True)],
        lambda: F.linear(c, weights[-1], biases[-1]),
    )


def _norms(case: Case, samples: int) -> Iterator[_Site]:
    config = case.config
    shape = (samples, config.num_tokens, config.hidden_size)
    vectors = torch.empty(samples, 3 * config.hidden_size, dtype=case.dtype, requires_grad=case.training)
    gate, shift, scale = vectors.chunk(3, dim=-1)
    branch = torch.empty(shape, dtype=case.dtype, requires_grad=case.training)
    grads = [torch.empty(shape, dtype=case.dtype) for _ in range(2)] if case.training else []

    def norm(uses: int, slow: Tensor, fast: Tensor) -> _Site:
        inputs = ((slow, shift, scale), (fast, shift, scale))
        return _Site("LayerNorm, modulate", uses, *_calls("layer_norm_modulate", *inputs, grads[1:]))

    def border(uses: int, slow: Tensor, fast: Tensor, last: bool = False) -> _Site:
        inputs = ((slow, branch, gate, shift, scale), (fast, branch, gate, shift, scale))
        calls = _calls("gated_residual_layer_norm_modulate", *inputs, grads[1:] if last else grads)
        return _Site("gate, residual, LayerNorm, modulate", uses, *calls)

    slow, fast = (_tokens(build, case, samples) for build in (reference.DiT, DiT))
    yield norm(1, slow, fast)
    with torch.no_grad():  # for the layouts
        if config.conditioning == "adaln":  # adds a branch without a gate, which is left to PyTorch
            later = slow + branch, fast + branch
        else:
            later = formulas.gated_residual(slow, branch, gate), ops.gated_residual(fast, branch, gate)
    slow_later, fast_later = (item.requires_grad_(case.training) for item in later)
    borders = 2 * config.depth
    if config.conditioning == "adaln":
        yield norm(borders, slow_later, fast_later)
        return
    yield border(1, slow, fast)
    yield border(borders - 2, slow_later, fast_later)
    yield border(1, slow_later, fast_later, last=True)  # nothing reads its residual but the norm


def _tokens(build: Callable[[DiTConfig], nn.Module], case: Case, samples: int) -> Tensor:
    """Tokens in the layout in which a model hands them to its first block."""
    model = build(replace(case.config, depth=1)).to(case.dtype).eval()
    seen: list[Tensor] = []
    first = cast(nn.ModuleList, model.blocks)[0]
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.empty(samples, case.config.in_channels, *case.config.latent_hw, dtype=case.dtype)
    index = torch.empty(samples, dtype=torch.int64)
    with torch.no_grad():
        model(x, index, index)
    return seen[0].requires_grad_(case.training)


def _calls(
    operator: str, slow: Sequence[Tensor], fast: Sequence[Tensor], grads: Sequence[Tensor] = ()
) -> tuple[Call, Call]:
    """The formula on ``slow`` and the operator on ``fast``; with ``grads`` (of the last outputs) their backward too."""

    def call(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
        outputs = function(*inputs)
        if grads:
            last = (outputs,) if isinstance(outputs, Tensor) else outputs[-len(grads) :]
            torch.autograd.grad(last, inputs, grads)

    return partial(call, getattr(formulas, operator), slow), partial(call, getattr(ops, operator), fast)
