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
from ditfast.ops._block import modulation
from ditfast.reference import ops as formulas

from .cases import Case
from .cost import Cost, count
from .fusions_training import Call, training_sites
from .rows import Saving

REST = "rest"

# shifts, scales and gates of a block
_BLOCK_VECTORS = {"adaln": 4, "adaln_zero": 6}


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
    if case.training:
        tokens = (_tokens(build, case, samples) for build in (reference.DiT, DiT))
        yield from (_Site(*site) for site in training_sites(case, *tokens))
    else:
        yield from _norms(case, samples)
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
        yield _Site("one SiLU, c's gradient in the GEMMs", 1, *_modulations(c, rows))
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


def _modulations(c: Tensor, rows: Sequence[int]) -> tuple[Call, Call]:
    """All adaLN Linears and their backward: apart, and handing c on from block to block."""
    weights = [torch.empty(row, c.shape[1], dtype=c.dtype, requires_grad=True) for row in rows]
    biases = [torch.empty(row, dtype=c.dtype, requires_grad=True) for row in rows]
    grads = [torch.empty(len(c), row, dtype=c.dtype) for row in rows]

    def apart() -> None:
        outputs = [F.linear(F.silu(c), w, b) for w, b in zip(weights, biases, strict=True)]
        torch.autograd.grad(outputs, (c, *weights, *biases), grads)

    def handed_on() -> None:
        activated, outputs = F.silu(c), []
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            output, activated = modulation(activated, weight, bias)
            outputs.append(output)
        outputs.append(F.linear(activated, weights[-1], biases[-1]))
        torch.autograd.grad(outputs, (c, *weights, *biases), grads)

    return apart, handed_on


def _norms(case: Case, samples: int) -> Iterator[_Site]:
    config = case.config
    shape = (samples, config.num_tokens, config.hidden_size)
    gate, shift, scale = torch.empty(samples, 3 * config.hidden_size, dtype=case.dtype).chunk(3, dim=-1)
    branch = torch.empty(shape, dtype=case.dtype)

    def norm(uses: int, slow: Tensor, fast: Tensor) -> _Site:
        inputs = ((slow, shift, scale), (fast, shift, scale))
        return _Site("LayerNorm, modulate", uses, *_calls("layer_norm_modulate", *inputs))

    def border(uses: int, slow: Tensor, fast: Tensor) -> _Site:
        inputs = ((slow, branch, gate, shift, scale), (fast, branch, gate, shift, scale))
        calls = _calls("gated_residual_layer_norm_modulate", *inputs)
        return _Site("gate, residual, LayerNorm, modulate", uses, *calls)

    slow, fast = (_tokens(build, case, samples) for build in (reference.DiT, DiT))
    yield norm(1, slow, fast)
    borders = 2 * config.depth
    if config.conditioning == "adaln":  # adds a branch without a gate, which is left to PyTorch
        yield norm(borders, slow + branch, fast + branch)
        return
    yield border(1, slow, fast)
    yield border(borders - 1, formulas.gated_residual(slow, branch, gate), ops.gated_residual(fast, branch, gate))


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


def _calls(operator: str, slow: Sequence[Tensor], fast: Sequence[Tensor]) -> tuple[Call, Call]:
    """The formula on ``slow`` and the operator on ``fast``."""
    return partial(getattr(formulas, operator), *slow), partial(getattr(ops, operator), *fast)
