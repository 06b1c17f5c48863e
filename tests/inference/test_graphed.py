"""``ditfast.graphed`` rehearsed without a GPU, by the stand-in of test_graphs.py."""

import copy
import random
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ditfast
from ditfast.inference import graphs
from ditfast.inference.agreement import agree, rounding
from ditfast.inference.capturable import Refused, capturable
from ditfast.inference.snapshot import Snapshot
from ditfast.parity import judge, relative_error
from tests.adapters.conftest import pair
from tests.adapters.foreign_models import SMALL
from tests.adapters.foreign_models import inputs as foreign_inputs
from tests.inference.test_changes import assigned, moved, swapped, written_as_data
from tests.inference.test_engine import loaded, models, replaced, stepped, written
from tests.inference.test_graphs import captures as _captures
from tests.inference.test_graphs import changed_epsilon, without_a_gelu
from tests.kernels.conftest import watch

captures = _captures


def inputs(batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (batch,), generator=generator)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.arange(batch) * 300, labels


def accelerated(**model):
    fast, slow = pair(**model)
    return fast.eval(), slow.eval()


every_model = pytest.mark.parametrize("make", [models, accelerated])


@torch.no_grad()
def assert_right(fast, slow, arguments=None):
    """The graphed model by the rule for models, beside the plain one."""
    x, t, y = arguments or inputs()
    dtype = next(slow.parameters()).dtype
    x = x.to(dtype)
    actual = fast(x, t, y)
    verdict = judge("model", actual, slow(x, t, y), copy.deepcopy(slow).double()(x.double(), t, y), dtype)
    assert verdict.ok, verdict
    return actual


@pytest.mark.quick
@every_model
def test_a_call_is_captured_once(make, captures):
    model, slow = make()
    before = Snapshot(model)
    fast = ditfast.graphed(model)
    outputs = [assert_right(fast, slow, inputs(seed=seed)) for seed in range(3)]
    copies = [output.clone() for output in outputs]
    assert_right(fast, slow, inputs(seed=3))
    assert all(map(torch.equal, outputs, copies)) and not torch.equal(*outputs[1:])
    assert captures == [3] and fast.unavailable() is None and repr(fast).endswith(", 1 graphs)")
    assert fast.model is model and before.is_current()


def test_shapes_and_dtypes_have_graphs_of_their_own(captures):
    model, slow = models()
    fast = ditfast.graphed(model, limit=2)
    for batch in (1, 2, 1, 3, 1, 2):
        assert_right(fast, slow, inputs(batch))
    assert captures == [1, 2, 3, 2]  # of 2 and 3, the one that was used longer ago was dropped
    x, t, y = inputs(2)
    assert_right(fast, slow, (x, t.int(), y))
    assert captures == [1, 2, 3, 2, 2]


def test_a_method_is_graphed(captures):
    model, slow = models()
    fast = ditfast.graphed(model.forward_with_cfg)
    x, t, y = inputs(2)
    for scale in (3.0, 3.0, 1.5):
        with torch.no_grad():
            latents, *rest = torch.cat([x, x]), torch.cat([t, t]), y, scale
            exact = copy.deepcopy(slow).double().forward_with_cfg(latents.double(), *rest)
            yardstick = slow.forward_with_cfg(latents, *rest)
            assert judge("model", fast(latents, *rest), yardstick, exact, torch.float32).ok
    assert captures == [4, 4] and fast.model is model


