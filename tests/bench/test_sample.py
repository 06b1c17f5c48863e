"""ditfast bench sample: trajectories beside each other, judged by their latents; what the table saves, traced."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ditfast import DiTConfig
from ditfast.bench.cases import diffusers_dit
from ditfast.bench.cost.sampling import step_costs
from ditfast.bench.records.files import Results
from ditfast.bench.suites import sample
from ditfast.bench.suites.sample import PROVIDERS, SampleCase, rows, unavailable
from ditfast.cli.command import app
from ditfast.inference import ScheduleTable

CPU = torch.device("cpu")
needs_diffusers = pytest.mark.skipif(diffusers_dit.missing() is not None, reason="samplers need the package diffusers")
TINY = DiTConfig(depth=2, hidden_size=64, num_heads=2, latent_size=8, num_classes=10)


def case(**changes):
    return SampleCase(
        **{
            "config": TINY,
            "batch": 3,
            "dtype": torch.float32,
            "sampler": "ddpm",
            "steps": 4,
            "cfg_scale": 3.0,
            **changes,
        }
    )


@needs_diffusers
@pytest.mark.compiler
def test_every_provider_is_judged_and_timed():
    one_block = case(config=replace(TINY, depth=1))  # for one of them is compiled
    by_provider = {row.provider: row for row in rows(one_block, PROVIDERS, CPU, 0.02)}
    assert set(by_provider) == set(PROVIDERS)
    ran = ["reference", "reference-compile", "diffusers", "ditfast-plain", "ditfast"]
    for name in ran:
        row = by_provider[name]
        assert row.status == "ok" and row.ms.median > 0 and row.parity_samples == 2, row
        assert 0 < row.error < 1e-4, row  # an error that says something
        assert row.images_per_s == pytest.approx(3 / row.ms.median * 1e3)
    assert by_provider["reference"].parity and by_provider["ditfast"].parity and by_provider["ditfast-plain"].parity
    assert (
        by_provider["ditfast"].rival in ("reference", "reference-compile", "diffusers")
        and by_provider["ditfast"].speedup > 0
    )
    assert by_provider["reference"].speedup is None
    assert {name for name, row in by_provider.items() if row.status == "unavailable"} == {
        "ditfast-table",
        "ditfast-graph",
    }


@needs_diffusers
@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_other_samplers(sampler):
    results = rows(case(sampler=sampler, batch=1), ["reference", "ditfast"], CPU, 0.02)
    assert all(row.parity for row in results) and all(row.parity_samples == 1 for row in results)


@needs_diffusers
@pytest.mark.quick
def test_wrong_latents_earn_no_speed_up(monkeypatch):
    build = sample.build

    def wrong(name, *arguments):
        run = build(name, *arguments)
        return run if name == "reference" else lambda *inputs: run(*inputs) * 1.001

    monkeypatch.setattr(sample, "build", wrong)
    reference, ours = rows(case(), ["reference", "ditfast"], CPU, 0.02)
    assert reference.parity and ours.parity is False and ours.speedup is None and ours.ms is not None


@needs_diffusers
def test_wrong_late_steps_do_not_pass_where_they_hardly_move_the_latents(monkeypatch):
    at = ScheduleTable.at
    monkeypatch.setattr(ScheduleTable, "at", lambda table, step, rows: at(table, step if step < 8 else 0, rows))
    reference, ours = rows(case(steps=10, dtype=torch.bfloat16), ["reference", "ditfast"], CPU, 0.02)
    assert reference.parity and ours.status == "ok" and ours.parity is False and ours.speedup is None


@needs_diffusers
def test_a_provider_that_fails_has_a_row(monkeypatch):
    build = sample.build

    def failing(name, *arguments):
        if name == "ditfast":
            raise RuntimeError("no such luck")
        return build(name, *arguments)

    monkeypatch.setattr(sample, "build", failing)
    reference, ours = rows(case(), ["reference", "ditfast"], CPU, 0.02)
    assert reference.status == "ok"
    assert (ours.status, ours.note, ours.ms) == ("error", "RuntimeError: no such luck", None)


@needs_diffusers
def test_nothing_of_ours_is_unavailable_on_a_gpu():
    gpu = torch.device("cuda")
    ours = [name for name in PROVIDERS if name.startswith("ditfast")]
    assert [unavailable(name, case(), gpu) for name in ours] == [None] * 4


def test_the_table_leaves_a_third_of_the_weights_unread():
    config = DiTConfig.named("DiT-XL/2")
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    for batch in (1, 32):
        plain, table = step_costs(config, batch, torch.bfloat16)
        # counted by hand: the plain step reads everything but the label table
        adaln = (28 * 6 + 2) * 1152 * (1152 + 1)
        embedder = 1152 * (256 + 1) + 1152 * (1152 + 1)
        everything = 675_129_632 - 1001 * 1152
        assert plain.weight_bytes == 2 * everything
        assert table.weight_bytes == 2 * (everything - adaln - embedder)
        assert table.weight_bytes <= 0.7 * plain.weight_bytes
        assert table.launches < plain.launches
        read, total = table.weight_bytes, plain.weight_bytes
        sentence = f"{100 * read / total:.0f} % of the weights, {read / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        assert sentence in " ".join(page.split())
        gathered = 2 * (2 * batch) * 2 * (28 * 6 + 2) * 1152  # read and written
        assert table.bytes < plain.bytes - 2 * adaln + gathered
        # made in every call: a row for each label and the null class, where the plain step has two for each image
        table_flops = 2 * 1152 * (28 * 6 + 2) * 1152 + 2 * 1152 * (256 + 1152)
        assert table.making_flops == (batch + 1) * table_flops
        assert plain.flops == table.flops + 2 * batch * table_flops
    assert f"(for {batch} images of XL/2 {100 * table.making:.1f} % of its FLOPs)" in " ".join(page.split())
    with pytest.raises(ValueError, match="only adaLN designs are modulated"):
        step_costs(DiTConfig(conditioning="in_context"), 1, torch.bfloat16)


def command(*arguments):
    return CliRunner().invoke(app, ["bench", "sample", "--device", "cpu", *arguments])


@needs_diffusers
def test_the_command(tmp_path, quick_limits):
    path = tmp_path / "sample.json"
    few = ("--providers", "reference,ditfast", "--seconds", "0.01", "--json", str(path))
    result = command("--model", "DiT-S/8", "--batch", "1", "--steps", "2", *few)
    assert result.exit_code == 0, result.output
    assert (
        "2 steps of ddpm, guidance 4.0" in result.output
        and "the table reads 66% of the weights" in result.output
        and "Making it, in every call, is 3.1% of the FLOPs" in " ".join(result.output.split())
    )
    loaded = Results.load(path, "sample")
    assert loaded.complete and [row.provider for row in loaded.rows] == ["reference", "ditfast"]
    assert all(row.parity and row.steps == 2 and row.latent_size == (32, 32) for row in loaded.rows)
    before = json.loads(path.read_text())["rows"]
    result = command("--model", "DiT-S/8", "--batch", "1", "--steps", "2", *few, "--continue")
    assert result.exit_code == 0 and "measured before" in result.output
    assert json.loads(path.read_text())["rows"] == before


@needs_diffusers
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "1001"), "steps must be an integer in 2..1000 for 'ddpm', got 1001"),
        (("--cfg-scale", "1"), "--cfg-scale must be above 1, got 1"),
        (("--providers", "reference,ditfst"), "ditfast"),
        (("--model", "DiT-XL/3"), "got 'DiT-XL/3'; did you mean 'DiT-XL/8'"),
        (("--continue",), "--continue needs --json FILE"),
        (("--seconds", "-1"), "--seconds must be above 0"),
    ],
)
def test_bad_input(arguments, message):
    result = command(*arguments)
    assert result.exit_code == 2 and message in result.output, result.output


def test_missing_diffusers_is_reported_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    path = tmp_path / "sample.json"
    result = command("--providers", "reference,ditfast", "--json", str(path))
    assert result.exit_code == 2 and not path.exists() and result.stdout == ""
    message = "samplers need the package diffusers, which is not installed: pip install ditfast[diffusers]"
    assert result.stderr == f"error: {message}\n"
    reason = "the package diffusers is not installed (pip install ditfast[diffusers])"
    results = rows(case(), PROVIDERS, CPU, 0.02)
    assert [(row.status, row.note, row.ms) for row in results] == [("unavailable", reason, None)] * len(PROVIDERS)
