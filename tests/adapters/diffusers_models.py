"""Small random transformers of diffusers', and how the tests compare two of them."""

import copy

import diffusers
import torch
from diffusers.models.attention import BasicTransformerBlock

from ditfast.parity import judge
from ditfast.testing.inputs import randomize_

DEPTH = 3
ALL = 2 * DEPTH  # blocks with their feed-forwards
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 36,
    "num_layers": DEPTH,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
    "out_channels": 8,
    "norm_eps": 1e-2,  # unlike the first norm's 1e-6
}


def transformer(same=True, **overrides):
    """Random parameters, open gates; ``same`` embedders in all blocks, as in every released DiT."""
    model = randomize_(diffusers.DiTTransformer2DModel(**{**SIZES, **overrides})).eval()
    if same:
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def pair(**overrides):
    slow = transformer(**overrides)
    return copy.deepcopy(slow), slow


def inputs(batch=3, dtype=torch.float32):
    x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    conditions = {"timestep": torch.tensor([1, 500, 999][:batch]), "class_labels": torch.tensor([0, 7, 10][:batch])}
    return {"hidden_states": x.to(dtype), **conditions, "return_dict": False}


def run(model, **arguments):
    torch.manual_seed(5)  # labels are dropped in training
    return model(**{**inputs(dtype=model.pos_embed.proj.weight.dtype), **arguments})[0]


def assert_parity(fast, slow, joined=False, **arguments):
    """Outputs and every gradient (``joined`` into one), by the rule for models."""
    models = (fast, slow, copy.deepcopy(slow).double())
    outputs = [run(model, **arguments) for model in models]
    incoming = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3))
    # a constant on every key leaves the softmax as it is: its gradient is zero but for rounding
    names = [name for name, p in slow.named_parameters() if p.requires_grad and "to_k.bias" not in name]
    gradients = [
        torch.autograd.grad(out, [model.get_parameter(name) for name in names], incoming.to(out))
        for out, model in zip(outputs, models, strict=True)
    ]
    if joined:
        gradients = [[torch.cat([gradient.flatten() for gradient in each])] for each in gradients]
        names = ["gradients"]
    for name, (actual, yardstick, exact) in zip(
        ["output", *names], [outputs, *zip(*gradients, strict=True)], strict=True
    ):
        verdict = judge("model", actual.detach(), yardstick.detach(), exact.detach(), torch.float32)
        assert verdict.ok, (name, verdict)


def assert_same_in_inference(fast, slow, **arguments):
    with torch.no_grad():
        exact = run(copy.deepcopy(slow).double(), **arguments)
        verdict = judge("model", run(fast, **arguments), run(slow, **arguments), exact, torch.float32)
    assert verdict.ok, verdict


def lone_block(**overrides):
    sizes = {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10, "norm_elementwise_affine": False}
    sizes |= {"activation_fn": "gelu-approximate", **overrides}
    return randomize_(BasicTransformerBlock(72, 2, 36, **sizes))


def hook(path):
    return lambda block: block.get_submodule(path).register_forward_hook(lambda *_: None)


def put(path, name, value):
    return lambda block: setattr(block.get_submodule(path), name, value)
