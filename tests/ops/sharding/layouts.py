"""The layouts that test_sharding.py tries, as "arguments > results and gradients", each with a letter.

0, 1, 2: sharded along that axis; r: replicated; p: a partial sum. The part after ">" is checked on the kernels.
"""

import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from ditfast.testing.operators import Shape

PLACEMENTS = {"r": Replicate(), "p": Partial(), "0": Shard(0), "1": Shard(1), "2": Shard(2)}

_ROWS = "weightr biasr > output0{0} d_x{0} d_weightp d_biasp"
_MLP_ROWS = "w1r b1r w2r b2r > output0{0} d_x{0} d_w1p d_b1p d_w2p d_b2p"

LAYOUTS = {
    "layer_norm_modulate": (
        "xr shiftr scaler > output0r d_xr d_shiftr d_scaler",
        "x0 shift0 scale0 > output00 d_x0 d_shift0 d_scale0",
        "xp shift0 scaler > output00 d_x0 d_shift0 d_scale0",
        "x2 shift1 scale1 > output0r d_xr d_shiftr d_scaler",
        "x1 shiftr scaler > output01 d_x1 d_shiftp d_scalep",
    ),
    "gated_residual": (
        "residual0 branch0 gate0 > output00 d_residual0 d_branch0 d_gate0",
        "residual1 branchp gater > output01 d_residual1 d_branch1 d_gatep",
        "residualr branchp gater > output0r d_residualr d_branchr d_gater",
        "residual1 branch1 gater > output01 d_residual1 d_branch1 d_gatep",
    ),
    "gated_residual_layer_norm_modulate": (
        "residual0 branch0 gate0 shift0 scale0 > output00 output10 d_residual0 d_branch0 d_gate0 d_shift0 d_scale0",
        "residualr branchp gater shiftr scaler > output0r output1r d_residualr d_branchr d_gater d_shiftr d_scaler",
        "residual1 branch1 gater shiftr scaler > output01 output11 d_residual1 d_branch1 d_gatep d_shiftp d_scalep",
    ),
    "linear_gelu": (
        f"x0 {_ROWS.format(0)}",
        f"x1 {_ROWS.format(1)}",
        "x2 weight1 biasr > output0r",  # a partial sum, which must be reduced before GELU
        "xp weightr biasr > output0r",
        "xr weight0 bias0 > output02 d_xp d_weight0 d_bias0",
    ),
    "linear_gated_residual": (
        "x0 weightr biasr gate0 residual0 > output00 d_x0 d_weightp d_biasp d_gate0 d_residual0",
        "x1 weightr biasr gater residual1 > output01 d_x1 d_weightp d_biasp d_gatep d_residual1",
        "x2 weight1 biasr gater residual1 > output01 d_x2 d_weight1 d_biasp d_gatep d_residual1",
        "x2 weight1 biasr gater residualr > output0r d_x2 d_weight1 d_biasr d_gater d_residualr",
    ),
    "gelu_mlp": (
        f"x0 {_MLP_ROWS.format(0)}",
        f"x1 {_MLP_ROWS.format(1)}",
        "xr w10 b10 w21 b2r > output0p d_xp d_w10 d_b10 d_w21 d_b2r",
    ),
    "self_attention": (
        "qkvr > output0r d_qkvr",
        "qkv1 > output0r d_qkvr",
        "qkv2 > output0r d_qkvr",
        "qkv0 > output00 d_qkv0",
    ),
    "self_attention+bias": (
        "qkvr biasr > output0r d_qkvr d_biasr",
        "qkv0 bias0 > output00 d_qkv0",
        "qkv0 biasr > output00 d_qkv0 d_biasp",
    ),
    "conditioning": ("t_embr yr tabler > output0r", "t_emb0 y0 tabler > output00"),
    "timestep_embedding": ("tr > output0r", "t0 > output00"),
}

_ADALN, _MLP = LAYOUTS["gated_residual_layer_norm_modulate"], LAYOUTS["gelu_mlp"]
_UNEVEN, _SMALL = Shape(3, 7, 16), Shape(4, 2, 16)

# (operator, layout, what else is special): uneven parts, too few of them, mixed dtypes, one gradient at a time
OTHERS = [
    ("gated_residual_layer_norm_modulate", _ADALN[0], {"shape": _UNEVEN}),
    ("gated_residual_layer_norm_modulate", _ADALN[2], {"shape": _UNEVEN}),
    ("linear_gelu", f"x1 {_ROWS.format(1)}", {"shape": _UNEVEN}),
    ("linear_gelu", "xr weight0 bias0 > output0r", {"shape": Shape(4, 2, 24, ratio=1)}),  # not 12 columns a rank
    ("self_attention", "qkv0 > output00 d_qkv0", {"shape": _UNEVEN}),
    ("self_attention+bias", "qkv0 biasr > output00 d_qkv0 d_biasp", {"shape": _UNEVEN}),
    ("layer_norm_modulate", "x0 shift0 scale0", {"shape": Shape(1, 7, 16)}),
    ("layer_norm_modulate", "x1 shiftr scaler", {"shape": Shape(3, 1, 16)}),
    ("gated_residual_layer_norm_modulate", _ADALN[2], {"dtype": torch.bfloat16, "mixed": True}),
    ("linear_gelu", f"x0 {_ROWS.format(0)}", {"wanted": ()}),
    ("gelu_mlp", _MLP[2], {"wanted": ()}),
    ("self_attention", "qkv0 > output00", {"wanted": ()}),
    *(
        ("gated_residual_layer_norm_modulate", _ADALN[2], {"shape": _SMALL, "wanted": (name,)})
        for name in ("residual", "branch", "gate", "shift")
    ),
    *(("gelu_mlp", _MLP[2], {"shape": _SMALL, "wanted": (name,)}) for name in ("x", "w1", "b1", "w2", "b2")),
]