class Calculation(nn.Module):
    """Of its arguments, in whatever form they come."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.eval()

    def forward(self, values, *, add=None, factor=1, name="sum"):
        total = self.weight * factor * sum(values)
        total = total if add is None else total + add["to"]
        return {name: total, "parts": (total + 1, factor, None)}


def test_arguments_and_results_in_collections(captures):
    fast = ditfast.graphed(model := Calculation())
    for value in (1.0, 5.0):
        x, y = torch.full((3,), value), torch.full((3,), -2 * value)
        for given in ({}, {"add": {"to": x}}, {"factor": 2}, {"factor": 2.0}, {"factor": True}, {"name": "all"}):
            actual, expected = fast([x, y], **given), model([x, y], **given)
            assert actual.keys() == expected.keys()
            assert torch.equal(actual[given.get("name", "sum")], expected[given.get("name", "sum")])
            assert torch.equal(actual["parts"][0], expected["parts"][0])
            assert actual["parts"][1:] == expected["parts"][1:]
            assert type(actual["parts"][1]) is type(expected["parts"][1])
    assert len(captures) == 6
    assert fast(values=[x, y])["sum"].requires_grad is False and len(captures) == 7


def average(model):
    """A moving average's weights, copied."""
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(1.1)
        for mine, theirs in zip(model.parameters(), averaged.module.parameters(), strict=True):
            mine.copy_(theirs)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        *((models, change) for change in (loaded, written, stepped, average, written_as_data)),
        *((accelerated, change) for change in (loaded, stepped, average)),
    ],
)
def test_weights_written_in_place_need_no_capture(make, change, captures):
    model, slow = make()
    fast = ditfast.graphed(model)
    before = assert_right(fast, slow)
    for each in (model, slow):
        change(each)
    assert not torch.equal(assert_right(fast, slow), before)
    assert captures == [3]


def transposed(model):
    weight = model.blocks[0].attn.proj.weight
    weight.data = weight.data.t()  # where it was, in another layout


def set_anew(model):
    linear = model.blocks[0].mlp.fc1
    linear.weight = nn.Parameter(1.5 * linear.weight.detach())


def refilled(model):
    """Weights without memory for a while, as offloading leaves them."""
    for parameter in model.parameters():
        kept = parameter.data
        parameter.data = kept.clone()


@pytest.mark.parametrize(
    "change", [replaced, assigned, swapped, moved, transposed, set_anew, refilled, changed_epsilon, without_a_gelu]
)
def test_what_moved_or_was_replaced_is_captured_anew(change, captures):
    model, slow = models()
    fast = ditfast.graphed(model)
    assert_right(fast, slow)
    for each in (model, slow):
        change(each)
    for _ in range(2):
        assert_right(fast, slow)
    assert captures == [3, 3] and repr(fast).endswith(", 1 graphs)")


def test_restored_and_accelerated_between_calls(captures):
    model, slow = accelerated()
    fast = ditfast.graphed(model)
    assert_right(fast, slow)
    ditfast.restore(model)
    assert_right(fast, slow)
    ditfast.accelerate(model, check=False)
    assert_right(fast, slow)
    assert captures == [3, 3, 3]


