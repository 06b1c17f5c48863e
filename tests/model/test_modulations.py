"""ditfast.DiT's adaLN Linears in one launch: it reads the current weights, each from a tensor of its own."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import ditfast
from ditfast import ops, reference
from ditfast.kernels import modulations as kernels
from ditfast.parity import judge, relative_error
from ditfast.plain import are_readable
from ditfast.testing.inputs import random_batch, randomize_
from tests.kernels.conftest import watch
from tests.model import conftest as models

pytestmark = pytest.mark.kernels
# the interpreter takes milliseconds for each program
TINY = ditfast.DiTConfig(depth=2, hidden_size=24, num_heads=3, latent_size=4, patch_size=2, num_classes=10)


def pair():
    return models.pair(TINY)


def modulations(model, t, y):
    """The modulations of the blocks and the final layer, each by its own Linear."""
    c = model.t_embedder(t) + model.y_embedder(y)
    return torch.cat([layer.adaLN_modulation(c) for layer in (*model.blocks, model.final_layer)], dim=1)


@torch.no_grad()
def assert_right(fast, slow, inputs):
    exact = modulations(copy.deepcopy(slow).double(), *inputs[1:])
    verdict = judge("model", fast.modulation(*inputs[1:]), modulations(slow, *inputs[1:]), exact, torch.float32)
    assert verdict.ok, verdict


@pytest.fixture
def launches(monkeypatch):
    """How many Linears each launch took."""
    return watch(monkeypatch, kernels.Modulations, note=lambda _, arguments: len(arguments[1]))


def load_in_place(fast, source):
    fast.load_state_dict(source.state_dict())


def load_by_assignment(fast, source):
    fast.load_state_dict(source.state_dict(), assign=True)


def swap_data(fast, source):
    for parameter, target in zip(fast.parameters(), source.parameters(), strict=True):
        parameter.data = target.data.clone()


def swap_data_twice(fast, source):
    # the second swap may get the first one's freed addresses
    swap_data(fast, randomize_(reference.DiT(TINY), 7))
    swap_data(fast, source)


def average(fast, source):
    with torch.no_grad():
        for parameter, target in zip(fast.parameters(), source.parameters(), strict=True):
            parameter.lerp_(target, 1.0)


def replace_parameters(fast, source):
    for module, target in zip(fast.modules(), source.modules(), strict=True):
        for name, parameter in target.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def convert_and_back(fast, source):
    fast.double()
    load_in_place(fast, source)
    fast.float()


def write_through_data(fast, source):
    for parameter, target in zip(fast.parameters(), source.parameters(), strict=True):
        parameter.data.copy_(target.data)


def step_to(fast, source):
    """By a fused optimiser, which does not change the parameters' version counters."""
    for parameter, target in zip(fast.parameters(), source.parameters(), strict=True):
        parameter.grad = parameter.detach() - target.detach()
    parameters = [parameter for parameter in fast.parameters() if parameter.requires_grad]
    torch.optim.SGD(parameters, lr=1.0, fused=True).step()


@pytest.mark.parametrize(
    "change",
    [
        load_in_place,
        load_by_assignment,
        swap_data,
        swap_data_twice,
        average,
        replace_parameters,
        convert_and_back,
        write_through_data,
        step_to,
    ],
)
def test_changed_weights_are_seen(change, launches):
    fast, _ = pair()
    other = randomize_(reference.DiT(TINY), seed=1).eval()
    inputs = random_batch(TINY, 2)
    with ops.use_backend("triton"):
        before = fast.modulation(*inputs[1:])
        change(fast, other)
        assert not torch.equal(fast.modulation(*inputs[1:]), before)
        assert_right(fast, other, inputs)
    assert set(launches) == {TINY.depth + 1}


def test_a_write_by_a_reference_from_before_and_a_copy():
    fast, slow = pair()
    inputs = random_batch(TINY, 2)
    data = [parameter.data for parameter in fast.parameters()]
    with ops.use_backend("triton"):
        twin, before = copy.deepcopy(fast), fast.modulation(*inputs[1:])
        for values in data:
            values.mul_(1.5)
        slow.load_state_dict(fast.state_dict())
        assert_right(fast, slow, inputs)
        assert torch.equal(twin.modulation(*inputs[1:]), before)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_transform_leaves_nothing_behind(frozen):
    fast, slow = pair()
    fast.requires_grad_(not frozen)
    x, t, y = random_batch(TINY, 2)
    with ops.use_backend("triton"):
        torch.func.grad(lambda x: fast(x, t, y).sum())(x)
        assert_right(fast, slow, (x, t, y))
        other = {name: 2 * value.detach() for name, value in slow.named_parameters()}
        torch.func.functional_call(fast, other, (x, t, y))
        assert_right(fast, slow, (x, t, y))


def test_autocast_reads_the_weights_as_they_are_stored(monkeypatch):
    fast, slow = pair()
    inputs = random_batch(TINY, 2)
    stored = watch(monkeypatch, kernels.Modulations, note=lambda _, arguments: arguments[1])
    with ops.use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        low = fast.modulation(*inputs[1:])
    assert [weight.data_ptr() for weight in stored[0]] == [
        layer.adaLN_modulation[1].weight.data_ptr() for layer in (*fast.blocks, fast.final_layer)
    ]
    assert low.dtype == torch.bfloat16
    with torch.no_grad():
        assert relative_error(low, modulations(slow, *inputs[1:])) < torch.finfo(torch.bfloat16).eps


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclassed(linear):
    other = Doubled(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    return other


def hooked(linear):
    linear.register_forward_hook(lambda module, args, output: 2 * output)
    return linear


def without_bias(linear):
    linear.bias = None
    return linear


@pytest.mark.parametrize("change", [subclassed, hooked, without_bias])
def test_with_a_replaced_layer_each_runs_its_own(change, launches):
    fast, slow = pair()
    for model in (fast, slow):
        layers = model.blocks[1].adaLN_modulation
        layers[1] = change(layers[1])
    with ops.use_backend("triton"):
        assert_right(fast, slow, random_batch(TINY, 2))
    assert not launches


def test_sparse_weights_are_not_read():
    linear = nn.Linear(24, 8)
    assert are_readable(linear)
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse(), requires_grad=False)
    assert not are_readable(linear)


