"""The fast DiT: the reference's modules, names and parameters with a fused forward.

Fused designs (adaLN and adaLN-Zero): a gated residual and the norm after it are one operator, also across
block borders, so a block hands its last branch and gate on instead of adding them; in inference all adaLN
Linears are one GEMM. Blocks are still called as modules, so hooks, activation checkpointing and sharding
per block keep working.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import ops
from .config import DiTConfig
from .ops._backend import autocast_dtype
from .reference import dit as reference
from .reference.ops import unpatchify


def _is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer may be read as its parameters: no subclass (LoRA, sharding), no hooks, its own or global."""
    if type(layer) is not kind:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    return torch.compiler.is_compiling() or not _has_any_global_hook()


def _is_plain_modulation(modulation: nn.Module | None) -> bool:
    """Whether an adaLN_modulation is what it was built as, so that its Linear may be read apart from its SiLU."""
    return (
        isinstance(modulation, nn.Sequential)
        and _is_plain(modulation, nn.Sequential)
        and len(modulation) == 2
        and _is_plain(modulation[0], nn.SiLU)
    )


def _add_and_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Adds the pending branch (none before the first block, no gate in adaLN): (new x, its modulated norm)."""
    if branch is not None and gate is not None:
        return ops.gated_residual_layer_norm_modulate(x, branch, gate, shift, scale, eps)
    if branch is not None:
        x = x + branch
    return x, ops.layer_norm_modulate(x, shift, scale, eps)


class FusedTimestepEmbedder(reference.TimestepEmbedder):
    def forward(self, t: Tensor) -> Tensor:
        dtype = cast(Tensor, self.mlp[0].weight).dtype
        return cast(Tensor, self.mlp(ops.timestep_embedding(t, self.frequency_embedding_size, self.freq_shift, dtype)))


class FusedLabelEmbedder(reference.LabelEmbedder):
    def forward(self, y: Tensor, t_emb: Tensor, activated: bool) -> Tensor:  # type: ignore[override]
        """The summed embeddings (B, D), through SiLU where ``activated``."""
        if not activated or self.training or not _is_plain(self.embedding_table, nn.Embedding):
            c = t_emb + super().forward(y)
            return F.silu(c) if activated else c
        return ops.conditioning(t_emb, y, self.embedding_table.weight)


class FusedAttention(reference.Attention):
    def forward(self, x: Tensor) -> Tensor:
        if self._is_normed():
            return super().forward(x)  # normalised queries and keys are no longer packed
        return cast(Tensor, self.proj(ops.self_attention(self.qkv(x), self.num_heads)))

    def _is_normed(self) -> bool:
        return not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity))

    def extra_repr(self) -> str:
        return "qk_norm: runs the reference's code" if self._is_normed() else ""


class FusedMlp(reference.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        if not (_is_plain(self.fc1) and _is_plain(self.fc2)):
            return super().forward(x)
        return ops.gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class FusedAdaLNBlock(reference.AdaLNBlock):
    """adaLN with the residual's last addition left pending: (x, branch, gate) in, (x, branch, gate) out."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        c: Tensor,
        activated: bool,
        modulation: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """c (B, D), through its SiLU where ``activated``; modulation (B, 4D) or (B, 6D) where computed ahead."""
        if modulation is None:
            modulation = self.adaLN_modulation[1](c) if activated else self.adaLN_modulation(c)
        shift1, scale1, gate1, shift2, scale2, gate2 = self._chunks(modulation)
        x, h = _add_and_norm(x, branch, gate, shift1, scale1, self.norm1.eps)
        x, h = _add_and_norm(x, self.attn(h), gate1, shift2, scale2, self.norm2.eps)
        return x, self.mlp(h), gate2

    def _chunks(self, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        shift1, scale1, shift2, scale2 = modulation.chunk(4, dim=-1)
        return shift1, scale1, None, shift2, scale2, None


class FusedAdaLNZeroBlock(FusedAdaLNBlock):
    modulations = 6

    def _chunks(self, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        return modulation.chunk(6, dim=-1)  # type: ignore[return-value]


class FusedFinalLayer(reference.FinalLayer):
    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        c: Tensor,
        activated: bool,
        modulation: Tensor | None,
    ) -> Tensor:
        if modulation is None:
            layers = cast(nn.Sequential, self.adaLN_modulation)
            modulation = cast(Tensor, layers[1](c) if activated else layers(c))
        shift, scale = modulation.chunk(2, dim=-1)
        _, h = _add_and_norm(x, branch, gate, shift, scale, self.norm_final.eps)
        return cast(Tensor, self.linear(h))


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    reference.TimestepEmbedder: FusedTimestepEmbedder,
    reference.LabelEmbedder: FusedLabelEmbedder,
    reference.Attention: FusedAttention,
    reference.Mlp: FusedMlp,
    reference.AdaLNBlock: FusedAdaLNBlock,
    reference.AdaLNZeroBlock: FusedAdaLNZeroBlock,
    reference.FinalLayer: FusedFinalLayer,
}