class Settings(nn.Module):
    """A forward that goes by Python values of every kind."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.scale, self.scaling, self.merged = 1.0, {"default": 1.0}, []
        self.options = {"inner": [SimpleNamespace(power=1.0)]}
        self.table = torch.ones(3)
        self.function = torch.sin
        self.hidden = [nn.Linear(3, 3)]
        self.train(False)

    def forward(self, x):
        x = self.function(x * self.weight * self.scale * sum(self.scaling.values()) + len(self.merged)) * self.table
        x = x * self.options["inner"][0].power
        return self.hidden[0](x)


def set_hidden(model):
    model.hidden[0].bias = nn.Parameter(torch.full((3,), 3.0))


SETTINGS = {
    "a number": lambda model: setattr(model, "scale", 2.0),
    "its type": lambda model: setattr(model, "scale", 2),
    "a dictionary": lambda model: model.scaling.update(default=3.0),
    "a key": lambda model: model.scaling.update(other=1.0),
    "a list": lambda model: model.merged.append("default"),
    "an object": lambda model: setattr(model.options["inner"][0], "power", 2.0),
    "a tensor": lambda model: setattr(model, "table", torch.full((3,), 2.0)),
    "a function": lambda model: setattr(model, "function", torch.cos),
    "a hidden layer": set_hidden,
    "a new attribute": lambda model: setattr(model, "further", 1),
    "none any more": lambda model: delattr(model, "further"),
}


def test_settings_of_layers_are_seen(captures):
    """One after the other, each with a capture of its own; equal values set again need none."""
    fast = ditfast.graphed(model := Settings())
    x = torch.linspace(-1, 1, 6).view(2, 3)
    with torch.no_grad():
        for count, (what, change) in enumerate(SETTINGS.items()):
            fast(x)
            assert len(captures) == count + 1, what
            change(model)
            torch.testing.assert_close(fast(x), model(x))
        model.scale, model.scaling = int("2"), {**model.scaling}
        model.table.mul_(2)
        torch.testing.assert_close(fast(x), model(x))
        assert len(captures) == len(SETTINGS) + 1


def test_what_was_appended_last_is_seen():
    module = nn.Identity()
    module.last = [1]
    snapshot = Snapshot(module)
    assert snapshot.is_current()
    module.last.append(2)
    assert not snapshot.is_current() and snapshot.difference(Snapshot(module)) == "last.1"


def merged(layers):
    for layer in layers:
        layer.merge()


def rescaled(layers):
    for layer in layers:
        layer.scaling["default"] *= 3.0


def scaled(layers):
    for layer in layers:
        layer.scale_layer(0.5)


def switched_off(layers):
    for layer in layers:
        layer.enable_adapters(False)


@pytest.mark.parametrize("change", [merged, rescaled, scaled, switched_off])
def test_adapters_of_peft(change, captures):
    peft = pytest.importorskip("peft", reason="needs the package peft")

    def inject(model):
        torch.manual_seed(3)
        targets = ["qkv", "proj", "adaLN_modulation.1"]
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False), model)

    model, slow = accelerated(after=inject)
    fast = ditfast.graphed(model)
    before = assert_right(fast, slow)
    for each in (model, slow):
        change([layer for layer in each.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)])
    after = assert_right(fast, slow)
    assert len(captures) == 2 and fast.unavailable() is None
    assert (relative_error(after, before) < 1e-4) == (change is merged)  # which changes nothing, others much


def test_diffusers_results(captures):
    pytest.importorskip("diffusers", reason="needs the package diffusers")
    from tests.adapters.diffusers_models import transformer

    model = transformer().eval()
    slow = copy.deepcopy(model)
    ditfast.accelerate(model, check=False)
    fast = ditfast.graphed(model)
    with torch.no_grad():
        for seed in range(3):
            x, t, y = inputs(seed=seed)
            actual = fast(x, timestep=t, class_labels=y)
            expected = slow(x, timestep=t, class_labels=y)
            assert type(actual) is type(expected)
            assert relative_error(actual.sample, expected.sample) < 1e-5
            listed = fast(x, timestep=t, class_labels=y, return_dict=False)[0]
            assert relative_error(listed, expected.sample) < 1e-5
    assert captures == [3, 3] and fast.unavailable() is None


# --- what cannot be captured


def assert_plain(fast, model, reason, captures, calls=3):
    """Right results without a graph, one warning, and the reason."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(calls):
            x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(fast(x), copy.deepcopy(model)(x).detach())
    assert [str(warning.message) for warning in caught if "ditfast" in str(warning.message)] == [
        f"ditfast.graphed runs {type(model).__name__} without a graph: {fast.unavailable()}"
    ]
    assert reason in fast.unavailable() and captures == []
    assert repr(fast).endswith(", 0 graphs)")


