"""diffusers' DiT as a whole: weights that change between calls, its copies and folders, its pipeline."""

import copy
import json
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import ditfast
from ditfast.adapters.swap import accelerated_by
from ditfast.parity import judge
from tests.adapters.conftest import assert_same

diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
from diffusers.training_utils import EMAModel  # noqa: E402

from tests.adapters.diffusers_models import (  # noqa: E402
    ALL,
    assert_parity,
    assert_same_in_inference,
    pair,
    run,
    transformer,
)


def nudge(parameter):
    with torch.no_grad():
        parameter[0] += 1


def write_through_data(model):
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter) / 10)


def average(model):
    average = EMAModel(transformer(same=False).parameters(), foreach=False)
    average.copy_to(model.parameters())


def step(model):
    embedder = model.transformer_blocks[1].norm1.emb
    for parameter in embedder.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(embedder.parameters(), lr=1e-2, fused=True).step()


def other_embedder():
    return transformer(same=False).transformer_blocks[2].norm1.emb


def of_a_block(path, change):
    return lambda model: change(model.transformer_blocks[1].norm1.emb.get_submodule(path))


@pytest.mark.parametrize(
    "change",
    [
        of_a_block("timestep_embedder.linear_1", lambda linear: nudge(linear.weight)),
        of_a_block("class_embedder.embedding_table", lambda table: nudge(table.weight)),
        of_a_block("class_embedder.embedding_table", lambda table: table.weight.data.mul_(2)),
        of_a_block("class_embedder", lambda labels: setattr(labels, "embedding_table", nn.Embedding(11, 72))),
        of_a_block("timestep_embedder", lambda mlp: setattr(mlp, "act", nn.GELU())),
        of_a_block("time_proj", lambda sinusoid: setattr(sinusoid, "downscale_freq_shift", 0)),
        lambda model: setattr(model.transformer_blocks[1].norm1, "emb", other_embedder()),
        lambda model: model.load_state_dict(transformer(same=False).state_dict()),
        lambda model: model.load_state_dict(transformer(same=False).state_dict(), assign=True),
        write_through_data,
        average,
        step,
    ],
)
def test_embedders_that_change_between_calls(change):
    """Every block calls its own embedder with its current weights."""
    fast, slow = pair()
    ditfast.accelerate(fast, check=False)
    assert_same_in_inference(fast, slow)
    with torch.no_grad():
        before = run(fast)
    for model in (fast, slow):
        torch.manual_seed(0)
        change(model)
    assert_same_in_inference(fast, slow)
    with torch.no_grad():
        assert not torch.allclose(run(fast), before)


def test_copies_pickles_and_folders(tmp_path):
    fast, slow = pair()
    ditfast.accelerate(fast)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert [type(part) for part in copied.modules()] == [type(part) for part in fast.modules()]
        assert_same_in_inference(copied, slow)
    fast.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "DiTTransformer2DModel"
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.DiTTransformer2DModel and not any(map(accelerated_by, loaded.modules()))
    assert all(loaded.config[key] == value for key, value in slow.config.items() if not key.startswith("_"))
    with torch.no_grad():
        assert_same(run(loaded), run(slow))
    assert len(ditfast.accelerate(loaded).accelerated) == ALL
    rebuilt = type(fast).from_config(fast.config)  # as EMAModel makes one
    rebuilt.load_state_dict(fast.state_dict())
    assert_same_in_inference(rebuilt.eval(), slow)


def test_gradient_checkpointing():
    fast, slow = pair()
    ditfast.accelerate(fast, check=False)
    fast.enable_gradient_checkpointing()
    for training in (False, True):
        fast.train(training), slow.train(training)
        assert_parity(fast, slow)
    fast.disable_gradient_checkpointing()
    slow.enable_gradient_checkpointing()
    assert_parity(fast, slow)
    assert len(ditfast.accelerate(slow).accelerated) == ALL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype):
    fast, slow = pair()
    ditfast.accelerate(fast, check=False)
    with torch.no_grad():
        exact = run(copy.deepcopy(slow).double())
        with torch.autocast("cpu", dtype):
            outputs = [run(model) for model in (fast, slow)]
        assert judge("model", *outputs, exact, dtype).ok and outputs[0].dtype == outputs[1].dtype
        fast.to(dtype), slow.to(dtype)
        exact = run(copy.deepcopy(slow).double())
        outputs = [run(model) for model in (fast, slow)]
        assert judge("model", *outputs, exact, dtype).ok and outputs[0].dtype == dtype
    assert len(ditfast.accelerate(copy.deepcopy(slow)).accelerated) == ALL  # checked in this precision


@pytest.mark.compiler
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_whole(backend):
    fast, slow = pair(num_layers=2)
    ditfast.accelerate(fast, check=False)
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    # Inductor's exp is off by an ulp, which late timesteps multiply
    early = torch.tensor([0, 1, 2])
    assert_same_in_inference(compiled, slow, timestep=early)
    # and its own order of sums moves gradients of few elements more than the rule allows
    assert_parity(compiled, slow, joined=True, timestep=early)


def test_nothing_to_accelerate():
    model = transformer(norm_elementwise_affine=True, activation_fn="gelu")
    with pytest.raises(ValueError, match="has nothing that ditfast can accelerate"):
        ditfast.accelerate(model)


def pipeline(model, scheduler):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()
    pipe = diffusers.DiTPipeline(model, vae, scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_pipeline_is_the_same_around_it(scheduler, guidance, monkeypatch, tmp_path):
    # the pipeline's null class is 1000, whatever the model's
    fast, slow = pair(num_embeds_ada_norm=1000)
    report = ditfast.accelerate(fast, check=False)
    assert len(report.accelerated) == ALL

    def images(model):
        pipe = pipeline(model, scheduler).to(model.dtype)
        # the same noise in every precision
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **k: noise.to(k["dtype"]))
        out = pipe([1, 207], guidance_scale=guidance, num_inference_steps=4, output_type="np")
        return torch.from_numpy(out.images)

    exact = images(copy.deepcopy(slow).double())
    verdict = judge("model", images(fast), images(slow), exact, torch.float32)
    assert exact.std() > 0.01 and verdict.ok, verdict
    pipe = pipeline(fast, scheduler)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is diffusers.DiTTransformer2DModel


def test_the_example(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "diffusers_pipeline.py"), run_name="__main__")
    assert "8 accelerated, 0 skipped" in (out := capsys.readouterr().out) and out.endswith("agreement: images ok\n")
