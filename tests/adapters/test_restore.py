"""ditfast.restore, and leaving a with-block, after the accelerated model was changed: the changes survive.

A wrapper around a forward keeps the accelerated one; a new class for a module hides it.
"""

import copy
import functools
import itertools
import pickle
import types
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import ditfast
from ditfast.adapters.swap import accelerated_by
from tests.adapters.conftest import ALL, assert_judged, assert_same
from tests.adapters.foreign_models import Model, inputs, randomised

KINDS = ("Block", "FinalLayer", "Attention", "Mlp", "Linear")


def parts(model):
    return [module for module in model.modules() if type(module).__name__ in KINDS]


def computed(model):
    """Every gradient as one tensor, then the output in inference: in this order a pruned model can be copied."""
    model.zero_grad()
    out = model(*inputs())
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    with torch.no_grad():
        out = model(*inputs())
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), out


def assert_alike(fast, slow):
    for actual, expected in zip(computed(fast), computed(slow), strict=True):
        assert_same(actual, expected)


def pair(model=Model, **options):
    slow = randomised(model(**options)).eval()
    return copy.deepcopy(slow), slow


def is_accelerated(model):
    return any(accelerated_by(module) for module in model.modules())


def accelerate_again(model):
    """If every instance has a forward of its own, nothing is accelerated: the report says so, and nothing breaks."""
    with suppress(ValueError):
        ditfast.accelerate(model, check=False)


def closure(forward):
    return lambda *args: forward(*args) * 1.1


def put_closures(model):
    """Undone by assigning the saved forward, which stays on the instance."""
    forwards = [(module, module.forward) for module in parts(model)]
    for module, forward in forwards:
        module.forward = closure(forward)
    return lambda: [setattr(module, "forward", forward) for module, forward in forwards]


def put_methods(model, kind=types.MethodType):
    """The class's forward bound anew, as Accelerator.prepare does; undone by taking it off the instance."""
    for module in parts(model):
        module.forward = kind(functools.wraps(type(module).forward)(closure(type(module).forward)), module)
    return lambda: [delattr(module, "forward") for module in parts(model)]