class Steps(nn.Module):
    """A forward of one function; CALLS counts them where no graph looks."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 3))
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.function = function
        self.seen = 0
        self.eval()

    def forward(self, x):
        CALLS.append(1)
        return self.function(self, x * self.weight)


CALLS = []


def counting(model, x):
    model.seen += 1
    return x + 0 * model.seen


FORWARDS = {
    "reads values on the host (aten._local_scalar_dense": lambda model, x: x * float(x.max()),
    "reads values on the host (aten._local_scalar_dense.default)": lambda model, x: x if x.sum() > 0 else -x,
    "reads values on the host (aten.equal": lambda model, x: x if torch.equal(x, 2 * x) else -x,
    "has a shape that depends on values (aten.nonzero": lambda model, x: x[x.nonzero()[:2, 0]],
    "has a shape that depends on values (aten.index": lambda model, x: x[x > 0].sum() + x,
    "its forward changes seen": counting,
    "its forward returns a SimpleNamespace": lambda model, x: SimpleNamespace(x=x),
}


@pytest.mark.parametrize("reason", [reason for reason in FORWARDS if "Simple" not in reason])
def test_forwards_that_no_graph_holds(reason, captures):
    fast = ditfast.graphed(model := Steps(FORWARDS[reason]))
    assert_plain(fast, model, reason, captures)
    CALLS.clear()
    fast(torch.ones(2, 3))
    assert len(CALLS) == 1  # not tried again


def test_results_whose_tensors_are_not_found(captures):
    fast = ditfast.graphed(Steps(FORWARDS["its forward returns a SimpleNamespace"]))
    with pytest.warns(UserWarning, match="its forward returns a SimpleNamespace"):
        first, second = (fast(torch.full((2, 3), value)).x[0, 0].item() for value in (1.0, 2.0))
    assert (first, second) == (0.5, 1.0) and captures == []


def test_random_draws(captures):
    """As many as a plain call's, and others every time."""
    fast = ditfast.graphed(Steps(lambda model, x: x + torch.randn_like(x)))
    expected, actual = [], []
    for results, call in ((expected, fast.model), (actual, fast)):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results += [call(torch.zeros(2, 3)).detach() for _ in range(3)]
    assert torch.equal(torch.stack(actual), torch.stack(expected)) and captures == []
    assert fast.unavailable().startswith("its forward draws random numbers")


def test_python_draws_are_found_by_their_results(captures):
    draws = random.Random(0)
    fast = ditfast.graphed(Steps(lambda model, x: x * draws.random()))
    with pytest.warns(UserWarning, match="its replay gives other results than its forward"):
        results = {fast(torch.ones(2, 3))[0, 0].item() for _ in range(4)}
    assert len(results) == 4 and captures == [2]


def writing_a_buffer(model, x):
    model.total += x.sum(0)
    return x + model.total


def writing_its_input(model, x):
    return x.mul_(2)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.eval()

    def forward(self, x):
        return x.mul_(2) + self.weight


@pytest.mark.parametrize("inference", [False, True])
def test_what_a_forward_writes_is_written_once_a_call(inference, captures):
    fast = ditfast.graphed(Steps(writing_a_buffer))
    plain = copy.deepcopy(fast.model)
    with torch.inference_mode(inference), pytest.warns(UserWarning, match="writes to its weights or buffers"):
        for _ in range(3):
            assert torch.equal(fast(torch.ones(2, 3)), plain(torch.ones(2, 3)))
    fast = ditfast.graphed(InPlace())
    with torch.inference_mode(inference), pytest.warns(UserWarning, match="writes to its inputs"):
        for _ in range(3):
            x = torch.ones(2, 3)
            fast(x)
            assert x.tolist() == [[2.0] * 3] * 2
    assert captures == []


def test_a_table_that_the_first_call_fills(captures):
    """Not refused: the second call leaves it alone."""

    def tabled(model, x):
        if not hasattr(model, "table") or len(model.table) != len(x):
            model.table = torch.arange(len(x))[:, None] * 1.0
        return x + model.table

    fast = ditfast.graphed(model := Steps(tabled))
    x = torch.randn(2, 3)
    for _ in range(3):
        torch.testing.assert_close(fast(x), (x * model.weight + model.table).detach())
    assert captures == [2] and fast.unavailable() is None
    with pytest.warns(UserWarning, match="its forward changes table, as a replay would not"):
        for batch in (3, 2, 3, 2, 3, 2):  # anew in every call
            x = torch.randn(batch, 3)
            torch.testing.assert_close(fast(x), (x * model.weight + model.table).detach())
    fast.clear()
    assert fast.unavailable() is None
    fast(x), fast(x)
    assert captures == [2, 2]


