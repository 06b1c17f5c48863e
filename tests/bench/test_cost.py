"""What models launch, move and compute: hand counts, the roofline, the command."""

import json
from dataclasses import replace

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from ditfast import DiTConfig, ops, reference
from ditfast.bench.cases.case import Case
from ditfast.bench.commands.cost import cost
from ditfast.bench.cost.count import Cost, Launch, count
from ditfast.bench.cost.roofline import DATASHEETS, datasheet_bounds, roofline_ms
from ditfast.bench.records.files import Results
from ditfast.bench.suites import cost as cost_bench
from ditfast.bench.suites.cost import run, trace
from tests.bench.conftest import listing, meta

TINY = DiTConfig(depth=2, hidden_size=64, num_heads=2, latent_size=(8, 12), num_classes=10)
BF16 = torch.bfloat16


def test_a_linear_forward_and_backward():
    layer = nn.Linear(3, 5, device="meta")
    x, grad = meta(4, 3, grad=True), meta(4, 5)
    flops = 2 * 4 * 3 * 5
    forward = ("addmm", flops, 4 * (4 * 3 + 5 * 3 + 5 + 4 * 5))
    assert listing(count(lambda: layer(x))) == [forward]
    counted = count(lambda: layer(x).backward(grad), grad=True)
    assert counted.records[0] == Launch(*forward)
    # the engine hands gradients over without a copy: two matmuls and the sum of the bias, in any order
    assert sorted(listing(counted)[1:]) == [
        ("mm", flops, 4 * (4 * 5 + 4 * 3 + 5 * 3)),
        ("mm", flops, 4 * (4 * 5 + 5 * 3 + 4 * 3)),
        ("sum", 0, 4 * (4 * 5 + 5)),
    ]
    assert (counted.total_launches, counted.total_flops) == (4, 3 * flops)
    assert counted.total_bytes == 4 * (52 + 47 + 47 + 25)
    assert counted.intensity == 360 / 684
    assert dict(counted.flops) == {"addmm": flops, "mm": 2 * flops}


def test_an_mlp_forward_and_backward():
    """x (6, 3), which wants no gradient, hidden 8, out 5, fp32; then a tensor that is used twice."""
    first, second = nn.Linear(3, 8, device="meta"), nn.Linear(8, 5, device="meta")
    x, grad = meta(6, 3), meta(6, 5)
    counted = count(lambda: second(torch.nn.functional.gelu(first(x))).backward(grad), grad=True)
    assert dict(counted.launches) == {"addmm": 2, "gelu": 1, "mm": 3, "sum": 2, "gelu_backward": 1}
    assert {name: bytes // 4 for name, bytes in counted.bytes.items()} == {
        "addmm": (18 + 24 + 8 + 48) + (48 + 40 + 5 + 30),
        "gelu": 48 + 48,
        "mm": (30 + 40 + 48) + (30 + 48 + 40) + (48 + 18 + 24),
        "sum": (30 + 5) + (48 + 8),
        "gelu_backward": 48 + 48 + 48,
    }
    assert counted.total_flops == 2 * 6 * (3 * 8 + 8 * 5) + 2 * 6 * (2 * 8 * 5 + 3 * 8)
    y = meta(6, 8, grad=True)
    # its two gradients meet in one addition
    assert listing(count(lambda: (y + y.sigmoid()).backward(meta(6, 8)), grad=True))[-1] == ("add", 0, 4 * 3 * 48)


def test_flops_of_the_gelu_gemm():
    x, weight, bias = meta(2, 4, 8), meta(16, 8), meta(16)
    with ops.use_backend("triton"):
        counted = count(lambda: ops.linear_gelu(x, weight, bias))
    assert listing(counted) == [("linear_gelu", 2 * 8 * 8 * 16, 4 * (64 + 128 + 16 + 128))]


def test_attention_forward_and_backward():
    """B=2, T=5, H=3, head dim 7: one launch each, 4 B H T T d FLOPs and 2.5 times that; log-sum-exp in fp32."""
    q, k, v = (meta(2, 5, 3, 7, dtype=BF16, grad=True).transpose(1, 2) for _ in range(3))
    grad = meta(2, 5, 21, dtype=BF16)

    def call():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(2, 5, 21)

    one, flops, log_sums = 210 * 2, 4 * 2 * 3 * 5 * 5 * 7, 2 * 3 * 5 * 4
    assert listing(count(call)) == [("scaled_dot_product_attention", flops, 4 * one)]
    counted = count(lambda: torch.autograd.grad(call(), (q, k, v), grad), grad=True)
    assert listing(counted) == [
        ("scaled_dot_product_attention", flops, 4 * one + log_sums),
        ("scaled_dot_product_attention_backward", flops * 5 // 2, 8 * one + log_sums),
    ]
    across = count(lambda: torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :2], v[:, :, :2]))
    assert across.total_flops == 4 * 2 * 3 * 5 * 2 * 7


