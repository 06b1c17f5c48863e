"""The fast DiT: the reference's modules, names and parameters with a fused forward.

Fused designs (adaLN and adaLN-Zero): a gated residual and the norm after it are one operator, also across
block borders, so a block hands its last branch and gate on instead of adding them; in inference all adaLN
Linears are one GEMM. Blocks are still called as modules, so hooks, activation checkpointing and sharding
per block keep working.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._model_blocks import FUSED, FusedLabelEmbedder, Pending, is_plain, is_plain_modulation
from ._model_cache import ModulationCache
from .config import DiTConfig
from .reference import dit as reference
from .reference.ops import unpatchify


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
        self._modulation_cache = ModulationCache()
        super().__init__(config)
        self.fused = config.conditioning in ("adaln", "adaln_zero")
        if self.fused:
            for module in self.modules():
                module.__class__ = FUSED.get(type(module), type(module))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """As :meth:`ditfast.reference.DiT.forward`."""
        if not self.fused:
            return super().forward(x, t, y)
        self._check_inputs(x, t, y)
        activated = self._activates()
        x, c = self._tokens(x), self._conditioning(t, y, activated)
        return self._denoised(x, c, activated, self._modulations(c, activated))

    def modulation(self, t: Tensor, y: Tensor) -> Tensor:
        """All that the blocks and the final layer are told of timesteps and labels, without gradients.

        Args:
            t: timesteps (B,), int or float.
            y: labels (B,), int32 or int64.

        Returns:
            (B, N): the modulation of each block, then of the final layer; N is the rows of all adaLN Linears.

        Raises:
            ValueError: a design without adaLN.
        """
        self._check_modulated()
        with torch.no_grad():
            activated = self._activates()
            c = self._conditioning(t, y, activated)
            layers = (*self.blocks, self.final_layer)
            kept = self._modulation_cache.made
            linears = [cast(nn.Linear, cast(nn.Sequential, layer.adaLN_modulation)[-1]) for layer in layers]
            found = self._modulation_cache.modulation(linears, c) if activated else None
            if kept is None:
                self._modulation_cache.made = None  # which a table's reader needs no more
            if found is not None:
                return found
            own = [cast(nn.Sequential, layer.adaLN_modulation) for layer in layers]
            return torch.cat([modulation[-1](c) if activated else modulation(c) for modulation in own], dim=1)

    def forward_modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        """:meth:`forward` with what :meth:`modulation` gave for its t and y: no adaLN weight is read.

        Args:
            x: latents (B, C, height, width) of ``config.latent_size``, any floating dtype.
            modulation: (B, N), any row stride.

        Returns:
            (B, C_out, height, width) in the model's dtype.

        Raises:
            ValueError: a design without adaLN, or a shape that does not fit.
        """
        self._check_modulated()
        rows = [layer.adaLN_modulation[-1].out_features for layer in (*self.blocks, self.final_layer)]
        shape = (self.config.in_channels, *self.config.latent_hw)
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
        if modulation.shape != (len(x), sum(rows)):
            raise ValueError(f"modulation must have shape ({len(x)}, {sum(rows)}), got {tuple(modulation.shape)}")
        return self._denoised(self._tokens(x), modulation, True, modulation.split_with_sizes(rows, dim=1))

    def _check_modulated(self) -> None:
        if not self.fused:
            raise ValueError(f"only adaLN designs are modulated, this model is {self.config.conditioning}")

    def _activates(self) -> bool:
        """Whether all adaLN Linears read the same SiLU(c): nobody changed what stands around them."""
        return all(is_plain_modulation(layer.adaLN_modulation) for layer in (*self.blocks, self.final_layer))

    def _denoised(self, x: Tensor, c: Tensor, activated: bool, modulations: Sequence[Tensor | None]) -> Tensor:
        """Tokens x (B, T, D) through the blocks and the final layer, to (B, C_out, height, width)."""
        pending = Pending()
        *given, last = modulations
        # whose branches nobody sees between: no hooks, wrappers, sharding or forward of their own
        private = [torch.is_grad_enabled() and is_plain(layer, kind) for layer, kind in self._fused_layers()]
        hands_over = [here and there for here, there in zip(private[:-1], private[1:], strict=True)]
        for block, modulation, over in zip(self.blocks, given, hands_over, strict=True):
            x, *rest, c = block(x, *pending, c, activated, modulation, *([True] if over else []))
            pending = Pending(*rest)
        x = self.final_layer(x, *pending, c, activated, last)
        return unpatchify(x, self.config.patch_size, self.config.grid_size)

    def _fused_layers(self) -> list[tuple[nn.Module, type[nn.Module]]]:
        """The blocks and the final layer, each with the class it was given."""
        kind = FUSED[reference.AdaLNZeroBlock if self.config.conditioning == "adaln_zero" else reference.AdaLNBlock]
        return [*((block, kind) for block in self.blocks), (self.final_layer, FUSED[reference.FinalLayer])]

    def _conditioning(self, t: Tensor, y: Tensor, activated: bool) -> Tensor:
        """c, through its SiLU where ``activated``."""
        t_emb = self.t_embedder(t)
        if isinstance(self.y_embedder, FusedLabelEmbedder):
            return cast(Tensor, self.y_embedder(y, t_emb, activated))
        c = t_emb + self.y_embedder(y)
        return F.silu(c) if activated else cast(Tensor, c)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, which is the output's."""
        return self.pos_embed.dtype

    def train(self, mode: bool = True) -> DiT:
        self.reset_cache()
        return super().train(mode)

    def reset_cache(self) -> None:
        """Drops the concatenated adaLN weights and engines' schedule tables; the next inference call makes them."""
        self._modulation_cache.reset()

    def extra_repr(self) -> str:
        how = "fused forward" if self.fused else "no fused forward for this design: runs the reference's code"
        return f"{self.config.name}, {self.config.conditioning}: {how}"

    def _modulations(self, c: Tensor, activated: bool) -> tuple[Tensor | None, ...]:
        """The modulation of each block and of the final layer, or None where the layer computes its own.

        One GEMM in inference. In training each block runs its own Linear: a concatenation would copy every
        adaLN weight in each step and its gradient back, which costs more than the launches it saves. The same
        holds where the copy could not be checked again (inside a compiled or captured graph).
        """
        layers = (*self.blocks, self.final_layer)
        apart = (None,) * len(layers)
        if torch.compiler.is_compiling():
            return apart
        if torch.is_grad_enabled() and (c.requires_grad or any(p.requires_grad for p in self.parameters())):
            self.reset_cache()  # somebody may be about to write through .data
            return apart
        if not activated:
            return apart
        linears = [cast(nn.Linear, cast(nn.Sequential, layer.adaLN_modulation)[1]) for layer in layers]
        return self._modulation_cache.modulations(linears, c) or apart

    def _apply(self, *args: Any, **kwargs: Any) -> DiT:
        self.reset_cache()
        return cast(DiT, super()._apply(*args, **kwargs))  # type: ignore[no-untyped-call]
