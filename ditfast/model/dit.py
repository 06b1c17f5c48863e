"""The fast DiT: the reference's modules, names and parameters with a fused forward.

Fused designs (adaLN and adaLN-Zero): a gated residual and the norm after it are one operator, also across
block borders, so a block hands its last branch and gate on instead of adding them; all adaLN Linears are one
launch. Blocks are still called as modules, so hooks, activation checkpointing and sharding
per block keep working.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DiTConfig
from ..ops.backend import autocast_dtype
from ..ops.inference import infer_blocks
from ..ops.modulations import modulations_together
from ..plain import are_plain_modulations, child, has_global_hooks, is_unchanged, parameters_of
from ..reference import dit as reference
from ..reference.ops import unpatchify
from .blocks import (
    FUSED,
    AdaLNForward,
    FusedLabelEmbedder,
    FusedTimestepEmbedder,
    Modulation,
    Pending,
    records_gradients,
    split_modulation,
)


class DiT(reference.DiT):
    """The fast DiT: same parameters, state dict and results as :class:`ditfast.reference.DiT`.

    ``adaln_zero`` and ``adaln`` take the fused forward; ``in_context`` and ``cross_attention`` run the
    reference's code (``repr`` says which).

    All adaLN Linears run in one launch at the beginning of each call, which reads their weights in place: no copy goes
    out of date. Each Linear runs on its own where a weight is not a plain tensor on the others'
    device (sharded, wrapped by LoRA, offloaded, quantised), where a block or the final layer has hooks or a wrapper, on
    a CPU, and in training under autocast; above 1024 samples by the library's GEMM.
    """

    _embedders = (reference.TimestepEmbedder, FusedTimestepEmbedder)

    def __init__(self, config: DiTConfig) -> None:
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
        return self._denoised(x, *self._modulations(c, activated), activated)

    def modulation(self, t: Tensor, y: Tensor) -> Tensor:
        """The modulations of the blocks and the final layer for timesteps and labels, without gradients.

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
            parameters = parameters_of(*self._modulation_linears()) if activated else None
            launched = None if parameters is None else modulations_together(c, parameters)
            if launched is not None:
                return launched
            parts = [layers[-1](c) if activated else layers(c) for layers in self._modulation_layers()]
            return torch.cat(parts, dim=1)

    def forward_modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        """:meth:`forward` with the result of :meth:`modulation` for its t and y: no adaLN weight is read.

        Args:
            x: latents (B, C, height, width) of ``config.latent_size``, any floating dtype.
            modulation: (B, N), any row stride.

        Returns:
            (B, C_out, height, width) in the model's dtype.

        Raises:
            ValueError: a design without adaLN, or a shape that does not fit.
        """
        self._check_modulated()
        rows = [linear.out_features for linear in self._modulation_linears()]
        shape = (self.config.in_channels, *self.config.latent_hw)
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
        if modulation.shape != (len(x), sum(rows)):
            raise ValueError(f"modulation must have shape ({len(x)}, {sum(rows)}), got {tuple(modulation.shape)}")
        return self._denoised(self._tokens(x), None, split_modulation(modulation, rows, self._parts()), True)

    def _check_modulated(self) -> None:
        if not self.fused:
            raise ValueError(f"only adaLN designs are modulated, this model is {self.config.conditioning}")

    def _activates(self) -> bool:
        """Whether all adaLN Linears read the same SiLU(c): their Sequentials are as they were built."""
        return are_plain_modulations(self._modulation_layers())

    def _layers(self) -> list[nn.Module]:
        """The blocks and the final layer."""
        return [*self.blocks, self.final_layer]

    def _modulation_layers(self) -> list[nn.Sequential]:
        """adaLN_modulation of each block and of the final layer."""
        return [child(layer, "adaLN_modulation") for layer in self._layers()]

    def _modulation_linears(self) -> list[nn.Linear]:
        return [cast(nn.Linear, layers[-1]) for layers in self._modulation_layers()]

    def _denoised(
        self, x: Tensor, c: Tensor | None, modulations: Sequence[Modulation | None], activated: bool
    ) -> Tensor:
        """Tokens x (B, T, D) through the blocks and the final layer, to (B, C_out, height, width)."""
        *of_blocks, of_final_layer = modulations
        *blocks, final_layer = self._layers()
        inferred = self._inferred(x, blocks, of_blocks) if c is None and not torch.is_grad_enabled() else None
        if inferred is not None:
            x = final_layer(*inferred, None, None, activated, of_final_layer)
            return unpatchify(x, self.config.patch_size, self.config.grid_size)
        pending = Pending()
        # layers whose branches only the next layer sees: no hooks, wrappers, sharding or forward of their own
        private = self._are_plain() if records_gradients() else [False] * len(modulations)
        for block, modulation, current, following in zip(blocks, of_blocks, private[:-1], private[1:], strict=True):
            hands = (True,) if current and following else ()
            x, branch, gate, bias, c = block(x, *pending, c, activated, modulation, *hands)
            pending = Pending(branch, gate, bias)
        x = final_layer(x, *pending, c, activated, of_final_layer)
        return unpatchify(x, self.config.patch_size, self.config.grid_size)

    def _inferred(
        self, x: Tensor, blocks: Sequence[nn.Module], modulations: Sequence[Modulation | None]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """(x, branch, gate) after the blocks, not called one by one: None where somebody has a use for that."""
        if torch.compiler.is_compiling() or self.config.conditioning != "adaln_zero" or not all(self._are_plain()):
            return None
        if any(getattr(type(block), "forward", None) is not AdaLNForward.fused for block in blocks):
            return None
        settings = []
        for block in blocks:
            each = None if "_compiled_call_impl" in block.__dict__ else cast(AdaLNForward, block).block_settings()
            if each is None:
                return None
            settings.append(each)
        return infer_blocks(x, settings, cast("Sequence[tuple[Tensor, ...]]", modulations))

    def _parts(self) -> list[int]:
        """Of how many vectors the modulation of each block consists, and that of the final layer."""
        return [6 if self.config.conditioning == "adaln_zero" else 4] * len(self.blocks) + [2]

    def _are_plain(self) -> list[bool]:
        """Whether each block, and the final layer, is of the class that it was given, without hooks or wrappers."""
        kind = FUSED[reference.AdaLNZeroBlock if self.config.conditioning == "adaln_zero" else reference.AdaLNBlock]
        *blocks, final_layer = self._layers()
        if has_global_hooks():
            return [False] * (len(blocks) + 1)
        return [*(is_unchanged(x, kind) for x in blocks), is_unchanged(final_layer, FUSED[reference.FinalLayer])]

    def _conditioning(self, t: Tensor, y: Tensor, activated: bool) -> Tensor:
        """c, through its SiLU where ``activated``."""
        t_emb = self._embedded_times(t)
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
        """The output's dtype: the position table's, whatever the Linears' weights are stored in."""
        return self.pos_embed.dtype

    def reset_cache(self) -> NoReturn:
        """Refused: there is no cache."""
        raise TypeError("DiT keeps no copy of its weights any more: leave reset_cache() out")

    def extra_repr(self) -> str:
        forward = "fused forward" if self.fused else "no fused forward for this design: runs the reference's code"
        return f"{self.config.name}, {self.config.conditioning}: {forward}"

    def _modulations(self, c: Tensor, activated: bool) -> tuple[Tensor | None, Sequence[Modulation | None]]:
        """(c where the layers have a use for it, the modulation of each block and of the final layer).

        None where the layer computes its own from c. Training takes one launch too, and each layer's gradient goes back
        on its own, as soon as it is known. Not so under autocast, where the backward would cast each weight again.
        """
        separate = c, (None,) * (len(self.blocks) + 1)
        linears = self._modulation_linears() if activated else []
        # hooks and wrappers of a layer may write or gather its weights before it is called
        if not activated or not all(self._are_plain()):
            return separate
        parameters = parameters_of(*linears)
        if parameters is None:
            return separate
        tensors = (c, *parameters)
        trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        if trains and autocast_dtype(c.device.type) is not None:
            return separate
        launched = modulations_together(c, parameters)
        if launched is None:
            return separate
        widths = [len(weight) for weight in parameters[::2]]  # type: ignore[arg-type]
        if trains:
            return c, launched.split_with_sizes(widths, dim=1)
        return None, split_modulation(launched, widths, self._parts())