def test_packed_attention_backward_assembles_the_gradient_twice():
    """Eager PyTorch stacks dq, dk and dv, heads first, and copies that into the projection's layout."""
    qkv, grad = meta(2, 5, 3 * 21, dtype=BF16, grad=True), meta(2, 5, 21, dtype=BF16)
    counted = count(lambda: reference.ops.self_attention(qkv, 3).backward(grad), grad=True)
    assert [name for name in counted.launches if "attention" not in name] == ["stack", "clone"]
    assert counted.bytes["stack"] == counted.bytes["clone"] == 2 * 2 * 630
    assert counted.total_launches == 4


def test_outputs_are_not_read():
    x, y = meta(4, 8), meta(4, 8)
    assert listing(count(lambda: torch.zeros_like(x))) == [("zeros_like", 0, 128)]
    assert listing(count(lambda: x.copy_(y))) == [("copy_", 0, 256)]
    assert listing(count(lambda: x.add_(y))) == [("add_", 0, 384)]


def test_copies_within_operators():
    """torch's CUDA norms and ours take rows; the patch embedding's layout is copied first."""
    x = meta(2, 8, 5, dtype=BF16).transpose(1, 2)
    shift, scale = meta(2, 8, dtype=BF16), meta(2, 8, dtype=BF16)
    slow = count(lambda: torch.nn.functional.layer_norm(x, (8,)))
    assert listing(slow)[0] == ("contiguous", 0, 2 * 160) and slow.launches["native_layer_norm"] == 1
    assert count(lambda: torch.nn.functional.layer_norm(x.contiguous(), (8,))).launches["contiguous"] == 0
    with ops.use_backend("triton"):
        fast = count(lambda: ops.layer_norm_modulate(x, shift, scale))
        rows = count(lambda: ops.layer_norm_modulate(x.contiguous()[:, ::2], shift, scale))
    assert listing(fast)[0] == ("contiguous", 0, 2 * 160)
    # read x, shift and scale; write out, and mean and 1 / std in fp32
    assert listing(fast)[1] == ("adaln_forward", 0, 2 * 160 + 2 * 32 + 2 * 10 * 4)
    assert dict(rows.launches) == {"clone": 1, "adaln_forward": 1}
    assert count(lambda: shift * shift).total_bytes == 2 * 32  # given twice, read once, and the product


def test_the_backward_of_adaln_is_two_launches():
    """B=2, T=40, D=64 in bf16: three slabs of 16 rows a sample, whose sums the second launch adds up."""
    x, branch = (meta(2, 40, 64, dtype=BF16, grad=True) for _ in range(2))
    gate, shift, scale = (meta(2, 64, dtype=BF16, grad=True) for _ in range(3))
    inputs = (x, branch, gate, shift, scale)
    grads = [meta(2, 40, 64, dtype=BF16) for _ in range(2)]
    with ops.use_backend("triton"):
        counted = count(
            lambda: torch.autograd.grad(ops.gated_residual_layer_norm_modulate(*inputs), inputs, grads), grad=True
        )
    rows, vector, stats, partial = 2 * 40 * 64 * 2, 2 * 64 * 2, 2 * 2 * 40 * 4, 3 * 2 * 3 * 64 * 4
    assert listing(counted) == [
        ("adaln_forward", 0, 4 * rows + 3 * vector + stats),
        # d_r, d_out, r and branch read, d_x and d_branch written
        ("adaln_backward", 0, 6 * rows + 2 * vector + stats + partial),
        ("sum_partials", 0, partial + 3 * vector),
    ]


def block_of(provider, batch=8):
    """What one more block adds to a bf16 forward, by operator."""
    three, two = (trace(replace(TINY, depth=depth), batch, BF16, "forward", provider) for depth in (3, 2))
    return three.launches - two.launches, three.total_bytes - two.total_bytes, three.total_flops - two.total_flops


def test_a_block_of_the_reference():
    """In units of M D elements (M = B T): norms 2 x 8, gated residuals 2 x 5, Linears 16, attention 4, GELU 8."""
    batch, tokens, width = 8, 24, 64
    launches, total_bytes, flops = block_of("reference", batch)
    assert dict(launches) == {
        "silu": 1, "addmm": 5, "native_layer_norm": 2, "mul": 4, "add": 6,
        "scaled_dot_product_attention": 1, "gelu": 1,
    }  # fmt: skip
    unit, vector = batch * tokens * width, batch * width
    weights = 18 * width**2 + 15 * width
    small = (2 + 7) * vector + 2 * (2 + 1 + 1 + 1) * vector  # SiLU, its Linear; 1 + scale, scale, shift, gate
    stats = 2 * 2 * batch * tokens * 4
    assert total_bytes == 2 * (50 * unit + weights + small) + stats
    linears = 2 * batch * 6 * width**2 + 2 * batch * tokens * 12 * width**2
    assert flops == linears + 4 * batch * tokens**2 * width


