"""FSDP2 training of an accelerated model: torchrun --nproc-per-node 2 examples/fsdp2_training.py

The order: build, accelerate, shard. Sharding gives modules another class, so ditfast.accelerate refuses a model that
is sharded already. Runs on CPUs (gloo) as it does on GPUs (nccl), and without torchrun as one process.
"""

import copy
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from official_style import Model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import ditfast
from ditfast.parity import judge

STEPS, BATCH, TOKENS = 5, 8, 64


def sharded(model, mesh):
    """Each block gathered when its turn comes, in bf16; gradients are reduced in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def train(model, rank, ranks):
    """The losses over all ranks; every rank takes its rows of the same draws."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(model.parameters())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        x, noise = torch.randn(2, BATCH, TOKENS, 16, generator=generator)[:, rank::ranks].to(parameter)
        t = torch.randint(1000, (BATCH,), generator=generator)[rank::ranks].to(parameter.device)
        loss = F.mse_loss(model(x + noise, t).to(parameter.dtype), noise)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.detach().double())
    losses = torch.stack(losses)
    if ranks > 1:
        dist.all_reduce(losses)
    return losses / ranks


def main():
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    store = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **store)
    mesh = init_device_mesh(device, (ranks,))

    torch.manual_seed(0)  # the same weights on every rank
    model = Model().to(device)
    untouched, exact = copy.deepcopy(model), copy.deepcopy(model).double()

    report = ditfast.accelerate(model)  # before sharding
    results = [train(sharded(each, mesh), rank, ranks) for each in (model, untouched)]

    verdict = judge("model", *results, train(exact, 0, 1), torch.bfloat16)
    dist.destroy_process_group()
    if rank == 0:
        print(report)
        for name, losses in zip(("accelerated", "untouched"), results, strict=True):
            print(f"{name:>11} on {ranks}:", " ".join(f"{loss:.6f}" for loss in losses))
        print(f"from fp64 in one process: {verdict.error:.1e}, untouched {verdict.yardstick:.1e}")
        print(f"agreement: losses {'ok' if verdict.ok else 'FAILED'}")
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
