"""Two processes of test_distributed.py: ``python distributed_worker.py CASE...``.

Forked from one interpreter, so that torch is imported once. A process prints each case that it has passed, and exits
with an error where a check of one fails.
"""

import copy
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ditfast
from ditfast.parity import judge
from tests.adapters.foreign_models import SMALL, Model, inputs, randomised

RANKS = 2


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(model, rank=None, steps=3, size=(8, 8)):
    """Losses over all ranks, the last gradients and the parameters of training; rank None trains on the whole batch."""
    rows = slice(rank, None, RANKS if rank is not None else None)
    x, t, y = (value[rows] for value in inputs(4, size=size))
    dtype = next(model.parameters()).dtype
    target = torch.randn(4, 8, *size, generator=torch.Generator().manual_seed(5))[rows].to(dtype)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses, tensors = [], {}
    for _ in range(steps):
        loss = F.mse_loss(model(x.to(dtype), t, y).to(dtype), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        mean = loss.detach().double()
        if rank is not None:
            dist.all_reduce(mean)
            mean /= RANKS
        losses.append(mean)
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
        tensors[f"gradient of {name}"] = full(parameter.grad)
        tensors[f"trained {name}"] = full(parameter.detach())
    return {"losses": torch.stack(losses), **tensors}


def compared(wrap, rank, dtype, backend="auto", **options):
    """Trains the accelerated and the untouched model, both wrapped, beside fp64 in one process."""
    slow = randomised(Model(dim=96))
    oracle = copy.deepcopy(slow).double()
    fast = copy.deepcopy(slow)
    assert len(ditfast.accelerate(fast, check=False).accelerated) == 7
    with ditfast.ops.use_backend(backend):
        actual = trained(wrap(fast), rank, **options)
    yardstick, exact = trained(wrap(slow), rank, **options), trained(oracle, **options)
    assert actual.keys() == yardstick.keys() == exact.keys()
    for name in exact:
        verdict = judge("model", actual[name], yardstick[name], exact[name], dtype)
        assert verdict.ok, (name, verdict)
    return fast


def ddp(rank):
    compared(DistributedDataParallel, rank, torch.float32)


def sharded(policy):
    def wrap(model):
        mesh = init_device_mesh("cpu", (RANKS,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    return wrap


def fsdp2(rank):
    fast = compared(sharded(MixedPrecisionPolicy()), rank, torch.float32)
    assert isinstance(fast.blocks[0].attn.qkv.weight, DTensor)


def fsdp2_bf16(rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    compared(sharded(policy), rank, torch.bfloat16)


def fsdp2_checkpointed(rank):
    shard = sharded(MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))

    def wrap(model):
        model.blocks = nn.ModuleList(map(checkpoint_wrapper, model.blocks))
        return shard(model)

    compared(wrap, rank, torch.bfloat16)


def refused_after_sharding(rank):
    """accelerate and restore name the order, and leave the model as it was."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for accelerated, order in ((False, "ditfast.accelerate before fully_shard"),
                               (True, "ditfast.restore before fully_shard")):  # fmt: skip
        for whole in (True, False):
            model = randomised(Model())
            if accelerated:
                ditfast.accelerate(model, check=False)
            fully_shard(model.blocks[1], mesh=mesh)
            if whole:
                fully_shard(model, mesh=mesh)
            types = [type(part) for part in model.modules()]
            for call in (ditfast.accelerate, ditfast.restore) if accelerated else (ditfast.accelerate,):
                try:
                    call(model)
                except ValueError as error:
                    message = order if call is ditfast.restore else "call ditfast.accelerate before fully_shard"
                    assert message in str(error), error
                else:
                    raise AssertionError("not refused")
            assert [type(part) for part in model.modules()] == types
    model = randomised(Model())
    distribute_module(model.blocks[0], mesh)
    try:
        ditfast.accelerate(model)
    except ValueError as error:
        assert "is a DTensor): call ditfast.accelerate before sharding" in str(error), error
    else:
        raise AssertionError("not refused")


def tensor_parallel(rank):
    """A parallelised MLP's weights are no plain tensors: it runs its own forward within the fused block."""
    slow = randomised(Model(dim=96))
    fast, oracle = copy.deepcopy(slow), copy.deepcopy(slow).double()
    ditfast.accelerate(fast, check=False)
    mesh = init_device_mesh("cpu", (RANKS,))
    plan = {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
    for model in (fast, slow):
        for block in model.blocks:
            parallelize_module(block, mesh, plan)
    x, t, y = inputs(4)
    results = []
    for model in (fast, slow, oracle):
        out = model(x.to(model.x_embedder.weight.dtype), t, y)
        out.square().mean().backward()
        gradients = {name: full(p.grad) for name, p in model.named_parameters()}
        results.append({"output": out.detach(), **gradients})
    for name, exact in results[2].items():
        verdict = judge("model", results[0][name], results[1][name], exact, torch.float32)
        assert verdict.ok, (name, verdict)


def fsdp2_kernels(rank):
    compared(sharded(MixedPrecisionPolicy()), rank, torch.float32, "triton", steps=1, size=SMALL)


def run(rank, cases, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    for case in cases:
        globals()[case](rank)
        print(f"rank {rank} passed {case}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(run, (sys.argv[1:], folder), RANKS, start_method="fork")
