"""Shared by the GPU tests: the device and the shapes, other work beside a launch, captured graphs, threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ditfast import DiT, DiTConfig, reference
from ditfast.parity import judge
from ditfast.testing.inputs import randomize_
from ditfast.testing.operators import OPERATORS, Shape, draw_inputs, run
from tests.kernels.conftest import failures, triton_operator, watch

DEVICE = torch.device("cuda")
CYCLES = 20_000_000  # about 10 ms: work that does not wait runs too early
FAR = 1 << 31  # elements, past which an int32 offset is negative
SMALL = DiTConfig(depth=2, hidden_size=384, num_heads=6, latent_size=32, num_classes=10)
# the models' widths and heads, with tokens that fill tiles and tokens that do not
MODELS = [
    Shape(3, tokens, width, num_heads=heads, ratio=4)
    for width, heads in ((384, 6), (1152, 16))
    for tokens in (256, 257)
]
FULL = Shape(64, 256, 1152, num_heads=16, ratio=4)  # fills the multiprocessors several times over

every_operator = pytest.mark.parametrize("name", OPERATORS)
# as the choice among candidates has it, and this project's kernels whatever the choice
by = {"auto": OPERATORS.get, "triton": triton_operator}
every_backend = pytest.mark.parametrize("backend", by)


class Question:
    """One operator with bf16 inputs on the GPU, and the rule's verdict on any results of it."""

    def __init__(self, operator, shape=MODELS[-1], seed=0, gradients=True):
        self.operator, self.options = operator, operator.options(shape)
        self.inputs = draw_inputs(operator, shape, torch.bfloat16, DEVICE, seed=seed)
        self.wanted = operator.differentiable(self.inputs) if gradients else ()

    def run(self, inputs=None):
        return run(self.operator.fused, self.inputs if inputs is None else inputs, self.options, self.wanted)

    def failures(self, actual):
        arguments = (self.operator.formula, self.inputs, self.options, self.wanted)
        oracle, yardstick = run(*arguments, torch.float64), run(*arguments)
        return failures(
            {name: judge("operator", actual[name], yardstick[name], oracle[name], torch.bfloat16) for name in oracle}
        )


def pair(config, dtype=torch.float32):
    """(fast, reference) with the same random weights, in eval mode."""
    slow = randomize_(reference.DiT(config)).to(DEVICE, dtype).eval()
    fast = DiT(config).to(DEVICE, dtype).eval()
    fast.load_state_dict(slow.state_dict())
    return fast, slow


def model_failures(actual, yardstick, oracle, dtype):
    """By the rule for models, all gradients ("d_...") as one tensor: of a few elements rounding is a lottery."""

    def joined(values):
        gradients = [value.flatten() for name, value in values.items() if name.startswith("d_")]
        outputs = {name: value for name, value in values.items() if not name.startswith("d_")}
        return outputs | {"gradients": torch.cat(gradients)}

    actual, yardstick, oracle = map(joined, (actual, yardstick, oracle))
    return failures({name: judge("model", actual[name], yardstick[name], oracle[name], dtype) for name in oracle})


def spy_on(monkeypatch, *plans):
    """(name, current stream) of every call of plans of these classes, as they come."""
    return watch(monkeypatch, *plans, note=lambda plan, _: (type(plan).__name__, torch.cuda.current_stream()))


class OtherWork:
    """Keeps multiprocessors, caches and memory busy beside the launches in question."""

    def __init__(self):
        self.stream, self.values = torch.cuda.Stream(), torch.rand(1 << 24, device=DEVICE)

    def queue(self, count):
        with torch.cuda.stream(self.stream):
            for _ in range(count):
                self.values.mul_(1.5).sin_()


def captured(function):
    """(graph, what function returned), after three calls on a stream of its own: libraries choose in their first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph, out


def in_threads(functions):
    """What each returns, called at once in threads of their own, each on a stream of its own."""
    torch.cuda.synchronize()  # the arguments are made
    together = threading.Barrier(len(functions))

    def call(function):
        stream = torch.cuda.Stream()
        together.wait()
        with torch.cuda.stream(stream):
            out = function()
        stream.synchronize()
        return out

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(call, functions))


def usable(config):
    """A GEMM's configuration; skips if the GPU cannot run it."""
    # a conftest.py of a folder named on the command line must not import triton: see tests/conftest.py
    from ditfast.kernels.configs import gemm

    if config.tma and torch.cuda.get_device_capability()[0] not in gemm.PERSISTENT:
        pytest.skip("needs TMA and the shared memory of a Hopper or a datacenter Blackwell")
    return config


def differing(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])]
