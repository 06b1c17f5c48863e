"""``ditfast sample``: images from a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

_INTERRUPTED, _REFUSED = 130, 2


def sample(
    checkpoint: Annotated[
        Path, typer.Option(help="A .pt or .safetensors file, or a folder of diffusers or accelerate.", metavar="PATH")
    ],
    vae: Annotated[
        Path | None,
        typer.Option(help="Folder of the autoencoder (diffusers' AutoencoderKL).", show_default=False, metavar="PATH"),
    ] = None,
    latents: Annotated[
        bool, typer.Option("--latents", help="Keep latents (fp32, NCHW) instead of images; needs no autoencoder.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for PNGs, and a labelled grid of up to 64.", show_default=False, metavar="DIR"),
    ] = None,
    npz: Annotated[
        Path | None,
        typer.Option(
            help="One file instead: arr_0 uint8 NHWC, arr_1 labels, for the ADM evaluation suite.",
            show_default=False,
            metavar="FILE",
        ),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Labels, separated by commas: 207,360.", show_default=False, metavar="LABELS")
    ] = None,
    class_names: Annotated[
        list[str] | None,
        typer.Option(help='Names, such as "golden retriever"; may be repeated.', show_default=False, metavar="NAME"),
    ] = None,
    class_file: Annotated[
        Path | None,
        typer.Option(help="The classes' names, one a line; else ImageNet's.", show_default=False, metavar="FILE"),
    ] = None,
    num: Annotated[
        int | None,
        # torchrun of Python 3.10 and 3.11 takes --num for its own --numa-binding, wherever it stands
        typer.Option(
            "--num",
            "--num-images",
            help="How many images, of the classes in turn or of random ones; by default one a class.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 250,
    sampler: Annotated[
        Literal["ddpm", "ddim", "dpm++", "euler", "heun"], typer.Option(help="euler and heun are for flow matching.")
    ] = "ddpm",
    cfg_scale: Annotated[float, typer.Option(help="Strength of the guidance; 1 for none.")] = 4.0,
    guided_channels: Annotated[
        str, typer.Option(help='How many channels are guided: 3 as officially, or "all".', metavar="N|all")
    ] = "3",
    guidance_interval: Annotated[
        str | None,
        typer.Option(help="Guide only at times between: 100,700.", show_default=False, metavar="LOW,HIGH"),
    ] = None,
    guidance_rescale: Annotated[float, typer.Option(help="0 to 1: keep the conditional's standard deviation.")] = 0.0,
    guidance_power: Annotated[
        float | None, typer.Option(help="Power-cosine schedule of the strength.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i has a random stream of its own, made of the seed and i.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images computed together; the bytes depend on it.")] = 32,
    weights: Annotated[
        str,
        typer.Option(help="Which of several: ema, model, or an entry's name; auto prefers an average.", metavar="NAME"),
    ] = "auto",
    num_heads: Annotated[
        int | None, typer.Option(help="Attention heads, where the file does not tell them.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. By default cuda where there is one.", show_default=False)
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Dtype of the model. By default bf16 on a GPU, fp32 on a CPU.", show_default=False),
    ] = None,
    vae_dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Dtype of the autoencoder.")] = "fp32",
    latent_scaling: Annotated[
        float, typer.Option(help="What the latents were multiplied by in the checkpoint's training.")
    ] = 0.18215,
    decode_mib: Annotated[float, typer.Option(help="Memory for decoding: how many images go at once.")] = 4096,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; the bytes depend on it. By default torch's.", show_default=False)
    ] = None,
    table_mib: Annotated[float, typer.Option(help="Memory for the schedule table; 0 for none.")] = 2048,
    graphs: Annotated[bool, typer.Option(" /--no-graphs", help="Without CUDA graphs.", show_default=False)] = True,
) -> None:
    """Sample images of a class-conditional checkpoint, as PNGs with a grid or as one npz.

    What is finished is kept: after an interruption the same command goes on, and the bytes are those of a run that
    was never interrupted. "torchrun --nproc-per-node N -m ditfast sample ..." shares the work between N processes
    (there --num must be written --num-images).
    """
    from ..console import terminated_as_interrupted
    from ..sampling.processes import OtherFailed
    from ..sampling.request import Request
    from ..sampling.run import Interrupted
    from ..sampling.run import sample as run

    request = Request(
        checkpoint=checkpoint,
        vae=vae,
        latents=latents,
        out=out,
        npz=npz,
        classes=classes,
        class_names=tuple(class_names or ()),
        class_file=class_file,
        num=num,
        steps=steps,
        sampler=sampler,
        cfg_scale=cfg_scale,
        guided_channels=_channels(guided_channels),
        guidance_interval=_interval(guidance_interval),
        guidance_rescale=guidance_rescale,
        guidance_power=guidance_power,
        seed=seed,
        batch_size=batch_size,
        weights=weights,
        num_heads=num_heads,
        device=device,
        dtype=dtype,
        vae_dtype=vae_dtype,
        latent_scaling=latent_scaling,
        decode_mib=decode_mib,
        threads=threads,
        table_mib=table_mib,
        graphs=graphs,
    )
    try:
        with terminated_as_interrupted():
            outcome = run(request)
    except (Interrupted, KeyboardInterrupt) as error:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(str(error) or "interrupted before anything was sampled", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    except OtherFailed:
        raise typer.Exit(_REFUSED) from None
    if outcome is None:
        return
    if outcome.images:
        rate = outcome.images / max(outcome.seconds, 1e-9)
        typer.echo(f"{outcome.images} images in {outcome.seconds:.1f} s, {rate:.3g} images/s", err=True)
    else:
        typer.echo("complete already", err=True)
    typer.echo(str(outcome.path))


def _channels(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f'--guided-channels must be "all" or a number of channels, got {text!r}')
    return int(text)


def _interval(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"--guidance-interval must be two times between a comma, LOW,HIGH, got {text!r}") from None
    return low, high