def test_what_is_remembered_of_inputs(captures):
    """The same tensor in every call, but a capture's own in a capture."""

    class Remembering(Settings):
        def forward(self, x):
            self.last = x
            return super().forward(x)

    fast = ditfast.graphed(model := Remembering())
    x = torch.linspace(-1, 1, 6).view(2, 3)
    with pytest.warns(UserWarning, match="its forward changes last, as a replay would not"):
        for _ in range(6):
            torch.testing.assert_close(fast(x.mul_(0.9)), model(x).detach())
    assert captures == [2] and repr(fast).endswith("0 graphs)")


def test_tables_made_on_the_cpu():
    """On meta tensors in a GPU's place: what names no device is made where the inputs are."""
    meta = torch.device("meta")
    x = torch.ones(2, 3, device=meta)

    def table(x):
        return x * torch.exp(-torch.arange(3) / 3).to(x.device)

    def number(x):
        return x * torch.tensor(2.0)

    assert capturable(number, (x,), meta) is number
    there = capturable(table, (x,), meta)
    assert there is not table and there(x).device == meta
    for function, reason in (
        (lambda x: torch.ops.aten.lift_fresh(x + 1), "copies numbers to meta"),  # as torch.tensor(1.0, device=) does
        (lambda x: x * torch.zeros(3, device="cpu").to(x.device), "copies between cpu and meta"),
        (lambda x: table(x) * torch.zeros(3, device="cpu").to(x.device), "copies between cpu and meta"),
    ):
        with pytest.raises(Refused, match=reason):
            capturable(function, (x,), meta)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("design", ["adaln", "adaln_zero", "in_context", "cross_attention", "accelerated"])
def test_ditfasts_forwards_can_be_captured(design, backend):
    """On meta tensors, by formulas and along the kernels' path: nothing is read on the host, or comes from the CPU."""
    meta = torch.device("meta")
    model, _ = accelerated() if design == "accelerated" else models(conditioning=design)
    x, t, y = (value.to(meta) for value in inputs())
    calls = [model] if design == "accelerated" else [model, lambda x, t, y: model.forward_with_cfg(x, t, y, 2.0)]
    with torch.no_grad(), ditfast.ops.use_backend(backend):
        model.to(meta)
        for call, batch in zip(calls, ((x, t, y), (torch.cat([x, x]), torch.cat([t, t]), y)), strict=False):
            assert capturable(call, batch, meta) is call


def test_why_there_is_no_graph():
    fast = ditfast.graphed(Calculation())
    with pytest.warns(UserWarning) as caught:
        results = [fast([torch.full((1,), value)])["sum"].item() for value in (1.0, 2.0)]
    expected = "ditfast.graphed runs Calculation without a graph: the model is on cpu"
    assert [str(warning.message) for warning in caught] == [expected] and results == [2, 4]
    assert caught[0].filename == __file__ and fast.unavailable() == "the model is on cpu"


def test_surroundings_and_arguments_without_a_graph(captures):
    fast = ditfast.graphed(model := Calculation())
    x = torch.ones(2)
    fast([x])
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast keeps casts"):
        fast([x])
    with pytest.warns(UserWarning, match="what a transform"):
        torch.func.vmap(lambda x: fast([x])["sum"])(torch.ones(2, 2))
    with pytest.warns(UserWarning, match="an argument is a Tensor of layout torch.sparse_coo"):
        fast([x], add={"to": torch.ones(2).to_sparse()})
    with pytest.warns(UserWarning, match="an argument is on meta, the model on cpu"), pytest.raises(RuntimeError):
        fast([torch.ones(2, device="meta")])  # refused by torch in the plain call
    with pytest.warns(UserWarning, match="an argument is a object, which may hold other values"):
        fast([x], factor=1, name=object())
    fast([x])
    assert fast.unavailable() is None and captures == [2]
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="modules have global hooks"):
        fast([x])
    handle.remove()
    fast([x])
    assert captures == [2]
    handle = model.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="the model has hooks"):
        fast([x])
    handle.remove()
    fast([x])
    assert captures == [2, 2]