class _OptimizerSteps:
    """Counts the steps of every optimiser in the process: fused ones leave the version counters as they are."""

    def __init__(self) -> None:
        self.count = 0
        self._watching = False

    def watch(self) -> None:
        if not self._watching:
            register_optimizer_step_post_hook(self._stepped)
            self._watching = True

    def _stepped(self, *_: object) -> None:
        self.count += 1


_optimizer_steps = _OptimizerSteps()


def _concatenate(parameters: list[nn.Parameter], dtype: torch.dtype) -> Tensor:
    if parameters[0].is_meta:  # nothing to copy: a trace sees what every later call launches
        rows = sum(parameter.shape[0] for parameter in parameters)
        return parameters[0].new_empty((rows, *parameters[0].shape[1:]), dtype=dtype, requires_grad=False)
    return torch.cat([parameter.detach().to(dtype) for parameter in parameters])


class _ModulationCache(NamedTuple):
    """All adaLN Linears as one, and the state of the parameters it was made from."""

    parameters: list[nn.Parameter]
    sources: list[Tensor]  # aliases that keep the storages alive, so that an address is never reused unnoticed
    versions: list[int]
    optimizer_steps: int
    weight: Tensor
    bias: Tensor

    @classmethod
    def build(cls, weights: list[nn.Parameter], biases: list[nn.Parameter], dtype: torch.dtype) -> _ModulationCache:
        _optimizer_steps.watch()
        parameters = [*weights, *biases]
        cache = cls(
            parameters,
            [parameter.detach() for parameter in parameters],
            [parameter._version for parameter in parameters],
            _optimizer_steps.count,
            _concatenate(weights, dtype),
            _concatenate(biases, dtype),
        )
        if cache.weight.is_cuda:
            torch.cuda.current_stream(cache.weight.device).synchronize()  # other streams may use it next
        return cache

    def is_fresh(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> bool:
        return (
            self.weight.dtype == dtype
            and self.optimizer_steps == _optimizer_steps.count
            and all(
                parameter is known and parameter.data_ptr() == source.data_ptr() and parameter._version == version
                for parameter, known, source, version in zip(
                    parameters, self.parameters, self.sources, self.versions, strict=True
                )
            )
        )


class DiT(reference.DiT):
    """The fast DiT: same parameters, state dict and results as :class:`ditfast.reference.DiT`.

    ``adaln_zero`` and ``adaln`` take the fused forward; ``in_context`` and ``cross_attention`` run the
    reference's code (``repr`` says which).

    In inference all adaLN Linears run as one GEMM from a concatenated copy of their weights (a third of
    XL/2's weights once more; not under torch.compile or in a captured CUDA graph, where each Linear runs on its
    own). The copy is remade when a parameter was replaced, moved or written in place, after any optimiser's
    step, after a forward that records gradients, and by ``train()`` and ``eval()``. Writes that leave torch's
    version counters as they are and do none of this need :meth:`reset_cache`: in-place ones through
    ``parameter.data`` (as diffusers' EMAModel makes them), and collectives such as ``dist.broadcast``.
    """

    def __init__(self, config: DiTConfig) -> None:
        self._modulation_cache: _ModulationCache | None = None
        super().__init__(config)
        self.fused = config.conditioning in ("adaln", "adaln_zero")
        if self.fused:
            for module in self.modules():
                module.__class__ = _FUSED.get(type(module), type(module))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """As :meth:`ditfast.reference.DiT.forward`."""
        if not self.fused:
            return super().forward(x, t, y)
        self._check_inputs(x, t, y)
        # all adaLN Linears read the same SiLU(c), as long as nobody changed what stands around them
        activated = all(_is_plain_modulation(layer.adaLN_modulation) for layer in (*self.blocks, self.final_layer))
        x, c = self._tokens(x), self._conditioning(t, y, activated)
        branch: Tensor | None = None
        gate: Tensor | None = None
        *modulations, last = self._modulations(c, activated)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x, branch, gate = block(x, branch, gate, c, activated, modulation)
        x = self.final_layer(x, branch, gate, c, activated, last)
        return unpatchify(x, self.config.patch_size, self.config.grid_size)

    def _conditioning(self, t: Tensor, y: Tensor, activated: bool) -> Tensor:
        """c, through its SiLU where ``activated``."""
        t_emb = self.t_embedder(t)
        if isinstance(self.y_embedder, FusedLabelEmbedder):
            return cast(Tensor, self.y_embedder(y, t_emb, activated))
        c = t_emb + self.y_embedder(y)
        return F.silu(c) if activated else cast(Tensor, c)

    def train(self, mode: bool = True) -> DiT:
        self.reset_cache()
        return super().train(mode)

    def reset_cache(self) -> None:
        """Drops the concatenated adaLN weights; the next inference call makes them anew."""
        self._modulation_cache = None

    def extra_repr(self) -> str:
        how = "fused forward" if self.fused else "no fused forward for this design: runs the reference's code"
        return f"{self.config.name}, {self.config.conditioning}: {how}"

    def _modulations(self, c: Tensor, activated: bool) -> tuple[Tensor | None, ...]:
        """The modulation of each block and of the final layer, or None where the layer computes its own.

        One GEMM in inference. In training each block runs its own Linear: a concatenation would copy every
        adaLN weight in each step and its gradient back, which costs more than the launches it saves. The same
        holds where the copy could not be checked again (inside a compiled or captured graph).
        """
        apart = (None,) * (len(self.blocks) + 1)
        if torch.compiler.is_compiling():
            return apart
        if torch.is_grad_enabled() and (c.requires_grad or any(p.requires_grad for p in self.parameters())):
            self.reset_cache()  # somebody may be about to write through .data
            return apart
        if c.is_cuda and torch.cuda.is_current_stream_capturing():
            return apart
        if not activated:
            return apart
        linears = [cast(nn.Sequential, layer.adaLN_modulation)[1] for layer in (*self.blocks, self.final_layer)]
        if not all(_is_plain(linear) for linear in linears):
            return apart
        weights = [cast(nn.Parameter, linear.weight) for linear in linears]
        biases = [cast(nn.Parameter, linear.bias) for linear in linears]
        if any(type(p) is not nn.Parameter or p.is_inference() for p in (*weights, *biases)):
            return apart
        cache = self._cached_modulation(weights, biases, c.device.type)
        c = c.to(cache.weight.dtype)
        if c.device.type == "cpu":
            # MKL takes few rows against a tall weight two to four times faster this way round, and two columns
            # three times faster than one, which goes to its matrix-vector product
            columns = (c if len(c) != 1 else torch.cat([c, c])).t()
            product = torch.addmm(cache.bias.unsqueeze(1), cache.weight, columns)
            modulations = product[:, : len(c)].t().contiguous()
        else:
            modulations = F.linear(c, cache.weight, cache.bias)
        return tuple(modulations.split_with_sizes([weight.shape[0] for weight in weights], dim=1))

    def _cached_modulation(
        self, weights: list[nn.Parameter], biases: list[nn.Parameter], device_type: str
    ) -> _ModulationCache:
        dtype = weights[0].dtype
        if dtype != torch.float64:  # which autocast leaves alone
            dtype = autocast_dtype(device_type) or dtype
        cache = self._modulation_cache
        if cache is None or not cache.is_fresh([*weights, *biases], dtype):
            self.reset_cache()  # frees the old copy before the new one is made
            cache = self._modulation_cache = _ModulationCache.build(weights, biases, dtype)
        return cache

    def _apply(self, *args: Any, **kwargs: Any) -> DiT:
        self.reset_cache()
        return cast(DiT, super()._apply(*args, **kwargs))  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_modulation_cache": None}
