"""ditfast.DiTPipeline beside diffusers' own: the same folder, the same call, the same images."""

import json
import warnings

import pytest
import torch

import ditfast
from ditfast.parity import judge
from ditfast.reference import ops

diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
from tests.adapters.diffusers_models import transformer  # noqa: E402

# where noise is drawn
MODULES = (
    "ditfast.inference.pipeline",
    "diffusers.pipelines.dit.pipeline_dit",
    "diffusers.schedulers.scheduling_ddpm",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random pipeline as diffusers writes it; its null class is 1000, whatever the model's."""
    root = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    model = transformer(num_embeds_ada_norm=1000, norm_eps=1e-5)
    with torch.no_grad():
        model.proj_out_2.weight.mul_(0.3)
    diffusers.DiTPipeline(model, vae.eval(), diffusers.DDIMScheduler()).save_pretrained(root)
    index = root / "model_index.json"
    names = {"id2label": {"1": "goldfish, Carassius auratus", "207": "golden retriever"}}
    index.write_text(json.dumps(json.loads(index.read_text()) | names))  # as the released folders have it
    return root


def run(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(4)  # for schedulers that draw noise
    options = {"num_inference_steps": 5, "output_type": "np", "generator": generator, **options}
    return torch.from_numpy(pipe([1, 207], **options).images)


def sinusoid(t, dim, downscale_freq_shift, **_):
    return ops.timestep_embedding(t.double(), dim, downscale_freq_shift, torch.float64)


# not Euler's and its kin, which scale the model's input: diffusers' DiTPipeline steps from the scaled one
@pytest.mark.parametrize("scheduler", [None, "DPMSolverMultistepScheduler", "DDPMScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_same_images(folder, scheduler, scale, monkeypatch):
    """Ours and the oracle in fp64: over a trajectory ours in fp32 has been past the bound on one CPU and within it on
    another; the engine in fp32 is judged in test_engine.py."""
    drawn = []
    draw = diffusers.utils.torch_utils.randn_tensor

    def recorded(*args, **options):
        """The first run's noise, for the others in their precision."""
        if run_of["number"] == 0:
            drawn.append(draw(*args, **options))
            return drawn[-1]
        value = drawn[run_of["draws"]]
        run_of["draws"] += 1
        return value.to(options["dtype"])

    run_of = {"number": 0, "draws": 0}
    ditfast_pipe = ditfast.DiTPipeline.from_pretrained(folder).to(torch.float64)
    diffusers_pipe = diffusers.DiTPipeline.from_pretrained(folder)
    pipes = [diffusers_pipe, ditfast_pipe, diffusers.DiTPipeline.from_pretrained(folder).to(torch.float64)]
    for module in MODULES:
        monkeypatch.setattr(f"{module}.randn_tensor", recorded)
    images = []
    for number, pipe in enumerate(pipes):
        run_of.update(number=number, draws=0)
        if number == 2:  # its own sinusoid is fp32 whatever the model
            monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", sinusoid)
        if scheduler is not None:
            pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
        images.append(run(pipe, guidance_scale=scale))
    verdict = judge("model", images[1], images[0], images[2], torch.float32)
    assert verdict.ok, verdict
    assert images[0].std() > 0.01


def test_the_same_seed_gives_the_same_noise(folder, monkeypatch):
    """Every draw of a run is bit-equal; the test above judges the images."""
    drawn, draw = [], diffusers.utils.torch_utils.randn_tensor

    def recorded(*args, **options):
        drawn[-1].append(draw(*args, **options))
        return drawn[-1][-1]

    pipes = [diffusers.DiTPipeline.from_pretrained(folder), ditfast.DiTPipeline.from_pretrained(folder)]
    for module in MODULES:
        monkeypatch.setattr(f"{module}.randn_tensor", recorded)
    for name, count in (("DDIMScheduler", 1), ("DDPMScheduler", 5)):
        for seeds in ([3], [5, 6]):  # one for all, or one an image
            drawn.clear()
            for pipe in pipes:
                pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
                drawn.append([])
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                run(pipe, generator=generators if len(generators) > 1 else generators[0])
            diffusers_draws, ditfast_draws = drawn
            assert len(diffusers_draws) == len(ditfast_draws) == count
            assert all(torch.equal(a, b) for a, b in zip(diffusers_draws, ditfast_draws, strict=True))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_euler_starts_from_its_own_noise(folder, scale):
    """Its steps are DDIM's in other variables; theirs starts, and steps, from x where Euler's variable is x / alpha."""
    pipe, images = ditfast.DiTPipeline.from_pretrained(folder).to(torch.float64), {}
    for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        settings = {"clip_sample": False} if name == "DDIMScheduler" else {"timestep_spacing": "leading"}
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
        images[name] = run(pipe, guidance_scale=scale)
    torch.testing.assert_close(images["EulerDiscreteScheduler"], images["DDIMScheduler"], rtol=1e-4, atol=1e-4)


def test_one_engine_with_a_table_in_every_call(folder, monkeypatch):
    pipe, rows = ditfast.DiTPipeline.from_pretrained(folder), []
    modulation = ditfast.DiT.modulation
    monkeypatch.setattr(ditfast.DiT, "modulation", lambda model, t, y: rows.append(len(t)) or modulation(model, t, y))
    first = run(pipe)
    torch.testing.assert_close(run(pipe), first)
    run(pipe, num_inference_steps=4)
    assert rows == [3 * 5, 3 * 5, 3 * 4]
    engine = pipe._engine  # whose captured graphs serve again
    run(pipe, guidance_scale=1.0)
    assert pipe._engine is engine and rows[3:] == [2 * 5]


def test_names_outputs_and_dtype(folder):
    pipe = ditfast.DiTPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert pipe.get_label_ids(["golden retriever", "Carassius auratus"]) == [207, 1]
    assert pipe.transformer.pos_embed.dtype == pipe.vae.dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 207], num_inference_steps=2).images
    assert [image.size for image in images] == [(16, 16)] * 2
    (tensor,) = pipe([1], num_inference_steps=2, output_type="pt", return_dict=False)
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.bfloat16
    assert tensor.min() >= 0 and tensor.max() <= 1


@pytest.mark.quick
def test_saved_and_read_by_both(folder, tmp_path, monkeypatch):
    pipe = ditfast.DiTPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "copy")
    reloaded = ditfast.DiTPipeline.from_pretrained(tmp_path / "copy")
    for part in ("transformer", "vae"):
        state = getattr(pipe, part).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in getattr(reloaded, part).state_dict().items())
    diffusers_pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "copy")
    exact = diffusers.DiTPipeline.from_pretrained(tmp_path / "copy").to(torch.float64)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for module in MODULES[:2]:
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, dtype, **__: noise.to(dtype))
    actual, expected = run(reloaded.to(torch.float64)), run(diffusers_pipe)  # in fp64 as above
    monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", sinusoid)
    verdict = judge("model", actual, expected, run(exact), torch.float32)
    assert verdict.ok, verdict
    assert diffusers_pipe.labels == pipe.labels


