"""SiT: DiT's blocks with a velocity and an ODE, trained and sampled accelerated: python examples/sit_style.py

A straight path x_t = (1 - t) x0 + t noise, t in [0, 1]; the model learns noise - x0, and Euler's steps go back from
noise. The untouched copy takes the same steps beside it.
"""

import copy

import torch
import torch.nn.functional as F
from official_style import Block, FinalLayer  # whatever a block is called, its names and roles count
from torch import nn

import ditfast
from ditfast.parity import judge

TOKENS, CHANNELS = 64, 16


class SiTBlock(Block):
    pass


class SiT(nn.Module):
    """Patches (B, T, C), times (B,) in [0, 1], labels (B,) -> velocities (B, T, C)."""

    def __init__(self, dim=192, depth=3, num_heads=3, classes=10):
        super().__init__()
        self.x_embedder, self.y_embedder = nn.Linear(CHANNELS, dim), nn.Embedding(classes, dim)
        self.t_embedder = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(SiTBlock(dim, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(dim, CHANNELS)

    def forward(self, x, t, y):
        x, c = self.x_embedder(x), self.t_embedder(t[:, None]) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def train(model, steps=5, batch=8):
    """The losses of a few steps, the same draws for every model."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        x0, noise = torch.randn(2, batch, TOKENS, CHANNELS, generator=generator).to(dtype)
        t, y = torch.rand(batch, generator=generator).to(dtype), torch.randint(10, (batch,), generator=generator)
        weight = t[:, None, None]
        loss = F.mse_loss(model((1 - weight) * x0 + weight * noise, t, y), noise - x0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@torch.no_grad()
def sample(model, labels, steps=8):
    dtype = next(model.parameters()).dtype
    x = torch.randn(len(labels), TOKENS, CHANNELS, generator=torch.Generator().manual_seed(1)).to(dtype)
    for step in range(steps, 0, -1):
        x = x - model(x, torch.full((len(labels),), step / steps, dtype=dtype), labels) / steps
    return x


def main():
    torch.manual_seed(0)
    model = SiT()
    untouched, exact = copy.deepcopy(model), copy.deepcopy(model).double()

    print(ditfast.accelerate(model))

    labels = torch.tensor([0, 3, 7])
    results = [(train(each), sample(each, labels)) for each in (model, untouched, exact)]
    losses, samples = (judge("model", *values, torch.float32) for values in zip(*results, strict=True))
    print("losses:", " ".join(f"{loss:.4f}" for loss in results[0][0]))
    print(f"samples, accelerated: {samples.error:.1e} from fp64; untouched: {samples.yardstick:.1e}")
    agree = losses.ok and samples.ok
    print(f"agreement: losses and samples {'ok' if agree else 'FAILED'}")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