def test_bad_input(captures):
    model, _ = models()
    fast = ditfast.graphed(model)
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"argument \[0\] requires a gradient, and graphs are for inference"):
        fast(x.requires_grad_(), t, y)
    with torch.no_grad():
        assert not fast(x, t, y).requires_grad
    with pytest.raises(ValueError, match="model is in training mode"):
        ditfast.graphed(copy.deepcopy(model).train())(x.detach(), t, y)
    with pytest.raises(ValueError, match="y must"):  # the model's own, and nothing is remembered
        fast(x.detach(), t, y[:1])
    assert captures == [3]
    with pytest.raises(TypeError, match="model must be a torch.nn.Module or a method of one, got function"):
        ditfast.graphed(inputs)
    with pytest.raises(TypeError, match="limit must be a whole number, got 1.5"):
        ditfast.graphed(model, limit=1.5)
    with pytest.raises(ValueError, match="limit must be 1 or more, got 0"):
        ditfast.graphed(model, limit=0)


def test_python_values_that_change_in_every_call(captures):
    fast = ditfast.graphed(Calculation(), limit=2)
    with pytest.warns(UserWarning, match="drops graphs of Calculation before they are replayed"):
        for step in range(6):
            assert fast([torch.ones(2)], factor=step / 10)["sum"][0].item() == pytest.approx(0.2 * step)


def failing(error):
    def capture(function, inputs, device):
        FAILED.append(1)
        raise error

    return capture


FAILED = []


def test_a_capture_that_fails_is_not_tried_again(captures, monkeypatch):
    FAILED.clear()
    monkeypatch.setattr(graphs, "_capture", failing(Refused("torch cannot capture its forward: no")))
    fast = ditfast.graphed(Calculation())
    with pytest.warns(UserWarning, match="torch cannot capture its forward: no"):
        results = [fast([torch.full((2,), value)])["sum"][0].item() for value in (1.0, 2.0, 3.0)]
    assert results == [2, 4, 6] and FAILED == [1]
    assert fast.unavailable() == "torch cannot capture its forward: no"


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda x: x, True),
        (lambda x: x * (1 + 1e-5), True),
        (lambda x: x * (1 + 1e-2), False),
        (lambda x: x.nan_to_num(7.0), False),
        (lambda x: x.nan_to_num(neginf=7.0), False),
        (lambda x: x.clone().index_fill_(0, torch.tensor([0]), torch.nan), False),
        (lambda x: x.double(), False),
        (lambda x: x[:2], False),
    ],
)
def test_which_results_agree(change, same):
    x = torch.tensor([1.0, 2.0, torch.nan, torch.inf, -torch.inf])
    assert agree({"x": [change(x), 1]}, {"x": [x, 1]}, rounding([x])) == same


def test_results_of_other_kinds_agree():
    x = torch.tensor([1.0, 2.0])
    assert agree((x, 1), (x.clone(), 1))
    assert not agree((x, 1), (x, True)) and not agree((x, 1), [x, 1])
    assert agree(x.int(), x.int()) and not agree(x.int() + 1, x.int(), 0.1)
    assert agree(x * 1j, x * 1j) and not agree(x * 1j, x * -1j, 0.1)


def test_what_runs_out_of_memory_says_so(captures, monkeypatch):
    FAILED.clear()
    monkeypatch.setattr(graphs, "_capture", failing(torch.OutOfMemoryError("CUDA out of memory")))
    fast = ditfast.graphed(Calculation())
    for _ in range(2):  # nothing is remembered
        with pytest.raises(torch.OutOfMemoryError):
            fast([torch.ones(2)])
    assert FAILED == [1, 1] and fast.unavailable() is None