@pytest.mark.quick
def test_a_block_of_ditfast():
    """28 units: the fused operator 2 x 4, Linears 16, attention 4."""
    batch, tokens, width = 8, 24, 64
    launches, total_bytes, flops = block_of("ditfast", batch)
    assert dict(launches) == {
        "adaln_forward": 2, "addmm": 3, "linear_gelu": 1, "scaled_dot_product_attention": 1
    }  # fmt: skip
    unit, vector = batch * tokens * width, batch * width
    weights = 18 * width**2 + 15 * width
    # the block's part of the one modulation GEMM, read again as 2 x (gate, shift, scale)
    assert total_bytes == 2 * (28 * unit + weights + (6 + 6) * vector) + 2 * 2 * batch * tokens * 4
    assert flops == block_of("reference", batch)[2]


def test_flops_of_a_whole_model():
    """The paper's 118.6 G multiply-accumulates of XL/2 (table 4), and three times the Linears in training."""
    config = DiTConfig.named("DiT-XL/2")
    forward = trace(config, 1, BF16, "forward", "reference").total_flops
    assert 118.4e9 < forward / 2 < 118.9e9
    assert trace(config, 1, BF16, "cfg", "reference").total_flops == 2 * forward
    attention = 4 * 28 * 256**2 * 1152
    # neither the latent nor the sinusoid wants a gradient
    first = 2 * 256 * 16 * 1152 + 2 * 256 * 1152
    train = trace(config, 1, BF16, "train", "reference").total_flops
    assert train == 3 * (forward - attention) + attention * 7 // 2 - first


@pytest.mark.quick
def test_roofline():
    cost = Cost([Launch("a", 4_000_000, 1_000), Launch("b", 1_000_000, 9_000), Launch("c", 0, 2_000)])
    # 1 TFLOP/s is 1e9 a ms, 1 GB/s 1e6 bytes: a 4 and 1 us, b 1 and 9 us, c 0 and 2 us
    assert roofline_ms(cost, 1.0, 1.0) == pytest.approx(0.004 + 0.009 + 0.002)
    assert roofline_ms(cost, 1.0, 1000.0) == pytest.approx(0.004 + 0.001 + 0.000_002)
    for rates, name in (((0.0, 1.0), "peak_tflops"), ((1.0, float("nan")), "gb_per_s")):
        with pytest.raises(ValueError, match=f"{name} must be above 0"):
            roofline_ms(cost, *rates)
    arithmetic = Cost([Launch("mm", 10**12, 1)])
    assert datasheet_bounds(arithmetic, "bf16") == pytest.approx(
        {"A100-40": 1000 / 312, "A100-80": 1000 / 312, "H100": 1000 / 989, "H200": 1000 / 989}
    )
    assert datasheet_bounds(arithmetic, "fp32")["H200"] == pytest.approx(1000 / 67)
    traffic = Cost([Launch("copy", 0, 10**9)])
    assert datasheet_bounds(traffic, "fp16") == pytest.approx(
        {"A100-40": 1 / 1.555, "A100-80": 1 / 2.039, "H100": 1 / 3.35, "H200": 1 / 4.8}
    )
    with pytest.raises(ValueError, match="precision must be one of .*, got 'fp8'"):
        datasheet_bounds(traffic, "fp8")


def test_rows():
    case = Case(TINY, 4, torch.float32, "cfg")
    rows = list(run([case], ["ditfast", "reference"]))
    assert [row.provider for row in rows] == ["ditfast", "reference"]
    row = rows[0]
    assert row.key == ("DiT(2 x 64, 2 heads)/2", "adaln_zero", (8, 12), 4, "fp32", "cfg", "ditfast")
    traced = trace(TINY, 4, torch.float32, "cfg", "ditfast")
    assert (row.launches, row.bytes, row.flops) == (
        traced.total_launches, traced.total_bytes, traced.total_flops
    )  # fmt: skip
    assert row.intensity == row.flops / row.bytes
    assert row.roofline_ms == {
        name: roofline_ms(traced, gpu.tflops["fp32"], gpu.gb_per_s) for name, gpu in DATASHEETS.items()
    }


@pytest.mark.parametrize("mode", ["forward", "cfg", "train"])
@pytest.mark.parametrize("provider", ["reference", "ditfast"])
def test_a_trace_does_not_depend_on_earlier_ones(mode, provider):
    first, second = (listing(trace(TINY, 3, BF16, mode, provider)) for _ in range(2))
    assert first == second


