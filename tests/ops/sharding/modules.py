"""Accelerated models parallelised by torch's own plans, beside the unsharded ones: for worker.py."""

import copy

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

import ditfast
from ditfast.parity import judge
from tests.adapters.foreign_models import Model, randomised

R, BATCH, TOKENS = Replicate(), Shard(0), Shard(1)
_ATTENTION = {"attention_forward", "attention_backward"}
_ALL = {"adaln_forward", "adaln_backward", *_ATTENTION}


class _Recorded(TorchDispatchMode):
    """The operators of ditfast that are called with DTensors."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ditfast" and any(isinstance(argument, DTensor) for argument in args):
            self.names.add(function._schema.name.removeprefix("ditfast::"))
        return function(*args, **kwargs or {})


def _stacked(model, x, c):
    """(B, T, D) and (B, D) through blocks and final layer."""
    for block in model.blocks:
        x = block(x, c)
    return model.final_layer(x, c)


def _tensor_parallel(model, mesh):
    """Only the MLPs are parallelised; everything between is plain tensors."""
    for block in model.blocks:
        parallelize_module(block, mesh, {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()})
    return None, None


def _tokens(model, mesh, branches=TOKENS, norms=None):
    """Linears in parts; the residual stream, norms and gates along the tokens."""
    plan = {
        "adaLN_modulation.1": ColwiseParallel(output_layouts=R, use_local_output=False),
        "attn.qkv": ColwiseParallel(input_layouts=TOKENS, output_layouts=R, use_local_output=False),
        "attn.proj": RowwiseParallel(input_layouts=R, output_layouts=branches, use_local_output=False),
        "mlp.fc1": ColwiseParallel(input_layouts=TOKENS, use_local_output=False),
        "mlp.fc2": RowwiseParallel(output_layouts=branches, use_local_output=False),
    }
    for block in model.blocks:
        parallelize_module(block, mesh, plan | ({} if norms is None else {"norm1": norms(), "norm2": norms()}))
    distribute_module(model.final_layer, mesh)
    return TOKENS, R


def _sums(model, mesh):
    """Branches that are sums in parts, which the gates must not see as they are."""
    return _tokens(model, mesh, Partial())


def _hooks(model, mesh):
    """Norms that are parallelised themselves: hooks, which the fused block has to leave alone."""
    return _tokens(model, mesh, norms=lambda: SequenceParallel(use_local_output=False))


def _batch(model, mesh):
    """Everything replicated but the batch."""
    distribute_module(model.blocks, mesh)
    distribute_module(model.final_layer, mesh)
    return BATCH, BATCH


def _results(model, x, c, mesh=None, layouts=(None, None)):
    """The output and every gradient."""
    leaves = [value.to(model.t_embedder.weight.dtype).requires_grad_() for value in (x, c)]
    arguments = [
        leaf if layout is None else DTensor.from_local(leaf, mesh, [R]).redistribute(placements=[layout])
        for leaf, layout in zip(leaves, layouts, strict=True)
    ]
    out = _stacked(model, *arguments)
    out = out.full_tensor() if isinstance(out, DTensor) else out
    out.square().mean().backward()
    results = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    results |= {"output": out.detach(), "gradient of x": leaves[0].grad, "gradient of c": leaves[1].grad}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in results.items()}


# (plan, backend, operators that are to run on DTensors)
_CASES = [
    (_tensor_parallel, "triton", set()),
    (_tokens, "triton", _ALL),
    (_tokens, "auto", set()),
    (_sums, "triton", _ALL),
    (_hooks, "triton", _ALL),  # the final layer's norm, and all attention
    (_batch, "triton", _ALL),
    (_batch, "auto", set()),
]


def failures(mesh):
    slow = randomised(Model(dim=32, depth=2))
    generator = torch.Generator().manual_seed(3)
    x, c = torch.randn(4, 6, 32, generator=generator), torch.randn(4, 32, generator=generator)
    exact, yardstick = _results(copy.deepcopy(slow).double(), x, c), _results(copy.deepcopy(slow), x, c)
    for parallelise, backend, operators in _CASES:
        fast = copy.deepcopy(slow)
        ditfast.accelerate(fast)
        layouts = parallelise(fast, mesh)
        with ditfast.ops.use_backend(backend), _Recorded() as recorded:
            actual = _results(fast, x, c, mesh, layouts)
        assert actual.keys() == exact.keys()
        if recorded.names != operators:
            yield f"{parallelise.__name__}, {backend}: ran {recorded.names} on DTensors"
        for name, value in exact.items():
            verdict = judge("model", actual[name], yardstick[name], value, torch.float32)
            if not verdict.ok:
                yield f"{parallelise.__name__}, {backend}, {name}: {verdict}"