def put_hooks(model, package):
    hooks = pytest.importorskip(f"{package}.hooks", reason=f"needs the package {package}")

    class Scaled(hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 1.1

    for module in parts(model):
        if package == "accelerate":
            hooks.add_hook_to_module(module, Scaled())
        else:
            hooks.HookRegistry.check_if_exists_or_initialize(module).register_hook(Scaled(), "scaled")
    if package == "accelerate":
        return lambda: [hooks.remove_hook_from_module(module) for module in parts(model)]
    return lambda: [module._diffusers_hook.remove_hook("scaled") for module in parts(model)]


def put_compiled(model):
    torch.compiler.reset()
    model.blocks[0].compile(backend="eager")
    return lambda: setattr(model.blocks[0], "_compiled_call_impl", None)


def on_linears(apply, remove):
    def change(model):
        torch.manual_seed(3)  # spectral_norm draws
        linears = [module for module in parts(model) if isinstance(module, nn.Linear)][1::2]
        for linear in linears:
            apply(linear, "weight")
        return lambda: [remove(linear, "weight") for linear in linears]

    return change


CHANGES = {
    "closures": put_closures,
    "methods": put_methods,
    "partials": functools.partial(put_methods, kind=functools.partial),
    "hooks of accelerate": functools.partial(put_hooks, package="accelerate"),
    "hooks of diffusers": functools.partial(put_hooks, package="diffusers"),
    "compiled in place": put_compiled,
    "weight_norm": on_linears(parametrizations.weight_norm, parametrize.remove_parametrizations),
    "spectral_norm": on_linears(parametrizations.spectral_norm, parametrize.remove_parametrizations),
    "pruned": on_linears(functools.partial(prune.l1_unstructured, amount=0.3), prune.remove),
}


ORDERS = [  # every change with both values of each, and all four of them among the changes
    (change, before, before == bool(i % 2)) for i, change in enumerate(CHANGES) for before in (True, False)
]


@pytest.mark.parametrize(("change", "before", "restored_first"), ORDERS)
def test_changed(change, before, restored_first):
    """Changed before or while accelerated, undone before or after the restore; all of it twice."""
    fast, slow = pair(depth=1)
    for again in (False, True):
        if not before:
            accelerate_again(fast)
            assert again or is_accelerated(fast)
        undo = [CHANGES[change](model) for model in (fast, slow)]
        accelerate_again(fast)
        assert_alike(fast, slow)
        steps = [lambda: ditfast.restore(fast), *undo]
        for step in (steps[:1], steps[1:]) if restored_first else (steps[1:], steps[:1]):
            for each in step:
                each()
            assert_alike(fast, slow)
            assert_alike(copy.deepcopy(fast), copy.deepcopy(slow))
        assert not is_accelerated(fast)


@pytest.mark.parametrize("error", [None, KeyError])
def test_wrapped_within_a_with_block(error):
    """The wrapper stays around the module's own forward, however the block ended."""
    fast, slow = pair()
    with suppress(KeyError), ditfast.accelerated(fast, check=False):
        put_closures(fast), put_closures(slow)
        if error:
            raise error
    assert not is_accelerated(fast)
    assert_alike(fast, slow)
    for module in parts(fast) + parts(slow):
        del module.forward
    assert len(ditfast.accelerate(fast, check=False).accelerated) == ALL
    assert_alike(fast, slow)


def test_pickled_with_a_forward_on_the_instance():
    """accelerate and diffusers leave a forward on the instance; a loaded pickle has its class's."""
    fast, slow = pair()
    ditfast.accelerate(fast, check=False)
    forwards = [(module, module.forward) for module in parts(fast)]
    for restored in (False, True):
        if restored:
            ditfast.restore(fast)
        for module, forward in forwards:
            module.forward = forward
        loaded = pickle.loads(pickle.dumps(fast))
        assert is_accelerated(loaded) is not restored
        assert_alike(loaded, slow)
        ditfast.restore(loaded)
        assert_alike(loaded, slow)


class Scaled(nn.Module):
    """A parametrisation, and a new class for a block."""

    def forward(self, *args):
        return (super().forward(*args) if hasattr(self, "norm1") else args[0]) * 1.5


class WithPositions(Model):
    """Parametrised parameters of the model itself, which is accelerated so that its blocks share a launch."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.ones(4, 1, 1)) for _ in range(2))

    def forward(self, x, t, y):
        return super().forward(x * self.scale + self.shift, t, y)


@pytest.mark.parametrize(("before", "after"), [(["shift"], []), ([], ["shift"]), (["shift"], ["scale"])])
def test_a_parametrised_model(before, after):
    """Parametrising inserts a class below or above the module's, and adds properties to its class."""
    fast, slow = pair(WithPositions)
    for model, name in itertools.product((fast, slow), before):
        parametrize.register_parametrization(model, name, Scaled())
    ditfast.accelerate(fast, check=False)
    for model, name in itertools.product((fast, slow), after):
        parametrize.register_parametrization(model, name, Scaled())
    for change in (accelerate_again, ditfast.restore, accelerate_again):
        with suppress(ValueError):
            change(fast)
        assert_alike(fast, slow)
        assert_alike(copy.deepcopy(fast), slow)
    for model, name in itertools.product((fast, slow), (*before, *after)):
        parametrize.remove_parametrizations(model, name)
    assert_alike(fast, slow)
    ditfast.restore(fast)
    assert_alike(fast, slow)


def test_a_copy_keeps_a_class_assigned_later():
    fast, slow = pair()
    ditfast.accelerate(fast, check=False)
    for model in (fast, slow):
        model.blocks[0].__class__ = type("ScaledBlock", (Scaled, type(model.blocks[0])), {})
    assert_alike(fast, slow)
    with pytest.raises(ValueError, match=r"blocks.0 was given the class ScaledBlock"):
        ditfast.restore(fast)
    assert_alike(copy.deepcopy(fast), slow)


@pytest.mark.parametrize("keep", [True, False])
def test_prepared_for_mixed_precision(keep):
    accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        fast, slow = pair()
        exact = {"output": copy.deepcopy(slow).double()(inputs()[0].double(), *inputs()[1:]).detach()}
        unwrap = functools.partial(accelerator.unwrap_model, keep_fp32_wrapper=keep)
        for change in (accelerator.prepare_model, None, unwrap, accelerator.prepare_model, unwrap, None):
            if change is None:
                ditfast.restore(fast)
            else:
                ditfast.accelerate(fast, check=False)
                fast, slow = change(fast), change(slow)
            outputs = ({"output": model(*inputs()).detach()} for model in (fast, slow))
            assert_judged(*outputs, exact, torch.bfloat16)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
