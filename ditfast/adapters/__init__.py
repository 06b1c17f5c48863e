"""What ``ditfast.accelerate`` knows of foreign modules: one file a family, and the registry of all of them."""

from .adapter import Adapter, register_adapter, registered
from .diffusers import DiffusersBlock, DiffusersFeedForward
from .official import OfficialBlock, OfficialFinalLayer
from .timm import TimmAttention, TimmMlp

__all__ = [
    "Adapter",
    "DiffusersBlock",
    "DiffusersFeedForward",
    "OfficialBlock",
    "OfficialFinalLayer",
    "TimmAttention",
    "TimmMlp",
    "register_adapter",
    "registered",
]

# inner modules first: a block fuses further where its attention and MLP are fused too
for _known in (
    TimmAttention(),
    TimmMlp(),
    OfficialBlock(),
    OfficialFinalLayer(),
    DiffusersFeedForward(),
    DiffusersBlock(),
):
    register_adapter(_known)
