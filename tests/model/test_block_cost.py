"""What a training block saves for its backward, launches and moves, beside the reference's."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from ditfast import MODELS, DiT, DiTConfig, ops, reference
from ditfast.bench.cost.count import AttentionAsOne, Cost
from ditfast.bench.measure.memory import saved_bytes
from ditfast.bench.suites.cost import trace
from ditfast.testing.inputs import randomize_

pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True)
def kernels_on():
    with ops.use_backend("triton"):
        yield


def traced(build, depth, batch=256):
    """(model, its inputs) of XL/2 in bf16 on meta tensors."""
    with torch.device("meta"):
        model = build(replace(MODELS["DiT-XL/2"], depth=depth)).bfloat16().train()
        x = torch.empty(batch, 4, 32, 32, dtype=torch.bfloat16)
        t, y = (torch.empty(batch, dtype=torch.int64) for _ in range(2))
    return model, (x, t, y)


def bytes_saved_by(build, depth):
    model, inputs = traced(build, depth)
    with AttentionAsOne(Cost()):
        return saved_bytes(lambda: model(*inputs).sum(), (*inputs, *model.parameters()))


def test_what_a_block_keeps_for_its_backward():
    """At most 62 % of the reference's: by hand 12 of 20 units of M * D, and the norms' and softmax's statistics."""
    fast, slow = (bytes_saved_by(build, 3) - bytes_saved_by(build, 2) for build in (DiT, reference.DiT))
    unit = 256 * 256 * 1152 * 2
    assert 12 * unit < fast < 12.1 * unit
    assert 20 * unit < slow < 20.1 * unit
    assert fast <= 0.62 * slow


def test_launches_of_a_training_block():
    """Forward and backward at most 26: loss and backward of one more block, attention one launch each way."""
    three, two = (
        trace(replace(MODELS["DiT-XL/2"], depth=depth), 256, torch.bfloat16, "train", "ditfast") for depth in (3, 2)
    )
    block = three.launches - two.launches
    # forward: norm, qkv, attention, projection, norm, fc1 with GELU, fc2 (its modulation is in the launch of all);
    # backward: two GEMMs for each Linear, the modulation's with its sum beside, the concatenated modulation, two norms
    # with their sums
    assert dict(block) == {
        "addmm": 3 + 1,
        "mm": 4 * 2,
        "linear_gelu": 1,
        "linear_gelu_backward": 1,
        "adaln_forward": 2,
        "adaln_backward": 2,
        "sum_partials": 2,
        "scaled_dot_product_attention": 1,
        "scaled_dot_product_attention_backward": 1,
        "cat": 1,
        "sum": 1,
    }
    assert block.total() == 24 <= 26


def test_bytes_of_a_training_step():
    """At most 60 % of the reference's: XL/2, batch 256, loss and backward."""
    fast, slow = (trace(MODELS["DiT-XL/2"], 256, torch.bfloat16, "train", name) for name in ("ditfast", "reference"))
    assert fast.total_bytes <= 0.6 * slow.total_bytes


def test_what_a_real_block_keeps():
    """The same by hooks on real tensors, unique storages: no statistic grows with D."""
    config = DiTConfig(depth=3, hidden_size=72, num_heads=1, latent_size=(16, 16), num_classes=10)
    fast = randomize_(DiT(config)).train()
    x, c = torch.randn(2, 64, 72), torch.randn(2, 72)
    branch = torch.randn_like(x).requires_grad_()
    gate = torch.randn_like(c).requires_grad_()

    def saved_streams(call, excluded):
        addresses = {value.untyped_storage().data_ptr() for value in excluded}
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = call()
        del out
        return sum(size for address, size in saved.items() if address not in addresses) / x.nbytes

    parameters = list(fast.blocks[1].parameters())
    x.requires_grad_()
    streams = saved_streams(lambda: fast.blocks[1](x, branch, gate, None, c, True, None), parameters)
    # the stream twice, qkv, the attention's output, both branches (one is the input), the pre-activation
    assert 12 <= streams <= 12.6
