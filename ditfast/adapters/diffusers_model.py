"""diffusers' ``DiTTransformer2DModel`` as a whole: timestep and label embedded once for all blocks in inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ._adapter import Adapter
from ._shared_embedding import forget, sharing
from ._watched import Watched, running
from .diffusers import DiffusersBlock


class FastTransformer(Watched):
    """The model's own forward, within which its accelerated blocks share their embedding where that is exact."""

    _forget = forget
    _parts = ("transformer_blocks",)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        with running(self), sharing(self, _embedders(self)):
            return super().forward(*args, **kwargs)


class DiffusersTransformer(Adapter):
    """diffusers' ``DiTTransformer2DModel``."""

    name = "diffusers transformer"
    mixin = FastTransformer

    def recognises(self, module: nn.Module) -> bool:
        blocks = module._modules.get("transformer_blocks")
        known = DiffusersBlock()
        return isinstance(blocks, nn.ModuleList) and len(blocks) > 1 and all(map(known.recognises, blocks))

    def refuses(self, module: nn.Module) -> str | None:
        blocks: Any = module.transformer_blocks
        reasons = {DiffusersBlock().refuses(block) for block in blocks}
        return None if None in reasons else "none of its blocks can share their embedding"

    def inputs(self, module: nn.Module, generator: torch.Generator) -> None:
        return None


def _embedders(model: nn.Module) -> list[nn.Module]:
    """Of the blocks that have one."""
    blocks: Any = model._modules.get("transformer_blocks")
    norms = [block._modules.get("norm1") for block in blocks]
    embedders = [norm._modules.get("emb") for norm in norms if norm is not None]
    return [embedder for embedder in embedders if embedder is not None]