class Context:
    """Torch's streams, devices and captures, of which only the order of calls matters here."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, _):
        pass


class Ending(Context):
    """A capture, which fails when it ends if it failed before, as CUDA's does."""

    def __exit__(self, kind, *_):
        if kind is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile"), Refused),
        (ValueError("told apart"), Refused),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), torch.OutOfMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), RuntimeError),
    ],
)
def test_which_errors_mean_that_it_cannot_be_captured(error, expected, monkeypatch):
    """Those within the capture alone, by the first of them."""
    names = ("device", "stream", "Stream", "CUDAGraph", "current_stream")
    for name in names:
        monkeypatch.setattr(torch.cuda, name, Context)
    monkeypatch.setattr(torch.cuda, "graph", Ending)
    calls = []

    def function(x):
        calls.append(x)
        if len(calls) > graphs._WARM_UP:
            raise error
        return x

    with pytest.raises(expected) as raised:
        graphs._capture(function, (torch.ones(2),), torch.device("cpu"))
    assert raised.type is expected
    assert str(error).partition("\n")[0] in str(raised.value) and "Compile" not in str(raised.value)
    assert all(calls[-1] is not earlier for earlier in calls[:-1])  # nothing that it remembers of tensors is captured
    assert calls[-1].tolist() == [0, 0]  # and what is not captured would compute something else
    with pytest.raises(ZeroDivisionError):  # before the capture: the model's own
        graphs._capture(lambda x: 1 / 0, (torch.ones(2),), torch.device("cpu"))


def test_forwards_that_fail_where_they_are_watched(captures):
    """As operators do that know no dispatch modes."""

    def unwatched(model, x):
        if torch._C._len_torch_dispatch_stack():
            raise NotImplementedError("no rule for this mode")
        return x

    fast = ditfast.graphed(model := Steps(unwatched))
    assert_plain(fast, model, "its forward cannot be watched: no rule for this mode", captures)


def test_threads_take_turns(captures):
    fast = ditfast.graphed(Calculation())
    fast([torch.zeros(2)])
    recorded = next(iter(fast._graphs._captured.values())).graph
    replay = recorded.replay

    def slow_replay():
        time.sleep(0.05)
        replay()

    recorded.replay = slow_replay
    results = {}

    def call(value):
        results[value] = fast([torch.full((2,), value)])["sum"][0].item()

    threads = [threading.Thread(target=call, args=(float(value),)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {value: 2 * value for value in (0.0, 1.0, 2.0, 3.0)}


def test_captured_in_inference_mode_and_replayed_outside(captures):
    model, slow = accelerated()
    fast = ditfast.graphed(model)
    with torch.inference_mode():
        assert fast(*inputs()).is_inference()
    assert_right(fast, slow)
    with torch.inference_mode():
        assert_right(fast, slow, inputs(seed=2))
    assert captures == [3]


@pytest.mark.kernels
@pytest.mark.parametrize("inference", [False, True])
@every_model
def test_captured_forwards_launch_all_modulations_at_once(make, inference, captures, monkeypatch):
    """Also where the caller's inference mode keeps an accelerated model's own calls from it."""
    from ditfast.kernels.modulations import Modulations

    model, slow = make(depth=2) if make is models else make(dim=96, depth=2)
    together = watch(monkeypatch, Modulations, note=lambda _, arguments: len(arguments[1]))
    fast = ditfast.graphed(model)
    arguments = inputs(1) if make is models else foreign_inputs(1, size=SMALL)
    with ditfast.ops.use_backend("triton"), torch.inference_mode(inference), torch.no_grad():
        fast(*arguments)
        assert captures == [1] and set(together) == {3}
        del together[:]
        fast(*arguments)
        assert together == [3]  # the stand-in's replay is the captured forward