def test_bad_input(folder, tmp_path):
    with pytest.raises(ValueError, match="folder must be a diffusers pipeline's, with a model_index.json"):
        ditfast.DiTPipeline.from_pretrained(tmp_path)
    diffusers_pipe = diffusers.DiTPipeline.from_pretrained(folder)
    with pytest.raises(TypeError, match="transformer must be a ditfast.DiT, got DiTTransformer2DModel"):
        ditfast.DiTPipeline(diffusers_pipe.transformer, diffusers_pipe.vae, diffusers_pipe.scheduler)
    pipe = ditfast.DiTPipeline.from_pretrained(folder)
    pipe.scheduler = diffusers.TCDScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="scheduler must be one of .*DDIM.*, got TCDScheduler: it is for models dist"):
        pipe([1], num_inference_steps=2)
    with pytest.raises(ValueError, match=r"labels must be in 0..999, got 1000"):
        ditfast.DiTPipeline.from_pretrained(folder)([1000], num_inference_steps=2)


def test_a_scheduler_that_clips_is_warned_of(folder):
    pipe = ditfast.DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="DDIMScheduler clips the latents.*clip_sample=False") as warned:
        pipe([1], num_inference_steps=1, output_type="np")
    assert [each.filename for each in warned if "clips" in str(each.message)] == [__file__]
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*clips the latents")
        pipe([1], num_inference_steps=1, output_type="np")
