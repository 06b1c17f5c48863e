"""``ditfast evaluate``, and the Inception network that it takes from a local file."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as inception_source
from typer.testing import CliRunner, Result

from ditfast.cli.command import app
from ditfast.evaluation import Evaluation, evaluate, inception
from tests.evaluation.conftest import Runs, close, damaged, distance, images, moments, saved, two_files

FILE = "weights-inception-2015-12-05-6726825d.pth"


@pytest.fixture
def pair(tmp_path: Path) -> Any:
    return two_files(tmp_path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like torch-fidelity's, random."""
    path = tmp_path_factory.mktemp("weights") / FILE
    with pytest.MonkeyPatch.context() as patch:
        # torch-fidelity's network exists with weights only
        patch.setattr(inception_source, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception_source.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = inception_source.FeatureExtractorInceptionV3("random", ["2048"])
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.1, 0.2)  # keeps the signal's size through 94 layers
        elif name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.1)
    torch.save(network.state_dict(), path)
    return path


def test_spatial_features_are_the_first_seven_channels_of_mixed_6d(weights: Path) -> None:
    network, notes = inception.load(["2048", "logits_unbiased", "spatial"], weights)
    assert len(notes) == 1 and "not torch-fidelity's file" in notes[0]
    original = inception_source.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(weights))
    x = torch.randint(0, 256, (2, 3, 40, 32), dtype=torch.uint8)
    pool, logits, spatial = network(x)
    torch.testing.assert_close((pool, logits), original(x))
    assert pool.shape == (2, 2048) and logits.shape == (2, 1008) and spatial.shape == (2, 2023)
    y = inception_source.interpolate_bilinear_2d_like_tensorflow1x(x.float(), (299, 299), align_corners=False)
    y = (y - 128) / 128
    for name, module in original.named_children():
        if name == "Mixed_6d":
            break
        y = module(y)
    for module in (original.Mixed_6d.branch1x1.conv, original.Mixed_6d.branch1x1.bn):
        y = module(y)
    expected = y.relu()[:, :7]
    assert expected.std() > 0.01
    for row, column, channel in ((0, 0, 0), (3, 5, 2), (16, 16, 6)):
        torch.testing.assert_close(spatial[:, (row * 17 + column) * 7 + channel], expected[:, channel, row, column])
    # for sFID alone it stops early
    (alone,) = inception.load(["spatial"], weights)[0](x)
    torch.testing.assert_close(alone, spatial)


def test_the_inception_network_from_torch_hubs_folder(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / FILE).symlink_to(weights)
    samples, reference = (saved(tmp_path / f"{n}.npz", images(5, 16, 16, seed=n)) for n in (1, 2))
    # the eigenvalues of 2,048 features would take half a minute, and the small network's are tested
    monkeypatch.setattr(sys.modules["ditfast.evaluation.evaluate"], "frechet", lambda one, _: float(len(one["mu"])))
    result = evaluate(samples, reference, batch_size=3)
    assert list(result.metrics) == ["fid", "sfid", "is", "precision", "recall"]
    assert result.metrics["fid"] == 2048 and result.metrics["sfid"] == 2023
    # of hardly different outputs, over 1,008 classes
    assert 1 < result.metrics["is"] < 1008
    assert any(str(tmp_path / "hub" / "checkpoints" / FILE) in note for note in result.notes)


def test_the_name_of_the_file_is_torch_fidelitys() -> None:
    assert inception_source.URL_INCEPTION_V3.endswith(f"/{FILE}")


def test_missing_weights_say_what_is_missing_and_where_it_belongs(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something is downloaded")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    line = _refused("--npz", pair[0], "--reference", pair[1])
    for text in (FILE, str(tmp_path / "hub" / "checkpoints"), inception_source.URL_INCEPTION_V3, "--weights"):
        assert text in line
    assert str(tmp_path / "mine.pth") in _refused(
        "--npz", pair[0], "--reference", pair[1], "--weights", tmp_path / "mine.pth"
    )


@pytest.mark.parametrize("content", ["rubbish", "pickle", "another", "empty"])
def test_weights_of_something_else(content: str, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / FILE
    if content in ("another", "pickle"):
        torch.save({"fc.weight": torch.zeros(3)} if content == "another" else Runs(), path)
    else:
        path.write_bytes(b"\x00" * 99 if content == "rubbish" else b"")
    with pytest.raises(ValueError, match="weights: .* is damaged or not torch-fidelity's Inception"):
        evaluate(pair[0], pair[1], weights=path)
    assert not (tmp_path / "made-by-a-pickle").exists()


def test_without_torch_fidelity(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "pip install 'ditfast[evaluate]'" in _refused("--npz", pair[0], "--reference", pair[1])
    assert "torch_fidelity is not installed" in _refused("--npz", pair[0], "--reference", pair[1])


def _ditfast(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def _refused(*arguments: object) -> str:
    result = _ditfast(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


_NETWORK = """
import torch
from torch_fidelity import FeatureExtractorBase

class Mean(FeatureExtractorBase):
    @staticmethod
    def get_provided_features_list():
        return "mean", "rows"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"fid": "mean", "prc": "mean", "isc": "mean", "sfid": "rows"}[metric]

    def forward(self, images):
        return images.double().mean((2, 3)), images.double().mean((1, 3))

def make():
    return Mean("mean", ["mean", "rows"])
"""


@pytest.mark.quick
def test_the_command(pair: Any, tmp_path: Path) -> None:
    network = tmp_path / "network.py"
    network.write_text(_NETWORK)
    arguments = ("--npz", pair[0], "--reference", pair[1], "--extractor", f"{network}:make", "--device", "cpu")
    result = _ditfast(*arguments, "--batch-size", 16)
    assert result.exit_code == 0, result.output
    results = json.loads(_ditfast(*arguments, "--json").stdout)
    assert results["samples"] == 50 and results["reference_images"] == 40
    assert Evaluation(**results).metrics.keys() == {"fid", "sfid", "is", "precision", "recall"}
    close(results["metrics"]["fid"], distance(*(moments(array.mean((1, 2))) for array in pair[2:])))
    for label, value in zip(("FID", "sFID", "Inception Score", "precision"), results["metrics"].values(), strict=False):
        assert any(label in line and f"{value:.4f}" in line for line in result.stdout.splitlines())
    assert "samples: 50 of 50" in result.stderr and "images/s" in result.stderr and "reference: 40" in result.stderr


@pytest.mark.quick
def test_the_command_names_missing_metrics(pair: Any, tmp_path: Path) -> None:
    network = tmp_path / "network.py"
    network.write_text(_NETWORK)
    mu, sigma = moments(pair[3].mean((1, 2)))
    statistics = saved(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    arguments = ("--npz", pair[0], "--reference", statistics, "--extractor", f"{network}:make")
    result = _ditfast(*arguments, "--metrics", "fid, sfid,recall")
    assert result.exit_code == 0, result.output
    assert "no sFID: the reference has neither mu_s and sigma_s nor images" in result.stdout
    assert "no recall: the reference holds statistics alone" in result.stdout
    assert "by the reference's statistics: FID" in result.stdout
    assert "metrics must be some of" in _refused(*arguments, "--metrics", "fid,kid")
    assert "npz must be an .npz file" in _refused("--npz", tmp_path / "none.npz", "--reference", statistics)
    assert "is damaged" in _refused("--npz", damaged(tmp_path / "bad.npz", "flipped"), *arguments[2:])