def written_by_a_hook(block, _):
    block.adaLN_modulation[1].weight.data.mul_(1.5)


@pytest.mark.parametrize("training", [False, True])
def test_hooks_that_write_weights_are_seen(training, launches):
    fast, slow = pair()
    inputs = random_batch(TINY, 2)
    for model in (fast, slow):
        model.blocks[1].register_forward_pre_hook(written_by_a_hook)
    exact = copy.deepcopy(slow).double()(inputs[0].double(), *inputs[1:])
    with ops.use_backend("triton"), torch.set_grad_enabled(training):
        verdict = judge("model", fast(*inputs), slow(*inputs), exact, torch.float32)
    assert verdict.ok and not launches, verdict


def replica(model):
    """As torch.nn.parallel.replicate makes them: the weights are plain tensors, not parameters."""
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            setattr(twin, name, twins[child])
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter * 1)
        for name, buffer in module._buffers.items():
            twin._buffers[name] = buffer
    return twins[model]


def test_a_replica_trains(launches):
    fast, slow = pair()
    inputs = random_batch(TINY, 2)
    gradients = []
    for model in (fast, slow):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("adaLN" in name)
        with ops.use_backend("triton" if model is fast else "torch"):
            (replica(model) if model is fast else model)(*inputs).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert launches == [TINY.depth + 1]
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-4


def test_a_silu_that_writes_its_input():
    fast, slow = pair()
    inputs = random_batch(TINY, 2)
    for model in (fast, slow):
        model.blocks[0].adaLN_modulation[0].inplace = True
    exact = copy.deepcopy(slow).double()(inputs[0].double(), *inputs[1:])
    with torch.no_grad():
        verdict = judge("model", fast(*inputs), slow(*inputs), exact, torch.float32)
    assert verdict.ok, verdict


@pytest.mark.parametrize("compiled", [False, True])
def test_training(compiled, launches):
    """One launch in the forward; each layer's gradient is computed separately."""
    fast, slow = pair()
    x, t, y = random_batch(TINY, 3)
    call = torch.compile(fast, backend="aot_eager", fullgraph=True) if compiled else fast
    with ops.use_backend("triton"):
        output = call(x, t, y)
    assert launches == [TINY.depth + 1]
    incoming = torch.randn_like(output)
    outputs = {fast: output, slow: slow(x, t, y)}
    exact = copy.deepcopy(slow).double()
    outputs[exact] = exact(x.double(), t, y)
    gradients_of_models = []
    for model, output in outputs.items():
        parameters = [parameter for name, parameter in model.named_parameters() if "adaLN" in name or "t_emb" in name]
        gradients_of_models.append(torch.autograd.grad(output, parameters, incoming.to(output)))
    for gradients in zip(*gradients_of_models, strict=True):
        verdict = judge("model", *gradients, torch.float32)
        assert verdict.ok, verdict


def test_each_runs_its_own_in_training_under_autocast(launches):
    fast, _ = pair()
    with ops.use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        fast(*random_batch(TINY, 2))
    assert not launches


def test_compiled_it_is_one_node():
    fast, slow = pair()
    inputs = random_batch(TINY, 2)
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    with ops.use_backend("triton"), torch.no_grad():
        compiled = torch.compile(fast, backend=backend, fullgraph=True)
        verdict = relative_error(compiled(*inputs), copy.deepcopy(slow).double()(inputs[0].double(), *inputs[1:]))
    assert verdict < 1e-5
    [nodes] = graphs
    assert sum("ditfast.modulations" in node for node in nodes) == 1


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def saved_by_torch(model, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=True)


def saved_as_a_file(model, folder):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), folder / "model.safetensors")
    return safetensors.load_file(folder / "model.safetensors")


def saved_as_a_model(model, folder):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, folder / "model.safetensors")
    return safetensors.load_file(folder / "model.safetensors")


def saved_by_accelerate(model, folder):
    accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate (make env installs it)")
    try:
        accelerate.Accelerator(cpu=True).save_model(model, folder)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)  # shared by all Accelerators of a process
    return saved_files(folder)


def saved_by_the_hub(model, folder):
    hub = pytest.importorskip("huggingface_hub")
    hub.save_torch_model(model, folder)
    return saved_files(folder)


def saved_files(folder):
    from safetensors.torch import load_file

    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


SAVERS = (saved_by_torch, saved_as_a_file, saved_as_a_model, saved_by_accelerate, saved_by_the_hub)


@pytest.mark.parametrize("save", SAVERS)
def test_no_parameter_shares_its_storage_and_savers_keep_all(save, tmp_path):
    fast, _ = pair()
    with ops.use_backend("triton"):
        fast.modulation(*random_batch(TINY, 2)[1:])
    tensors = list(fast.state_dict().values())
    assert len({value.untyped_storage().data_ptr() for value in tensors}) == len(tensors)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in tensors)
    expected, saved = state_of(fast), save(fast, tmp_path)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


def test_reset_cache_is_refused_by_name():
    with pytest.raises(TypeError, match="keeps no copy of its weights any more: leave reset_cache"):
        ditfast.DiT(replace(TINY, depth=1)).reset_cache()