def test_designs_without_fusions_launch_the_same():
    slow, fast = run([Case(replace(TINY, conditioning="cross_attention"), 3, BF16)], ["reference", "ditfast"])
    assert (slow.launches, slow.bytes) == (fast.launches, fast.bytes)


def test_diffusers():
    pytest.importorskip("diffusers", reason="needs the package diffusers")
    config = DiTConfig(depth=2, hidden_size=64, num_heads=2, latent_size=(8, 8), num_classes=10)
    reference, diffusers = (trace(config, 3, BF16, "train", name) for name in ("reference", "diffusers"))
    # two more GEMMs a block for q, k and v apart, and two for the timestep's MLP, which each block has again
    gemms = trace(config, 3, BF16, "forward", "diffusers").launches["addmm"]
    assert gemms - trace(config, 3, BF16, "forward", "reference").launches["addmm"] == 2 * 2 + 2 * 2
    assert diffusers.launches["scaled_dot_product_attention_backward"] == 2
    assert diffusers.total_flops > reference.total_flops
    with pytest.raises(ValueError, match="diffusers cannot be traced in .*: "):
        trace(replace(config, conditioning="adaln"), 3, BF16, "forward", "diffusers")
    assert list(run([Case(replace(config, conditioning="adaln"), 3, BF16)], ["diffusers"])) == []


def test_unknown_names():
    with pytest.raises(ValueError, match="provider must be one of .* did you mean 'diffusers'"):
        trace(TINY, 1, BF16, "forward", "difusers")
    with pytest.raises(ValueError, match="mode must be one of forward, cfg, train, got 'train-checkpoint'"):
        trace(TINY, 1, BF16, "train-checkpoint", "reference")


app = typer.Typer()
app.command()(cost)
OPTIONS = ["--model", "DiT-S/8", "--batch", "2", "--providers", "reference,ditfast"]


def test_command(tmp_path):
    path = tmp_path / "cost.json"
    result = CliRunner().invoke(app, [*OPTIONS, "--mode", "forward", "--mode", "train", "--json", str(path)])
    assert result.exit_code == 0, result.output
    results = Results.load(path, "cost")
    assert results.complete
    assert [(row.mode, row.provider) for row in results.rows] == [
        (mode, provider) for mode in ("forward", "train") for provider in ("reference", "ditfast")
    ]
    cases = [Case(DiTConfig.named("DiT-S/8"), 2, BF16, mode) for mode in ("forward", "train")]
    assert results.rows == list(run(cases, ["reference", "ditfast"]))
    assert results.settings["datasheets"]["H200"] == {
        "tflops": {"bf16": 989.0, "fp16": 989.0, "tf32": 494.0, "fp32": 67.0}, "gb_per_s": 4800.0
    }  # fmt: skip
    row = results.rows[1]
    assert "Computed, not measured" in result.stdout
    assert f"{2 / row.roofline_ms['H100'] * 1e3:,.0f}" in result.stdout


def test_files_of_the_first_schema_are_refused(tmp_path):
    path = tmp_path / "cost.json"
    Results("cost", {}, {}, rows=list(run([Case(TINY, 1, BF16)], ["reference"]))).save(path)
    assert len(Results.load(path, "cost").rows) == 1
    path.write_text(path.read_text().replace("cost/2", "cost/1"))
    with pytest.raises(ValueError, match="must have the schema 'ditfast.bench.cost/2', got 'ditfast.bench.cost/1'"):
        Results.load(path, "cost")


def test_an_interruption_keeps_the_rows(tmp_path, monkeypatch):
    def interrupted(cases, providers):
        yield next(run(cases, providers))
        raise KeyboardInterrupt

    monkeypatch.setattr(cost_bench, "run", interrupted)
    path = tmp_path / "cost.json"
    result = CliRunner().invoke(app, [*OPTIONS, "--json", str(path)])
    assert result.exit_code == 130
    assert "Interrupted: these are the rows so far." in result.stdout
    saved = json.loads(path.read_text())
    assert [row["provider"] for row in saved["rows"]] == ["reference"] and saved["complete"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "DiT-XL2"], "model must be one of .* did you mean 'DiT-XL/2'"),
        (["--mode", "forwards"], "mode must be one of .* did you mean 'forward'"),
        (["--providers", "ditfst"], "provider must be one of .* did you mean 'ditfast'"),
        (["--providers", ","], "--providers must name at least one of"),
        (["--dtype", "fp8"], "dtype must be one of"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--conditioning", "adaln", "--providers", "diffusers"], "none of the providers can be traced: diffusers: "),
        (["--json", "/nowhere/cost.json"], "--json must be a file in a folder that exists"),
    ],
)
def test_wrong_options(options, message):
    result = CliRunner().invoke(app, options)
    assert isinstance(result.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise result.exception
