"""diffusers' ``DiTTransformer2DModel`` as a whole: timestep and label embedded once for all blocks in inference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ._adapter import Adapter
from ._shared_embedding import forget, sharing
from .diffusers import DiffusersBlock


class FastTransformer(nn.Module):
    """The model's own forward, within which its accelerated blocks share their embedding where that is exact."""

    transformer_blocks: nn.ModuleList

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with sharing(self, _embedders(self)):
            return super().forward(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        # so begins every walk over the parameters, also from outside the model
        forget(self)
        yield from super().named_modules(*args, **kwargs)

    def unswapped(self) -> None:
        forget(self)

    def train(self, mode: bool = True) -> Any:
        forget(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        forget(self)  # which holds the storages
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]


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
