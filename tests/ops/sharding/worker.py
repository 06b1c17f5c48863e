"""Two processes of one test of test_sharding.py: ``python worker.py CASE [CASE ...]``.

Forked from one interpreter, so that torch is imported once. Every process exits with an error where a check of its
case fails; what fails is collected, so that one broken rule does not hide another.
"""

import os
import sys
import tempfile

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from ditfast import ops
from ditfast.parity import judge
from ditfast.testing.operators import OPERATORS, Shape, draw_inputs, run
from tests.conftest import prepare_interpreter
from tests.ops.sharding import modules as sharding_modules
from tests.ops.sharding import rules as sharding_rules
from tests.ops.sharding.layouts import LAYOUTS, OTHERS, PLACEMENTS

RANKS = 2
SHAPE = Shape(4, 6, 16)


def distributed(value, mesh, letter):
    """A tensor that all ranks hold as a DTensor, differentiably."""
    if letter == "p":  # parts that add up to it exactly: 2 v and -v
        part = value + value.detach() * (1 if mesh.get_local_rank() == 0 else -2)
        return DTensor.from_local(part, mesh, [Partial()])
    return DTensor.from_local(value, mesh, [Replicate()]).redistribute(placements=[PLACEMENTS[letter]])


def letters(layout):
    """``x0 biasr`` -> {"x": "0", "bias": "r"}."""
    return {word[:-1]: word[-1] for word in layout.split()}


def examined(
    name, layout, mesh, backend="triton", shape=SHAPE, dtype=torch.float32, mixed=False, wanted=None, function=None
):
    """The violations by an operator's results, their layouts and those of the gradients, or None."""
    operator = OPERATORS[name]
    inputs, options = draw_inputs(operator, shape, dtype, "cpu", mixed), operator.options(shape)
    wanted = operator.differentiable(inputs) if wanted is None else wanted
    oracle = run(operator.formula, inputs, options, wanted, torch.float64)
    yardstick = run(operator.formula, inputs, options, wanted)
    arguments_layout, _, results_layout = layout.partition(" > ")
    placements = {}

    def fused(**arguments):
        for argument, letter in letters(arguments_layout).items():
            arguments[argument] = distributed(arguments[argument], mesh, letter)
            if arguments[argument].requires_grad:
                arguments[argument].register_hook(
                    lambda gradient, argument=argument: placements.update({f"d_{argument}": gradient.placements[0]})
                )
        with ops.use_backend(backend):
            outputs = (function or operator.fused)(**arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        placements.update({f"output{index}": output.placements[0] for index, output in enumerate(outputs)})
        return tuple(output.full_tensor() for output in outputs)

    actual = run(fused, inputs, options, wanted)
    violations = {}
    for key, exact in oracle.items():
        verdict = judge("operator", actual[key], yardstick[key], exact, dtype)
        if actual[key].dtype != yardstick[key].dtype or not verdict.ok:
            violations[key] = verdict
    for key, letter in letters(results_layout).items():
        if (key in wanted or not key.startswith("d_")) and placements[key] != PLACEMENTS[letter]:
            violations[f"layout of {key}"] = placements[key]
    return f"{backend}, {name}, {arguments_layout}, {shape}, {wanted}: {violations}" if violations else None


def operators(mesh, backend):
    """Each layout on the kernels: results and gradients have the expected placements, so nothing was gathered."""
    cases = [(name, layout, {}) for name, layouts in LAYOUTS.items() for layout in layouts] + OTHERS
    if backend == "auto":  # the formulas, which torch shards by its own rules
        cases = [(name, layout.partition(" > ")[0], case) for name, layout, case in cases]
    return [examined(name, layout, mesh, backend, **case) for name, layout, case in cases]


def compiled(mesh):
    """The process's first call is a compiled one, which must find the rules."""
    failures = []
    for name, layouts in LAYOUTS.items():
        torch._dynamo.reset()
        function = torch.compile(OPERATORS[name].fused, fullgraph=True, backend="aot_eager")
        failures.append(examined(name, layouts[-1], mesh, function=function))
    return failures


CASES = {
    "operators": lambda mesh: operators(mesh, "triton"),
    "operators_auto": lambda mesh: operators(mesh, "auto"),
    "compiled": compiled,
    "rules": sharding_rules.failures,
    "modules": sharding_modules.failures,
}


def work(rank, cases, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (RANKS,))
    failures = [failure for case in cases for failure in CASES[case](mesh) if failure]
    assert not failures, "\n".join(map(str, failures))
    dist.destroy_process_group()


if __name__ == "__main__":
    prepare_interpreter()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(work, (sys.argv[1:], folder), RANKS, start_method="fork")
