"""Order of execution on a GPU: repeated runs, neighbours in a batch, streams, threads, a second device."""

import pytest
import torch

from ditfast.kernels import adaln, attention_bwd, linear
from ditfast.testing.operators import OPERATORS, check, draw_inputs
from tests.gpu.conftest import (
    CYCLES,
    DEVICE,
    FULL,
    MODELS,
    OtherWork,
    Question,
    by,
    differing,
    every_backend,
    every_operator,
    in_threads,
    spy_on,
)
from tests.kernels.conftest import NAMES, alone_and_together, failures, poison, triton_operator

pytestmark = pytest.mark.gpu
LEARNING = [name for name, operator in OPERATORS.items() if operator.gradients]


@every_operator
def test_many_runs_are_bit_equal(name, monkeypatch):
    """With other work queued beside: early reads and sums in varying order change bits."""
    poison(monkeypatch)
    question, work = Question(triton_operator(name), FULL), OtherWork()
    first = question.run()
    for repeat in range(20):
        work.queue(repeat % 4)
        assert not differing(first, question.run()), repeat


@pytest.mark.parametrize("row", [0, 31, 63])
@pytest.mark.parametrize("name", [*NAMES, "self_attention", "self_attention+bias"])
def test_a_sample_does_not_depend_on_its_neighbours(name, row):
    operator = triton_operator(name)
    inputs = draw_inputs(operator, FULL, torch.bfloat16, DEVICE)
    pairs = alone_and_together(operator, inputs, row, operator.options(FULL), {"bias"} & inputs.keys())
    assert all(torch.equal(*pair) for pair in pairs)


@every_operator
@every_backend
def test_on_a_side_stream(name, backend):
    """Its inputs arrive on that stream at the last moment: on another stream it would read old values."""
    question = Question(by[backend](name))
    late = {
        key: torch.full_like(value, torch.nan) if value.is_floating_point() else torch.zeros_like(value)
        for key, value in question.inputs.items()
    }
    question.run()  # compiled, and tried out by the libraries
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        for key, value in question.inputs.items():
            late[key].copy_(value)
        results = question.run(late)
    torch.cuda.current_stream().wait_stream(side)
    assert not question.failures(results)


@pytest.mark.parametrize("name", LEARNING)
def test_a_backward_runs_on_its_forwards_stream(name, monkeypatch):
    """The backward is called on another stream, where its incoming gradient arrives at the last moment."""
    launches = spy_on(
        monkeypatch,
        adaln.AdaLNBackward,
        attention_bwd.AttentionBackward,
        linear.LinearGeluBackward,
        linear.GeluBackward,
    )
    question = Question(triton_operator(name))
    expected = question.run()
    launches.clear()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    leaves = {key: value.detach().requires_grad_() for key, value in question.inputs.items()}
    with torch.cuda.stream(side):
        out = question.operator.fused(**leaves, **question.options)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator(DEVICE).manual_seed(1)  # as in run
    incoming = [torch.randn(o.mT.shape, generator=generator, device=DEVICE).mT.to(o.dtype) for o in out]
    late = [torch.full_like(value, torch.nan) for value in incoming]
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    for buffer, value in zip(late, incoming, strict=True):
        buffer.copy_(value)
    gradients = torch.autograd.grad(out, list(leaves.values()), late)
    assert launches and {stream for _, stream in launches} == {side}
    results = {f"d_{key}": value for key, value in zip(leaves, gradients, strict=True)}
    assert not question.failures(expected | results)


@every_operator
@every_backend
def test_threads_on_streams_of_their_own(name, backend):
    """Two at once, each with its own inputs; autograd's thread serves both."""
    questions = [Question(by[backend](name), seed=seed) for seed in (0, 1)]
    for question in questions:
        question.run()

    def ten_runs(question):
        return lambda: [question.run() for _ in range(10)]

    for question, runs in zip(questions, in_threads(list(map(ten_runs, questions))), strict=True):
        for results in runs:
            assert not question.failures(results)


@every_operator
def test_a_second_device(name):
    """Kernels and autograd's thread of that device work there, and the current one stays; also launched directly."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    for wanted in (None, (), None, ()):
        assert not failures(check(triton_operator(name), MODELS[-1], torch.bfloat16, "cuda:1", wanted=wanted))
        assert torch.cuda.current_device() == 0
