"""diffusers' ``DiTPipeline`` around :class:`ditfast.DiT`: the same call and the same images, by the engine."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..checkpoint.files import load_checkpoint, save_checkpoint
from ..model.dit import DiT
from .engine import Engine
from .guidance import Guidance
from .schedulers import check_scheduler, clips

_Base: Any = diffusers.DiTPipeline  # its types are stubs that lack what it inherits


class DiTPipeline(_Base):  # type: ignore[misc]
    """diffusers' pipeline with another model in it: schedule table, CUDA graphs, one label embedding.

    Everything around the transformer is diffusers': ``pipe.scheduler``, ``pipe.to(device)``, ``pipe.labels``,
    ``pipe.get_label_ids``. The solver computes in fp32 whatever the model's dtype.

    ``pipe.scheduler`` may be any of diffusers' that goes from noise to data by the model's output alone, of the kind
    that its config says (noise, data, v; a velocity for the FlowMatch schedulers, EDM's F for the EDM ones); others are
    refused in the call. The noise is scaled by ``init_noise_sigma``, which diffusers' DiTPipeline leaves out: with
    those where it is not 1 (Euler, Heun, LMS, KDPM2, EDM) its images are wrong, and ours are not the same.
    A scheduler that ``from_config`` made from one of another kind is refused where its config tells; a config of
    defaults does not. Some clip to +-1 by default, which is for pixels and too narrow for latents: the call warns, give
    them ``clip_sample=False, thresholding=False``.

    Args:
        transformer: a :class:`ditfast.DiT` with a null class.
        vae, scheduler, id2label: as in diffusers.
        table_mib, graphs: as in :class:`ditfast.inference.Engine`.
    """

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        id2label: dict[int, str] | None = None,
        *,
        table_mib: float = 2048,
        graphs: bool = True,
    ) -> None:
        if not isinstance(transformer, DiT):
            kind = type(transformer).__name__
            raise TypeError(f"transformer must be a ditfast.DiT, got {kind}; diffusers' DiTPipeline takes its own")
        super().__init__(transformer, vae, scheduler, id2label)
        self._id2label = id2label
        self._settings: dict[str, Any] = {"table_mib": table_mib, "graphs": graphs}
        self._engine: Engine | None = None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, torch_dtype: torch.dtype | None = None, **options: Any
    ) -> DiTPipeline:
        """A pipeline from a local folder of diffusers' ``DiTPipeline``.

        Args:
            folder: holds model_index.json, transformer, vae and scheduler.
            torch_dtype: of the transformer and the autoencoder; by default their files' own.
            options: as in the class.

        Raises:
            ValueError: the folder is no such pipeline's; as :func:`ditfast.load_checkpoint`.
        """
        root = Path(folder)
        index = root / "model_index.json"
        if not index.is_file():
            raise ValueError(f"folder must be a diffusers pipeline's, with a model_index.json, got {root}")
        values = DiffusionPipeline.load_config(str(root), local_files_only=True)
        scheduler = getattr(diffusers, str(values["scheduler"][1]))
        labels = values.get("id2label")
        dtype = {} if torch_dtype is None else {"torch_dtype": torch_dtype}
        return cls(
            load_checkpoint(root / "transformer", dtype=torch_dtype),
            AutoencoderKL.from_pretrained(str(root / "vae"), local_files_only=True, **dtype).eval(),
            scheduler.from_pretrained(str(root / "scheduler"), local_files_only=True),
            None if labels is None else {int(key): value for key, value in labels.items()},
            **options,
        )

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes a folder for :meth:`from_pretrained`, which diffusers' own pipeline reads as well.

        Raises:
            ValueError: diffusers' DiT cannot express the model; as :func:`ditfast.save_checkpoint`.
        """
        root = Path(save_directory)
        root.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.transformer, root / "transformer", to="diffusers")
        self.vae.save_pretrained(root / "vae", **options)
        self.scheduler.save_pretrained(root / "scheduler")
        values = {
            "_class_name": "DiTPipeline",
            "_diffusers_version": diffusers.__version__,
            "id2label": self._id2label,
            "scheduler": ["diffusers", type(self.scheduler).__name__],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", type(self.vae).__name__],
        }
        (root / "model_index.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' ``DiTPipeline.__call__``, which guides all latent channels.

        Raises:
            ValueError: a scheduler that is not taken, with the reason and those that are; as
                :class:`ditfast.inference.Engine`.
        """
        model: DiT = self.transformer
        config, device = model.config, self._execution_device
        check_scheduler(self.scheduler)
        if clips(self.scheduler):
            warnings.warn(
                f"{type(self.scheduler).__name__} clips the latents, images come out wrong: "
                "give it clip_sample=False, thresholding=False",
                UserWarning,
                stacklevel=3,  # the caller's line, past no_grad
            )
        shape = (len(class_labels), config.in_channels, *config.latent_hw)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=model.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        guidance = Guidance(guidance_scale, channels="all") if guidance_scale > 1 else None
        engine = self._engine_for(_SchedulerSteps(self.scheduler, guidance is not None), guidance)
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            latents = engine(noise.float(), list(class_labels), on_step=lambda _: bar.update())
        images = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _engine_for(self, sampler: _SchedulerSteps, guidance: Guidance | None) -> Engine:
        """The engine of earlier calls, whose graphs may serve again."""
        if self._engine is None or self._engine.model is not self.transformer:
            self._engine = Engine(self.transformer, sampler, guidance, **self._settings)
        self._engine.sampler, self._engine.guidance = sampler, guidance
        return self._engine


class _SchedulerSteps:
    """A diffusers scheduler as the engine's sampler, stepped as diffusers' DiTPipeline does.

    With guidance diffusers steps both halves of the batch, and both draw noise. So does this class: the same seed gives
    the same images. They differ where a scheduler scales the noise or the model's input (Euler and its kin): diffusers
    leaves the noise unscaled, and steps from the scaled latents, for which these schedulers are not made.

    Raises:
        ValueError: as :func:`.schedulers.check_scheduler`.
    """

    def __init__(self, scheduler: Any, twice: bool) -> None:
        check_scheduler(scheduler)
        self._scheduler, self._twice = scheduler, twice
        self.timesteps: Tensor = scheduler.timesteps

    def start(self, noise: Tensor) -> Tensor:
        return noise * float(getattr(self._scheduler, "init_noise_sigma", 1.0))  # flow matching has none

    def model_input(self, x: Tensor, i: int) -> Tensor:
        if not hasattr(self._scheduler, "scale_model_input"):  # flow matching does not scale
            return x
        scaled: Tensor = self._scheduler.scale_model_input(x, self.timesteps[i])
        return scaled

    def step(self, x: Tensor, output: Tensor, i: int, generators: Any = None) -> Tensor:
        count = len(x)
        output = output[:, : x.shape[1]]  # diffusers drops the learned variance here
        if self._twice:
            x, output = torch.cat([x, x]), torch.cat([output, output])
        stepped: Tensor = self._scheduler.step(output, self.timesteps[i], x).prev_sample
        return stepped[:count]
