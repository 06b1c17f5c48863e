"""What ``ditfast.accelerate`` knows of foreign modules: one file a family, and the registry of all of them."""

from ._adapter import Adapter, register_adapter, registered
from .diffusers import DiffusersBlock, DiffusersFeedForward
from .diffusers_model import DiffusersTransformer
from .official import OfficialBlock, OfficialFinalLayer
from .official_model import OfficialModel
from .timm import TimmAttention, TimmMlp

__all__ = [
    "Adapter",
    "DiffusersBlock",
    "DiffusersFeedForward",
    "DiffusersTransformer",
    "OfficialBlock",
    "OfficialFinalLayer",
    "OfficialModel",
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
    OfficialModel(),
    DiffusersFeedForward(),
    DiffusersBlock(),
    DiffusersTransformer(),
):
    register_adapter(_known)
