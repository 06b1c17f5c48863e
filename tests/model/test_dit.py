"""ditfast.DiT beside the reference: the model rule, training, hooks, copies and transforms."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ditfast import DiT, DiTConfig, ops, reference
from ditfast.bench.cost.count import count
from ditfast.bench.prove.verify import check_model, run_model
from ditfast.config import CONDITIONINGS
from ditfast.parity import judge, relative_error
from ditfast.testing.inputs import random_batch, randomize_
from ditfast.training import diffusion_loss
from tests.model.conftest import TINY, assert_parity, inference, pair

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def failures(verdicts):
    return {name: verdict for name, verdict in verdicts.items() if not verdict.ok}


SIZES = [(1, (8, 8)), (3, (6, 20)), (3, (8, 8)), (1, (6, 20))]
CASES = [  # every dtype with every design, each pair of the others at least once
    (conditioning, dtype, *SIZES[(i + j) % 4]) for i, conditioning in enumerate(CONDITIONINGS) for j, dtype in
    enumerate(DTYPES)
]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(("conditioning", "dtype", "batch", "latent_size"), CASES)
def test_outputs_and_every_gradient(conditioning, dtype, batch, latent_size):
    config = DiTConfig(
        depth=3, hidden_size=144, num_heads=2, latent_size=latent_size, num_classes=10, conditioning=conditioning
    )
    assert not failures(check_model(config, DTYPES[dtype], batch=batch))


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": True},
        {"norm2_eps": 1e-2, "timestep_freq_shift": 1.0},
        {"learn_sigma": False, "in_channels": 3, "class_dropout_prob": 0.0},
        {"patch_size": 4, "mlp_ratio": 2.5, "norm_final_eps": 1e-2, "norm1_eps": 1e-2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_configured_variants(change):
    for conditioning in ("adaln", "adaln_zero"):
        assert not failures(check_model(replace(TINY, conditioning=conditioning, **change), torch.float32))


def test_all_modulations_are_one_launch():
    inputs = [value.to("meta") for value in random_batch(TINY, 2)]
    for backend, together in (("auto", 0), ("triton", 1)):  # on a CPU each Linear runs on its own
        with torch.device("meta"), ops.use_backend(backend):
            fast, slow = DiT(TINY).eval(), reference.DiT(TINY).eval()
            fast_launches, slow_launches = (count(partial(model, *inputs)).launches for model in (fast, slow))
        assert fast_launches["modulations"] == together
        gelu = fast_launches["linear_gelu"]  # a GEMM with its epilogue
        assert fast_launches["addmm"] + gelu == slow_launches["addmm"] - together * (TINY.depth + 1)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_strict_state_dict_both_ways_and_repr(conditioning):
    config = replace(TINY, conditioning=conditioning)
    fast, slow = pair(config)
    reference.DiT(config).load_state_dict(fast.state_dict(), strict=True)
    assert isinstance(fast, reference.DiT)
    served = conditioning in ("adaln", "adaln_zero")
    assert fast.fused == served
    assert ("runs the reference's code" in repr(fast)) == (not served)
    assert ("runs the reference's code" in repr(DiT(replace(config, qk_norm=True)).blocks[0].attn)) == served


def test_fp64_under_autocast():
    fast, slow = (model.double() for model in pair())
    x, t, y = random_batch(TINY, 2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = inference(fast, (x, t, y)), slow(x, t, y)
    assert out.dtype == expected.dtype == torch.float64
    assert relative_error(out, expected) < 64 * torch.finfo(torch.float64).eps


def test_replaced_and_hooked_linears_are_honoured():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    fast, slow = pair()
    inputs = random_batch(TINY, 2)
    inference(fast, inputs)
    for path in ("blocks.0.mlp", "blocks.1.attn", "blocks.0.adaLN_modulation"):
        name = {"mlp": "fc1", "attn": "qkv"}.get(path.split(".")[-1], "1")
        for model in (fast, slow):
            module = model.get_submodule(path)
            old = getattr(module, name)
            new = Doubled(old.in_features, old.out_features)
            new.load_state_dict(old.state_dict())
            setattr(module, name, new)
        assert_parity(fast, slow, inputs)
    for model in (fast, slow):
        model.blocks[1].mlp.fc2.register_forward_hook(lambda module, args, output: output + 1)
        model.blocks[1].adaLN_modulation[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert_parity(fast, slow, inputs)


def test_changed_modulations_are_honoured():
    inputs = random_batch(TINY, 2)

    def longer(model):
        model.blocks[0].adaLN_modulation = nn.Sequential(*model.blocks[0].adaLN_modulation, nn.Tanh())

    def other_activation(model):
        model.final_layer.adaLN_modulation[0] = nn.GELU()

    def hooked(model):
        model.blocks[1].adaLN_modulation.register_forward_hook(lambda module, args, output: output * 0.5)

    def hooked_activation(model):
        model.blocks[1].adaLN_modulation[0].register_forward_hook(lambda module, args, output: output * 2)

    for change in (longer, other_activation, hooked, hooked_activation):
        fast, slow = pair()
        inference(fast, inputs)
        for model in (fast, slow):
            change(model)
        assert_parity(fast, slow, inputs)


@pytest.mark.quick
def test_global_hooks_are_honoured():
    fast, slow = pair()
    inputs = random_batch(TINY, 2)

    def double(module, args, output):
        return output * 2 if isinstance(module, (nn.Linear, nn.Embedding, nn.SiLU)) else None

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        assert_parity(fast, slow, inputs)
    finally:
        handle.remove()


def test_hooks_on_blocks_and_checkpointing():
    fast, slow = pair()
    outputs = []
    fast.blocks[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    inputs = random_batch(TINY, 2)
    plain = run_model(fast, *inputs)
    assert outputs
    for block in fast.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    checkpointed = run_model(fast, *inputs)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.quick
def test_copies_and_pickles():
    fast, slow = pair()
    inputs = random_batch(TINY, 2)
    expected = inference(fast, inputs)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(copied) is DiT
        assert torch.equal(inference(copied, inputs), expected)
        randomize_(copied, 5)
        assert torch.equal(inference(fast, inputs), expected)


def test_functional_call():
    fast, _ = pair()
    source = randomize_(reference.DiT(TINY), seed=1).eval()
    inputs = random_batch(TINY, 2)
    inference(fast, inputs)
    weights = dict(source.named_parameters())
    with torch.no_grad():
        swapped = torch.func.functional_call(fast, weights, inputs)
    oracle = copy.deepcopy(source).double()(inputs[0].double(), *inputs[1:])
    assert judge("model", swapped, source(*inputs), oracle, torch.float32).ok


def test_frozen_subsets():
    for frozen in ("adaLN_modulation", "mlp", "attn", "x_embedder", "embed"):
        fast, slow = pair()
        for model in (fast, slow):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and frozen not in name)
        x, t, y = random_batch(TINY, 2)
        oracle = copy.deepcopy(slow).double()
        results = [run_model(model, x, t, y) for model in (fast, slow, oracle)]
        assert not any(frozen in name for name in results[0] if name.startswith("d_"))
        assert not failures({name: judge("model", *(r[name] for r in results), torch.float32) for name in results[0]})


def test_inference_mode_weights():
    with torch.inference_mode():
        fast, slow = pair()
        inputs = random_batch(TINY, 2)
        assert torch.equal(fast(*inputs), fast(*inputs))
        randomize_(fast, 3)
        randomize_(slow, 3)
        x, t, y = inputs
        oracle = copy.deepcopy(slow).double()(x.double(), t, y)
        assert judge("model", fast(x, t, y), slow(x, t, y), oracle, torch.float32).ok


@pytest.mark.parametrize(
    ("conditioning", "backend", "guided_backend"),
    # one design through Inductor, which takes a minute; for the others Dynamo and AOTAutograd are in question
    [
        pytest.param("adaln_zero", "inductor", "aot_eager", marks=pytest.mark.compiler),
        pytest.param("adaln_zero", "inductor", "inductor", marks=[pytest.mark.compiler, pytest.mark.long]),
    ]
    + [(conditioning, "aot_eager", "aot_eager") for conditioning in CONDITIONINGS],
)
def test_fullgraph_compile(conditioning, backend, guided_backend):
    torch.compiler.reset()  # many models ran these functions before: the limit on recompilations counts them all
    config = replace(TINY, conditioning=conditioning)
    fast, slow = pair(config)
    x, t, y = random_batch(config, 3)
    oracle = run_model(copy.deepcopy(slow).double(), x, t, y)
    yardstick = run_model(slow, x, t, y)
    fast.compile(fullgraph=True, backend=backend)
    actual = run_model(fast, x, t, y)
    with torch.no_grad():
        actual["guided output"] = torch.compile(fast.forward_with_cfg, fullgraph=True, backend=guided_backend)(
            torch.cat([x, x]), torch.cat([t, t]), y, 4.0
        )
    verdicts = {name: judge("model", actual[name], yardstick[name], oracle[name], torch.float32) for name in oracle}
    assert not failures(verdicts)
    # compiled inference sees new weights too
    randomize_(fast, 3)
    randomize_(slow, 3)
    exact = copy.deepcopy(slow).double()(x.double(), t, y)
    assert judge("model", inference(fast, (x, t, y)), slow(x, t, y), exact, torch.float32).ok


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_twenty_steps_of_the_diffusion_loss(autocast):
    """The loss curve of training, labels dropped by the same draws, by the model rule."""
    curves = []
    candidates = (
        ("fast", DiT, torch.float32),
        ("yardstick", reference.DiT, torch.float32),
        ("oracle", reference.DiT, torch.float64),
    )
    for name, build, dtype in candidates:
        model = randomize_(build(TINY)).to(dtype).train()
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for step in range(20):
            torch.manual_seed(step)
            x0, t, y = random_batch(TINY, 4, dtype=dtype, seed=step)
            noise = torch.randn(x0.shape).to(dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and name != "oracle"):
                loss = diffusion_loss(model, x0, t, y, noise)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach().double())
        curves.append(torch.stack(losses))
    fast, yardstick, oracle = curves
    verdict = judge("model", fast, yardstick, oracle, torch.bfloat16 if autocast else torch.float32)
    assert verdict.ok, verdict
    assert oracle[-5:].mean() < oracle[:5].mean()
