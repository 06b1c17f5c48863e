"""A request made ready: the model, its sampler and autoencoder, labels and batches, and how one batch is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import __version__
from ..checkpoint import read as checkpoint_files
from ..checkpoint.files import load_checkpoint
from ..environment import package_version
from ..inference.engine import Engine, NotFinite
from ..inference.guidance import Guidance
from ..inference.samplers import Sampler
from .decode import Decoder, autoencoder_files
from .folder import Rows, RunFolder
from .labels import choose, class_names
from .request import Request, parse_dtype
from .work import Batch, cut, digest, label_of, start

_OPTIONS = {  # Python's name -> the option's, where they differ
    "scale": "--cfg-scale",
    "channels": "--guided-channels",
    "interval": "--guidance-interval",
    "rescale": "--guidance-rescale",
    "power": "--guidance-power",
    "steps": "--steps",
    "table_mib": "--table-mib",
}
_LISTED = 100  # classes written out in the settings; of more, a hash


@dataclass
class Plan:
    """Everything that a process needs for its part of a run.

    Raises:
        ValueError: anything that does not fit, before an image is computed.
    """

    request: Request
    device: torch.device
    labels: list[int] = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        request.check()
        if request.threads is not None:
            torch.set_num_threads(request.threads)
        self.dtype = parse_dtype(request.dtype or ("bf16" if self.device.type == "cuda" else "fp32"), "--dtype")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.model = load_checkpoint(
            request.checkpoint,
            weights=request.weights,
            num_heads=request.num_heads,
            device=self.device,
            dtype=self.dtype,
        )
        config = self.model.config
        self.names = class_names(config.num_classes, request.checkpoint, request.class_file)
        self.classes = choose(request.classes, request.class_names, config.num_classes, self.names)
        num = request.num if request.num is not None or self.classes is None else len(self.classes)
        if num is None:
            raise ValueError("give --num, how many images, or --classes or --class-names, one image each")
        self.batches = cut(num, request.batch_size)
        self.labels = [label_of(image, request.seed, self.classes, config.num_classes) for image in range(num)]
        with _options_named():
            self.engine = self._engine()
        self.shape = (config.in_channels, *config.latent_hw)
        self.decoder: Decoder | None = None
        rows = Rows(self.shape, np.float32)
        if request.vae is not None and not request.latents:
            self.decoder = Decoder(
                request.vae,
                config.in_channels,
                scaling=request.latent_scaling,
                device=self.device,
                dtype=parse_dtype(request.vae_dtype, "--vae-dtype"),
                budget_mib=request.decode_mib,
            )
            height, width = (size * self.decoder.factor for size in config.latent_hw)
            rows = Rows((height, width, 3), np.uint8)
        npz = request.npz
        if request.latents and npz is None and request.out is not None:
            npz = request.out / "latents.npz"
        self.rows, self.npz = rows, npz

    def _engine(self) -> Engine:
        request, config = self.request, self.model.config
        try:
            self.sampler = Sampler(request.sampler, request.steps, in_channels=config.in_channels, device=self.device)
        except ImportError as error:
            raise ValueError(f"--sampler {request.sampler} cannot be had: {error}") from None
        guidance = None
        if request.cfg_scale != 1:
            if config.null_class is None:
                raise ValueError("--cfg-scale must be 1, no guidance: the checkpoint has no null class")
            guidance = Guidance(
                request.cfg_scale,
                request.guided_channels,
                interval=request.guidance_interval,
                rescale=request.guidance_rescale,
                power=request.guidance_power,
                span=self.sampler.span,
            )
            guidance.guided_channels(config.in_channels)
        return Engine(self.model, self.sampler, guidance, table_mib=request.table_mib, graphs=request.graphs)

    def folder(self, settings: dict[str, Any]) -> RunFolder:
        return RunFolder(self.request.out, self.npz, self.batches, self.rows, settings)

    def settings(self) -> dict[str, Any]:
        """Everything that the bytes depend on, under the options' names."""
        request = self.request
        on_gpu = self.device.type == "cuda"
        values: dict[str, Any] = {
            "ditfast": __version__,
            "torch": torch.__version__,
            "diffusers": package_version("diffusers"),
            "device": torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
            # convolutions on a CPU sum in another order with another number
            "threads": None if on_gpu else torch.get_num_threads(),
            "checkpoint": digest(checkpoint_files.read(request.checkpoint, request.weights).files),
            "result": "latents" if request.latents else "png" if request.npz is None else "npz",
            "dtype": str(self.dtype).removeprefix("torch."),
            "classes": _listed(self.classes),
            "num": len(self.labels),
        }
        names = ("sampler", "steps", "cfg_scale", "guided_channels", "guidance_interval", "guidance_rescale")
        others = ("guidance_power", "seed", "batch_size", "weights", "num_heads", "table_mib", "graphs")
        values |= {name.replace("_", "-"): getattr(request, name) for name in (*names, *others)}
        if self.decoder is not None and request.vae is not None:
            values["vae"] = digest(autoencoder_files(request.vae))
            values |= {
                name.replace("_", "-"): getattr(request, name) for name in ("vae_dtype", "latent_scaling", "decode_mib")
            }
        return values

    def compute(self, batch: Batch, on_step: Callable[[int], None]) -> npt.NDArray[Any]:
        """The batch's images, or latents.

        Raises:
            ValueError: something is not finite, or memory runs out, naming the images.
        """
        begin = start(batch, self.request.seed, self.classes, self.model.config.num_classes, self.shape)
        try:
            latents = self.engine(begin.noise.to(self.device), begin.labels, begin.generators, on_step)
            if self.decoder is None:
                return latents.float().cpu().numpy()
            return self.decoder(latents)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"memory ran out in {_images(batch)}: a smaller --batch-size, --table-mib or --decode-mib takes less"
            ) from None
        except NotFinite as error:
            image = batch.first + error.image
            reason = f"latents are not finite from step {error.step + 1} of {error.steps} on"
            raise ValueError(f"image {image}, class {self.caption(image)}: {reason}") from error
        except ValueError as error:
            raise ValueError(f"{_images(batch)}: {_by_option(error)}") from error

    def caption(self, image: int) -> str:
        label = self.labels[image]
        return f"{label} {self.names.name(label)}" if self.names is not None else str(label)

    def texts(self, batch: Batch) -> list[dict[str, str]]:
        """The metadata of each PNG."""
        images = range(batch.first, batch.first + batch.count)
        return [{"class": self.caption(i), "seed": str(self.request.seed), "image": str(i)} for i in images]


@contextmanager
def _options_named() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(_by_option(error)) from error


def _by_option(error: ValueError) -> str:
    """Its message, with the option in place of the argument that it begins with."""
    name, space, rest = str(error).partition(" ")
    return _OPTIONS.get(name, name) + space + rest


def _listed(classes: list[int] | None) -> Any:
    if classes is None or len(classes) <= _LISTED:
        return classes
    return {"count": len(classes), "sha256": hashlib.sha256(str(classes).encode()).hexdigest()}


def _images(batch: Batch) -> str:
    last = batch.first + batch.count - 1
    return f"image {batch.first}" if batch.count == 1 else f"images {batch.first} to {last}"
