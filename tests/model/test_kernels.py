"""ditfast.DiT with its kernels on: the model rule, training, compile, and what it launches and moves."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditfast import MODELS, DiT, DiTConfig, ops, reference
from ditfast.bench.cases.case import Case
from ditfast.bench.cases.providers import PROVIDERS
from ditfast.bench.cost.count import Cost, count
from ditfast.bench.prove.verify import check_model, run_model
from ditfast.bench.records.files import Results
from ditfast.bench.suites.cost import trace
from ditfast.bench.suites.memory import measure
from ditfast.parity import judge
from ditfast.testing.inputs import random_batch, randomize_
from ditfast.training import diffusion_loss
from tests.kernels.conftest import watch

# 6 tokens: the interpreter takes milliseconds for each program, and a norm has one a token
TINY = DiTConfig(depth=2, hidden_size=72, num_heads=2, latent_size=(4, 6), num_classes=10)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOW = torch.float16  # the interpreter truncates to bf16, which biases a loss; its casts to fp16 round
FUSED = ("adaln", "adaln_zero")
pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True)
def kernels_on():
    with ops.use_backend("triton"):
        yield


def failures(verdicts):
    return {name: verdict for name, verdict in verdicts.items() if not verdict.ok}


@pytest.mark.parametrize(
    ("conditioning", "dtype", "batch"),
    [  # every pair of values
        pytest.param("adaln_zero", "fp32", 1, marks=pytest.mark.quick),
        ("adaln_zero", "bf16", 3),
        ("adaln_zero", "fp16", 1),
        ("adaln", "fp32", 3),
        ("adaln", "bf16", 1),
        ("adaln", "fp16", 3),
    ],
)
def test_outputs_and_every_gradient(conditioning, dtype, batch):
    config = replace(TINY, conditioning=conditioning, hidden_size=144)
    assert not failures(check_model(config, DTYPES[dtype], batch=batch))


def test_the_kernels_are_on_the_path(monkeypatch):
    """Every norm and gated residual of the model goes through a kernel, and the conditioning in inference."""
    from ditfast.kernels import adaln, conditioning

    plans = adaln.AdaLNForward, adaln.AdaLNBackward, conditioning.TimestepEmbedding, conditioning.Conditioning
    calls = watch(monkeypatch, *plans)
    model = randomize_(DiT(TINY)).eval()
    inputs = random_batch(TINY, 2)
    with torch.no_grad():
        model(*inputs)
    assert sorted(calls) == ["AdaLNForward"] * 5 + ["Conditioning", "TimestepEmbedding"]
    calls.clear()
    model(*inputs).sum().backward()
    assert calls.count("AdaLNForward") == calls.count("AdaLNBackward") == 5


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_training_steps(autocast):
    curves = []
    for build, dtype in ((DiT, torch.float32), (reference.DiT, torch.float32), (reference.DiT, torch.float64)):
        model = randomize_(build(TINY)).to(dtype).train()
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for step in range(3):
            torch.manual_seed(step)
            x0, t, y = random_batch(TINY, 2, dtype=dtype, seed=step)
            noise = torch.randn(x0.shape).to(x0)
            with torch.autocast("cpu", LOW, enabled=autocast and dtype == torch.float32):
                loss = diffusion_loss(model, x0, t, y, noise)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach().double())
        curves.append(torch.stack(losses))
    assert judge("model", *curves, LOW if autocast else torch.float32).ok


@pytest.mark.parametrize("conditioning", FUSED)
def test_fullgraph_compile(conditioning):
    torch.compiler.reset()
    config = replace(TINY, conditioning=conditioning)
    slow = randomize_(reference.DiT(config)).eval()
    fast = DiT(config).eval()
    fast.load_state_dict(slow.state_dict())
    inputs = random_batch(config, 2)
    fast.compile(fullgraph=True, backend="aot_eager")
    actual, yardstick = (run_model(model, *inputs) for model in (fast, slow))
    oracle = run_model(copy.deepcopy(slow).double(), *inputs)
    assert not failures(
        {name: judge("model", actual[name], yardstick[name], oracle[name], torch.float32) for name in oracle}
    )


def traced(config: DiTConfig, batch: int) -> tuple[Cost, Cost]:
    """(reference, fast): one bf16 forward on meta tensors."""
    with torch.device("meta"):
        models = [build(config).bfloat16().eval() for build in (reference.DiT, DiT)]
        x = torch.empty(batch, config.in_channels, *config.latent_hw, dtype=torch.bfloat16)
        t, y = (torch.empty(batch, dtype=torch.int64) for _ in range(2))
    return tuple(count(lambda model=model: model(x, t, y)) for model in models)


def test_launches_of_one_forward():
    slow, fast = traced(MODELS["DiT-XL/2"], 1)
    shallow = traced(replace(MODELS["DiT-XL/2"], depth=1), 1)[1]
    a_block = (fast.total_launches - shallow.total_launches) / 27
    assert a_block == 7
    assert fast.total_launches - 28 * a_block <= 12
    assert fast.launches["adaln_forward"] == 57
    assert slow.total_launches > 2 * fast.total_launches


def test_bytes_of_one_forward():
    """Where activations, not weights, are what moves; views are free and attention counts the same for both."""
    slow, fast = traced(MODELS["DiT-XL/2"], 256)
    attention = "scaled_dot_product_attention"
    assert slow.bytes[attention] == fast.bytes[attention]
    assert fast.total_bytes <= 0.6 * slow.total_bytes


def committed(suite, mode):
    """provider -> its row of XL/2 at batch 256 in the committed file."""
    rows = Results.load(Path(__file__).parents[2] / "bench" / "results" / f"traced-{suite}.json", suite).rows
    case = ("DiT-XL/2", 256, "bf16", mode)
    return {row.provider: row for row in rows if (row.model, row.batch, row.dtype, row.mode) == case}


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_the_committed_counts_are_those_of_this_code(mode):
    """All FLOPs, and what ditfast saves over the reference: what both launch of torch's differs between its releases.

    torch 2.11's meta convolution gives the patch embedding's weight gradient in channels last, which is copied.
    """
    rows = committed("cost", mode)
    slow, fast = (trace(MODELS["DiT-XL/2"], 256, torch.bfloat16, mode, name) for name in ("reference", "ditfast"))
    before, after = rows["reference"], rows["ditfast"]
    assert (slow.total_flops, fast.total_flops) == (before.flops, after.flops)
    assert slow.total_launches - fast.total_launches == before.launches - after.launches
    assert slow.total_bytes - fast.total_bytes == before.bytes - after.bytes


@pytest.mark.parametrize("provider", ["reference", "ditfast"])
def test_the_committed_memory_is_that_of_this_code(provider):
    case = Case(MODELS["DiT-XL/2"], 256, torch.bfloat16, "train")
    measured = measure(case, PROVIDERS[provider], torch.device("meta"))
    assert measured.saved_bytes == committed("memory", "train")[provider].saved_bytes


def test_the_counter():
    x = torch.empty(4, 8, device="meta")
    cost = count(lambda: (x.view(8, 4).t() * 2).sum())
    assert dict(cost.launches) == {"mul": 1, "sum": 1}
    assert dict(cost.bytes) == {"mul": 2 * 128, "sum": 128 + 4}
    cost = count(lambda: x + x[:1].expand(4, 8))
    assert dict(cost.bytes) == {"add": 128 + 32 + 128}
    q, k, v = (torch.empty(2, 3, 5, 7, device="meta", dtype=torch.bfloat16) for _ in range(3))
    cost = count(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 21))
    assert dict(cost.launches) == {"scaled_dot_product_attention": 1}
    assert cost.total_bytes == 4 * 210 * 2
