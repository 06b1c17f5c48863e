"""accelerate(model, level="model"): one GEMM of all adaLN Linears in inference, and never a stale or foreign one."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from foreign_models import Block, Model, inputs, randomised
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode

import ditfast
from ditfast.adapters import _shared_modulation
from ditfast.bench.parity import judge

DEPTH = 3


def pair(**model):
    slow = randomised(Model(depth=DEPTH, **model)).eval()
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, level="model")
    return fast, slow


class Products(TorchDispatchMode):
    """Counts the products with each shape of matrices."""

    def __init__(self):
        super().__init__()
        self.shapes, self.dtypes = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.linear, torch.ops.aten.mm):
            self.dtypes.append(args[0].dtype)
            self.shapes.append([tuple(x.shape) for x in args if isinstance(x, torch.Tensor)])
        return function(*args, **(kwargs or {}))

    def shared(self, model):
        """How many hold the adaLN Linears of all layers."""
        rows = sum(
            module.out_features for name, module in model.named_modules() if name.endswith("modulation.1")
        )
        return sum(any(rows in shape for shape in shapes) for shapes in self.shapes)


def shared_gemms(model, *given):
    with Products() as products, torch.no_grad():
        model(*(given or inputs()))
    return products.shared(model)


def assert_same(fast, slow, given=None, dtype=torch.float32):
    given = given or inputs()
    exact = copy.deepcopy(slow).double()(given[0].double(), *given[1:])
    verdict = judge("model", fast(*given), slow(*given), exact, dtype)
    assert verdict.ok, verdict


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_gemm_in_inference(mode):
    fast, slow = pair()
    with mode():
        assert_same(fast, slow)
        assert_same(fast, slow, inputs(1))
    assert (shared_gemms(fast), shared_gemms(slow)) == (1, 0)
    blockwise = copy.deepcopy(slow)
    ditfast.accelerate(blockwise)
    assert shared_gemms(blockwise) == 0


@pytest.mark.kernels
def test_with_the_kernels():
    fast, slow = pair()
    with torch.no_grad():
        expected, exact = slow(*inputs()), copy.deepcopy(slow).double()(inputs()[0].double(), *inputs()[1:])
        with ditfast.ops.use_backend("triton"):
            found = fast(*inputs())
            assert shared_gemms(fast) == 1
    assert judge("model", found, expected, exact, torch.float32).ok


def test_training_goes_block_by_block():
    fast, slow = pair()
    with Products() as products:
        out = fast(*inputs())
    assert products.shared(fast) == 0
    gradients = [torch.autograd.grad(out.square().sum(), fast.blocks[0].adaLN_modulation[1].weight)[0]]
    x, *rest = inputs()
    for model, given in ((slow, x), (copy.deepcopy(slow).double(), x.double())):
        out = model(given, *rest)
        gradients.append(torch.autograd.grad(out.square().sum(), model.blocks[0].adaLN_modulation[1].weight)[0])
    verdict = judge("model", *gradients, torch.float32)
    assert verdict.ok, verdict


def changed(change):
    """An accelerated model changed after an inference call that made the copy, and an untouched one changed alike."""
    fast, slow = pair()
    with torch.no_grad():
        fast(*inputs())
    for model in (fast, slow):
        change(model)
    return fast, slow


def stepped(model, fused):
    model(*inputs()).square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused).step()


def written_through_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def written_by_a_way_through_the_model(model):
    model.blocks[1].adaLN_modulation[1].weight.data.mul_(2)
    for parameter in model.final_layer.parameters():
        parameter.detach().numpy()[:] *= 2


def written(model):
    with torch.no_grad():
        model.blocks[1].adaLN_modulation[1].weight.mul_(2)


def replaced(model):
    linear = model.final_layer.adaLN_modulation[1]
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(randomised(Model(depth=DEPTH), seed=7).state_dict()),
        lambda model: model.load_state_dict(randomised(Model(depth=DEPTH), seed=7).state_dict(), assign=True),
        lambda model: stepped(model, fused=False),
        lambda model: stepped(model, fused=True),
        written,
        written_through_data,
        written_by_a_way_through_the_model,
        replaced,
    ],
    ids=["loaded", "assigned", "stepped", "fused-step", "written", "data", "way", "replaced"],
)
def test_the_copy_is_made_anew(change):
    fast, slow = changed(change)
    with torch.no_grad():
        assert_same(fast, slow)
    assert shared_gemms(fast) == 1


class OwnConditions(Model):
    """Every block is given a condition of its own, made as ``how`` says."""

    how = "new"

    def forward(self, x, t, y):
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(ditfast.reference.ops.timestep_embedding(t, 64).to(x.dtype)) + self.y_embedder(y)
        for i, block in enumerate(self.blocks):
            if self.how == "new":
                c = c + i
            elif self.how == "written":
                c += i
            with torch.autocast("cpu", torch.bfloat16, enabled=self.how == "autocast" and i == 1):
                x = block(x, c).to(c.dtype)
        return self.final_layer(x, c)


@pytest.mark.parametrize("how", ["new", "written", "autocast"])
def test_conditions_that_differ_from_block_to_block(how):
    slow = randomised(OwnConditions(depth=DEPTH)).eval()
    slow.how = how
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, level="model")
    with torch.no_grad():
        if how == "autocast":  # bf16 in the second block alone
            exact = copy.deepcopy(slow).double()
            exact.how = "same"
            exact = exact(inputs()[0].double(), *inputs()[1:])
            verdict = judge("model", fast(*inputs()), slow(*inputs()), exact, torch.bfloat16)
            assert verdict.ok, verdict
            with Products() as products:
                fast(*inputs())
            own = [
                shapes
                for shapes, dtype in zip(products.shapes, products.dtypes, strict=True)
                if dtype == torch.bfloat16 and (48, 6 * 48) in shapes
            ]
            assert len(own) == 1
        else:
            assert_same(fast, slow)


def test_changed_layers_are_called_as_modules():
    fast, slow = pair()
    heard = []
    fast.blocks[1].adaLN_modulation[1].register_forward_hook(lambda *_: heard.append("linear"))
    with torch.no_grad():
        assert_same(fast, slow)
    assert heard == ["linear"] and shared_gemms(fast) == 0
    fast, slow = pair()
    for model in (fast, slow):
        model.blocks[0].adaLN_modulation[0] = nn.GELU()
    with torch.no_grad():
        assert_same(fast, slow)
    assert shared_gemms(fast) == 0
    fast, slow = pair()
    for model in (fast, slow):
        nn.utils.parametrizations.weight_norm(model.blocks[2].adaLN_modulation[1])
    with torch.no_grad():
        assert_same(fast, slow)


def test_one_block_left_to_its_own_code():
    slow = randomised(Model(depth=DEPTH)).eval()
    slow.blocks[1].norm2 = nn.LayerNorm(48)  # with parameters: refused
    fast = copy.deepcopy(slow)
    report = ditfast.accelerate(fast, level="model")
    assert [entry.module for entry in report.skipped] == ["blocks.1"]
    with torch.no_grad():
        assert_same(fast, slow)


def test_wrappers_that_checkpoint_activations():
    fast, slow = pair()
    for i in range(DEPTH):
        fast.blocks[i] = checkpoint_wrapper(fast.blocks[i])
    with torch.no_grad():
        assert_same(fast, slow)
    assert shared_gemms(fast) == 1
    wrapped = copy.deepcopy(slow)
    for i in range(DEPTH):
        wrapped.blocks[i] = checkpoint_wrapper(wrapped.blocks[i])
    ditfast.accelerate(wrapped, level="model")
    with torch.no_grad():
        assert_same(wrapped, slow)
    assert shared_gemms(wrapped) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision(dtype):
    fast, slow = pair()
    exact = copy.deepcopy(slow).double()(inputs()[0].double(), *inputs()[1:])
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert judge("model", fast(*inputs()), slow(*inputs()), exact, dtype).ok
        assert shared_gemms(fast) == 1
    with torch.no_grad():
        assert_same(fast, slow)  # autocast is over: the copy is fp32 again
    fast, slow = fast.to(dtype), slow.to(dtype)
    given = (inputs()[0].to(dtype), *inputs()[1:])
    exact = copy.deepcopy(slow).double()(given[0].double(), *given[1:])
    with torch.no_grad():
        assert judge("model", fast(*given), slow(*given), exact, dtype).ok
        assert shared_gemms(fast, *given) == 1


def test_compiled():
    fast, slow = pair()
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same(compiled, slow)
        assert_same(fast, slow)  # what is compiled does not stop what is not


def test_copies_pickles_and_restored_models_carry_nothing():
    fast, slow = pair()
    with torch.no_grad():
        fast(*inputs())
        kept = weakref.ref(_shared_modulation._caches[fast].made.weight)
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert twin not in _shared_modulation._caches
            written(twin)
            changed_slow = copy.deepcopy(slow)
            written(changed_slow)
            assert_same(twin, changed_slow)
            assert shared_gemms(twin) == 1
        buffer = io.BytesIO()
        torch.save(fast.state_dict(), buffer)
        assert len(buffer.getvalue()) < 1.1 * sum(p.nbytes for p in fast.parameters()) + 20_000
        assert ditfast.restore(fast) == 1 + 1 + 3 * DEPTH
        gc.collect()
        assert kept() is None and type(fast) is Model
        assert_same(fast, slow)
    assert shared_gemms(fast) == 0


def test_two_models_do_not_share():
    first, slow = pair()
    second = copy.deepcopy(first)
    written(second)
    changed_slow = copy.deepcopy(slow)
    written(changed_slow)
    first.blocks[0].register_forward_hook(
        lambda *_: list(second(*inputs()))[:0] or None
    )  # one runs within the other
    with torch.no_grad():
        assert_same(second, changed_slow)
        assert_same(first, slow)


def mapped(model, x, t, y):
    return torch.func.vmap(lambda one: model(one[None], t[:1], y[:1])[0])(x)


def doubled(model, *given):
    parameters = {name: 2 * parameter for name, parameter in model.named_parameters()}
    return torch.func.functional_call(model, parameters, given)


def test_transforms():
    fast, slow = pair()
    given = inputs()
    with torch.no_grad():
        for transform in (mapped, doubled):
            exact = transform(copy.deepcopy(slow).double(), given[0].double(), *given[1:])
            verdict = judge("model", transform(fast, *given), transform(slow, *given), exact, torch.float32)
            assert verdict.ok, (transform, verdict)
        assert_same(fast, slow)


def test_levels_and_what_they_raise():
    model = randomised(Model(depth=DEPTH))
    with pytest.raises(ValueError, match="level must be one of block, model, got 'whole'"):
        ditfast.accelerate(model, level="whole")
    assert "official model" not in str(ditfast.accelerate(model))
    report = ditfast.accelerate(model, level="model")
    assert [(entry.module, entry.adapter) for entry in report.entries if entry.status == "accelerated"] == [
        ("", "official model")
    ]
    again = ditfast.accelerate(model)
    assert {entry.status for entry in again.entries} == {"already"} and len(again.entries) == len(
        report.entries
    )
    ditfast.restore(model)
    with ditfast.accelerated(model, level="model"):
        assert shared_gemms(model.eval()) == 1
    assert type(model) is Model
    block = Block(48, 2)
    with pytest.raises(
        ValueError, match=r'level="model", and no whole model \(official model\) could be accelerated'
    ):
        ditfast.accelerate(block, level="model")
    assert type(block) is Block and type(block.attn).__name__ == "Attention"


def test_conditions_of_several_widths_are_refused():
    model = randomised(Model(depth=DEPTH))
    model.blocks[1].adaLN_modulation[1] = nn.Linear(24, 6 * 48)
    with pytest.raises(ValueError, match="its adaLN Linears take conditions of several widths: 24, 48"):
        ditfast.accelerate(model, level="model")
    assert type(model) is Model


class Encoded(Model):
    """With a block beside the others, whose condition has another width."""

    def __init__(self):
        super().__init__()
        self.encoder = Block(48, 2)
        self.encoder.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(20, 6 * 48))

    def forward(self, x, t, y):
        handle = self.blocks[0].register_forward_pre_hook(
            lambda _, given: (self.encoder(given[0], given[1][:, :20]), given[1])
        )
        try:
            return super().forward(x, t, y)
        finally:
            handle.remove()


def test_an_accelerated_block_elsewhere_in_the_model():
    slow = randomised(Encoded())
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, level="model", strict=True)
    with torch.no_grad():
        assert_same(fast, slow)
