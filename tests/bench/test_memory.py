"""Memory of the providers: bytes counted by hand, who shows none, the search for the largest batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditfast import DiTConfig
from ditfast.bench.cases.case import Case, Mode
from ditfast.bench.cases.providers import PROVIDERS, Provider
from ditfast.bench.cases.variants import Variant
from ditfast.bench.cases.workload import Inputs, Workload, build_model, make_inputs
from ditfast.bench.measure.isolation import ProviderFailed, Worker
from ditfast.bench.measure.memory import saved_bytes
from ditfast.bench.suites.memory import NO_LOSS_NOTE, measure, search, trial

CPU, META = torch.device("cpu"), torch.device("meta")
CONFIG = DiTConfig(depth=2, hidden_size=72, num_heads=2, latent_size=8, num_classes=10)
MIB = 1 << 20


def linear_gelu(device: str = "cpu") -> tuple[nn.Linear, Tensor]:
    return nn.Linear(8, 16, device=device), torch.randn(5, 8, device=device)


@pytest.mark.quick
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saved_bytes_of_a_small_graph_by_hand(device: str) -> None:
    linear, x = linear_gelu(device)

    def loss() -> Tensor:
        return F.gelu(linear(x)).sum()

    # x for the weight's gradient, 5 * 8 floats; the pre-activation for GELU's, 5 * 16; the weight is a parameter
    assert saved_bytes(loss) == 160 + 320
    assert saved_bytes(loss, [x]) == 320
    assert saved_bytes(loss, [x[1:]]) == 320  # a view is its storage
    x.requires_grad_()  # now a leaf that the loss has a gradient for
    assert saved_bytes(loss) == 320


def test_a_kept_view_keeps_its_storage_and_counts_once() -> None:
    linear, x = linear_gelu()

    def loss() -> Tensor:
        hidden = linear(x)
        return hidden[:, :1].square().sum() + hidden[:, 3:].square().sum()

    assert saved_bytes(loss, [x]) == 320


def test_what_is_freed_before_the_backward_does_not_count() -> None:
    linear, x = linear_gelu()

    def loss() -> Tensor:
        detached = F.gelu(linear(x)).detach()
        return (linear(x) * detached).sum()

    assert saved_bytes(loss, [x]) == 320  # what the product multiplied with


def test_copies_of_parameters_and_tensors_beside_autograds_own_count() -> None:
    linear, x = linear_gelu()
    x.requires_grad_()
    # the weight's copy for x's gradient, x's for the weight's
    copied = saved_bytes(lambda: F.linear(x.bfloat16(), linear.weight.bfloat16()).sum())
    assert copied == 2 * (16 * 8 + 5 * 8)

    class Stash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            ctx.stashed = [value.exp()]
            return value * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.stashed[0]

    assert saved_bytes(lambda: Stash.apply(linear(x)).sum()) == 320  # type: ignore[no-untyped-call]


def test_a_loss_without_a_backward_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss must return a tensor with a backward, got .* shape \(2,\)"):
        saved_bytes(lambda: torch.ones(2))


@pytest.mark.long
@pytest.mark.compiler
def test_what_a_compiled_forward_keeps() -> None:
    linear, x = linear_gelu()
    compiled = torch.compile(lambda x: F.gelu(linear(x)), fullgraph=True)
    compiled(x).sum().backward()
    assert saved_bytes(lambda: compiled(x).sum(), [x]) == 320
    case = Case(replace(CONFIG, depth=1), 3, torch.float32, "train")
    row = measure(case, PROVIDERS["reference-compile"], CPU)
    assert row.status == "ok", row.note
    eager = measure(case, PROVIDERS["reference"], CPU)
    assert row.saved_bytes is not None and eager.saved_bytes is not None
    # at least qkv, attention's output, the first Linear's, and the residual's two states
    assert 11 * 3 * 16 * 72 * 4 < row.saved_bytes <= eager.saved_bytes


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize(("provider", "units", "vectors"), [("reference", 20, 9), ("ditfast", 12, 6)])
def test_one_more_block_by_hand(dtype: torch.dtype, size: int, provider: str, units: int, vectors: int) -> None:
    """In units of B * T * D: two norms' inputs, qkv 3, attention's output, two branches, the pre-activation 4.

    The reference keeps two normalised states besides, the two norms' outputs, and the activation 4. Of size B * D it
    keeps six modulations, SiLU's output and two times 1 + scale; ditfast the modulations. Two norms' means and
    deviations and attention's sums are fp32, of ours its maxima too.
    """
    batch, tokens, width, heads = 3, 16, 72, 2
    counts = []
    for depth in (2, 3):
        case = Case(replace(CONFIG, depth=depth), batch, dtype, "train")
        row = measure(case, PROVIDERS[provider], META)
        assert (row.status, row.note) == ("ok", "traced on meta tensors")
        assert (row.peak_bytes, row.max_batch, row.device_bytes) == (None, None, None)
        assert row.saved_bytes is not None
        counts.append(row.saved_bytes)
    sums = (2 if provider == "ditfast" else 1) * batch * heads * tokens * 4
    small = vectors * batch * width * size + 4 * batch * tokens * 4 + sums
    assert counts[1] - counts[0] == units * batch * tokens * width * size + small


def test_a_checkpointed_block_keeps_its_input() -> None:
    cases = [Case(replace(CONFIG, depth=depth), 3, torch.bfloat16, "train-checkpoint") for depth in (2, 3)]
    less, more = (measure(case, PROVIDERS["reference"], META).saved_bytes for case in cases)
    assert less is not None and more is not None
    assert more - less == 3 * 16 * 72 * 2


@pytest.mark.parametrize("mode", ["train", "train-checkpoint"])
def test_traced_and_real_bytes_of_the_reference_agree(mode: Mode) -> None:
    case = Case(CONFIG, 3, torch.float32, mode)
    real = measure(case, PROVIDERS["reference"], CPU)
    assert (real.status, real.note) == ("ok", "")
    assert real.saved_bytes is not None and real.saved_bytes > 0
    assert real.saved_bytes == measure(case, PROVIDERS["reference"], META).saved_bytes
    # weights, their gradients, and AdamW's two averages
    weights = sum(p.nbytes for p in PROVIDERS["reference"].build(work_of(case)).parameters.values())  # type: ignore[union-attr]
    assert real.peak_bytes is not None and real.peak_bytes > 4 * weights


def work_of(case: Case) -> Workload:
    return Workload(case, CPU, build_model(case.config, CPU, case.dtype, 0), [make_inputs(case, CPU, 0)])


def test_peak_by_hand() -> None:
    def build(work: Workload) -> Variant:
        buffer = torch.zeros(MIB // 4)

        def step(inputs: Inputs) -> Tensor:
            assert buffer.numel()
            torch.empty(MIB)
            return torch.zeros(2, 8, 8, 8)

        return Variant(step, shared_bytes=7)

    row = measure(Case(CONFIG, 2, torch.float32), Provider("rival", "fake", build), CPU)
    # what it keeps, the 4 MiB of a call that are gone before its output is made, and what it shares
    assert row.peak_bytes == MIB + 4 * MIB + 7
    assert row.saved_bytes is None and row.status == "ok"
    assert row.note.startswith("parity failed")  # a rival's bytes show beside the note


def changed(factor: float) -> Callable[[Workload], Variant]:
    """The reference, its gradients or outputs off by a factor."""

    def build(work: Workload) -> Variant:
        variant = PROVIDERS["reference"].build(work)
        step, loss = variant.step, variant.loss
        return replace(
            variant,
            step=lambda inputs: step(inputs) * factor,
            loss=None if loss is None else lambda inputs: loss(inputs) * factor,
        )

    return build


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_wrong_providers_of_ours_show_no_bytes(mode: Mode) -> None:
    case = Case(CONFIG, 2, torch.float32, mode)
    wrong = measure(case, Provider("ditfast-wrong", "fake", changed(1.01)), CPU)
    assert (wrong.status, wrong.peak_bytes, wrong.saved_bytes) == ("ok", None, None)
    assert wrong.note.startswith("parity failed")
    right = measure(case, Provider("ditfast-right", "fake", changed(1.0)), CPU)
    assert (right.status, right.note) == ("ok", "")
    assert right.peak_bytes is not None and (right.saved_bytes is not None) == (mode == "train")


def hungry(work: Workload) -> Variant:
    raise torch.OutOfMemoryError("tried to allocate 9 GiB")


def test_failures_are_rows_and_a_loss_may_be_missing() -> None:
    def broken(work: Workload) -> Variant:
        raise RuntimeError("boom\nsecond line")

    def lossless(work: Workload) -> Variant:
        return replace(PROVIDERS["reference"].build(work), loss=None, parameters=None)

    def row(name: str, build: Callable[[Workload], Variant], mode: Mode = "forward", why: str | None = None) -> Any:
        provider = Provider(name, "fake", build, lambda case, device: why)
        result = measure(Case(CONFIG, 2, torch.float32, mode), provider, CPU)
        return result.status, result.note, result.peak_bytes is not None

    assert row("big", hungry) == ("oom", "OutOfMemoryError: tried to allocate 9 GiB", False)
    assert row("broken", broken) == ("error", "RuntimeError: boom", False)
    assert row("absent", broken, why="not here") == ("unavailable", "not here", False)
    status, note, has_peak = row("lossless", lossless, "train")
    assert (status, has_peak) == ("ok", True) and NO_LOSS_NOTE in note


def straight(largest: int, tried: list[int], status: str = "oom") -> Callable[[int], int]:
    """A provider of 500 bytes and 10 an image that runs up to a batch."""

    def run(batch: int) -> int:
        tried.append(batch)
        if batch > largest:
            raise ProviderFailed(status, "made up")  # type: ignore[arg-type]
        return 500 + 10 * batch

    return run


def test_a_straight_line_leads_to_the_largest_batch_in_three_tries() -> None:
    tried: list[int] = []
    # 94 % of the memory are 500 + 10 * 1000 bytes
    assert search(straight(1000, tried), {32: 820}, int(10_500 / 0.94), 4096) == (992, "")
    # a second point, the guess to a multiple of 8, and a sixteenth more, which does not fit
    assert tried == [64, 992, 992 + 62]


@pytest.mark.parametrize("largest", [1, 2, 5, 31, 33, 100, 640, 1000, 4095])
@pytest.mark.parametrize("bend", [0.6, 1.0, 1.5])
def test_the_search_ends_within_a_sixteenth_wherever_the_guess_points(largest: int, bend: float) -> None:
    tried: list[int] = []
    known = {} if largest < 8 else {8: 580}
    largest_fitting, note = search(straight(largest, tried), known, int((500 + 10 * largest) * bend), 4096, start=8)
    failed = min((batch for batch in tried if batch > largest), default=4097)
    assert largest_fitting <= largest < failed and note == ""
    assert failed - largest_fitting <= max(1, failed // 16)
    assert len(tried) == len(set(tried)) <= 16


def test_the_search_stops_at_its_limit_at_nothing_and_at_other_failures() -> None:
    tried: list[int] = []
    assert search(straight(10_000, tried), {32: 820}, 10**9, 4096) == (4096, "")
    assert search(straight(0, tried), {}, 10**9, 4096, start=8) == (0, "")
    largest, note = search(straight(100, tried, "error"), {32: 820}, 10**4, 4096)
    assert 94 <= largest <= 100
    assert note.startswith("batch ") and note.endswith("fails for another reason: made up")


@pytest.mark.subprocess
def test_a_worker_counts_and_tries_as_this_process_does(tmp_path: Path) -> None:
    case = Case(CONFIG, 2, torch.float32, "train")
    result = measure(case, PROVIDERS["reference"], CPU)
    worker = Worker("reference", CPU, seed=0)
    try:
        peak = worker.trial_bytes(case)
        worker.prepare(case)
        assert worker.saved_bytes() == result.saved_bytes
    finally:
        worker.close()
    assert result.peak_bytes is not None
    # its one input: of two images two latents, a timestep and a label; and the loss' six tables over 1000 steps
    assert peak == result.peak_bytes + 2 * (2 * 4 * 8 * 8 * 4 + 8 + 8) + 6 * 1000 * 8
    plugin = tmp_path / "rival.py"
    plugin.write_text(
        "import torch\nfrom ditfast.bench.cases.providers import Provider, register\n"
        "def build(work):\n    raise torch.OutOfMemoryError('tried to allocate 9 GiB')\n"
        "register(Provider('hungry', 'runs out of memory', build))\n"
    )
    with pytest.raises(ProviderFailed, match="tried to allocate 9 GiB") as failure:
        trial(case, Provider("hungry", "", hungry), CPU, plugins=[str(plugin)])(4)
    assert failure.value.status == "oom"


@pytest.mark.gpu
def test_rows_and_search_on_a_gpu() -> None:
    device = torch.device("cuda")
    case = Case(CONFIG, 4, torch.bfloat16, "train")
    for name in ("reference", "ditfast"):
        row = measure(case, PROVIDERS[name], device)
        assert (row.status, row.note) == ("ok", "")
        assert row.peak_bytes is not None and row.saved_bytes is not None and row.device_bytes is not None
        run = trial(case, PROVIDERS[name], device)
        assert search(run, {4: row.peak_bytes}, row.device_bytes, 16) == (16, "")
