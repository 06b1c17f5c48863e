"""Sampling without a download: python examples/sample_tiny.py

Makes a tiny random checkpoint and a tiny random autoencoder, and runs ``ditfast sample`` on them; then the same
images come from Python. They show random textures, of one kind a class; a real checkpoint and a real autoencoder
give pictures. Needs the package diffusers.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import ditfast
from ditfast.inference.engine import Engine
from ditfast.inference.guidance import Guidance
from ditfast.inference.samplers import Sampler
from ditfast.sampling.decode import Decoder
from ditfast.sampling.output import load_png
from ditfast.sampling.work import Batch, start
from ditfast.testing.inputs import randomize_

CLASSES, IMAGES, STEPS = {"golden retriever": 207, "otter": 360, "geyser": 974, "macaw": 88}, 16, 20


def make_checkpoint(path):
    """A random DiT with ImageNet's thousand classes; a fresh adaLN-Zero would output zero."""
    config = ditfast.DiTConfig(depth=2, hidden_size=96, num_heads=4, latent_size=8)
    ditfast.save_checkpoint(randomize_(ditfast.DiT(config)), path)


def make_autoencoder(folder):
    """A random autoencoder in the form of Stable Diffusion's: a latent of 8x8 is an image of 64x64."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        sample_size=64,
    )
    vae.save_pretrained(folder)


def by_command(checkpoint, vae, out):
    command = ["-m", "ditfast", "sample", "--checkpoint", str(checkpoint), "--vae", str(vae), "--out", str(out)]
    command += ["--class-names", ", ".join(CLASSES), "--num", str(IMAGES), "--steps", str(STEPS)]
    print("python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def by_hand(checkpoint, vae):
    """(N, H, W, 3) uint8."""
    model = ditfast.load_checkpoint(checkpoint)
    labels = list(CLASSES.values())
    engine = Engine(model, Sampler("ddpm", STEPS), Guidance(4.0))
    begin = start(Batch(0, 0, IMAGES), seed=0, classes=labels, num_classes=1000, shape=(4, 8, 8))
    return Decoder(vae, channels=4)(engine(begin.noise, begin.labels, begin.generators))


def main():
    parser = argparse.ArgumentParser(description="Samples a tiny random DiT.")
    parser.add_argument("--out", type=Path, help="a folder; by default a new temporary one")
    folder = parser.parse_args().out or Path(tempfile.mkdtemp(prefix="ditfast-sample-"))
    checkpoint, vae, out = folder / "tiny.safetensors", folder / "vae", folder / "images"
    folder.mkdir(parents=True, exist_ok=True)
    make_checkpoint(checkpoint)
    make_autoencoder(vae)

    by_command(checkpoint, vae, out)
    images = by_hand(checkpoint, vae)
    # by one level of 255 where another number of threads sums in another order
    pairs = [(image.astype(int), load_png(out / f"{i:06d}.png").astype(int)) for i, image in enumerate(images)]
    agree = all(np.abs(ours - theirs).max() <= 1 for ours, theirs in pairs)
    print(f"agreement: {IMAGES} images by the command and from Python {'ok' if agree else 'FAILED'}")
    print(f"the grid: {out / 'grid.png'}")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
