"""Metrics of samples: closed forms and brute force in fp64, files read as a stream, bad input."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ditfast.evaluation import evaluate
from ditfast.evaluation.metrics import frechet, inception_score, precision_recall
from ditfast.evaluation.npz import Npz
from tests.evaluation.conftest import (
    Corner,
    Returns,
    Runs,
    close,
    damaged,
    distance,
    images,
    moments,
    saved,
    two_files,
)


def neighbourhoods(generated, real, k=3):
    """Precision and recall from all pairwise distances, one at a time, in fp64."""

    def within(points, manifold):
        def norm(a, b):
            return float(np.sqrt(((a.astype(np.float64) - b) ** 2).sum()))

        radii = [sorted(norm(a, b) for b in manifold)[k] for a in manifold]  # the first is its own
        return sum(any(norm(p, o) <= r for o, r in zip(manifold, radii, strict=True)) for p in points) / len(points)

    return within(generated, real), within(real, generated)


@pytest.mark.quick
def test_the_frechet_distance_of_two_gaussians() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 8, 8))
    mu, nu = rng.standard_normal((2, 8))
    sigma, tau = a @ a.T, b @ b.T
    close(frechet({"mu": mu, "sigma": sigma}, {"mu": nu, "sigma": tau}), distance((mu, sigma), (nu, tau)))
    # where the covariances commute: |mu - nu|^2 + sum (sqrt a - sqrt b)^2
    d, e = rng.random((2, 8))
    actual = frechet({"mu": mu, "sigma": np.diag(d)}, {"mu": nu, "sigma": np.diag(e)})
    close(actual, ((mu - nu) ** 2).sum() + ((np.sqrt(d) - np.sqrt(e)) ** 2).sum())


@pytest.fixture
def pair(tmp_path: Path) -> Any:
    return two_files(tmp_path)


@pytest.mark.quick
def test_all_five_against_brute_force(pair: Any) -> None:
    npz, reference, generated, real = pair
    result = evaluate(npz, reference, extractor=Corner(), batch_size=7)
    assert list(result.metrics) == ["fid", "sfid", "is", "precision", "recall"] and not result.missing
    close(result.metrics["fid"], distance(moments(generated[:, 0, 0]), moments(real[:, 0, 0])))
    close(result.metrics["sfid"], distance(moments(generated[..., 0]), moments(real[..., 0])))
    logits = generated[:, 0, 0, :2] / 64.0
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    close(result.metrics["is"], np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    precision, recall = neighbourhoods(generated[:, 0, 0], real[:, 0, 0])
    assert 0 < precision < 1 and 0 < recall < 1
    # torch-fidelity averages yes and no in fp32
    assert result.metrics["precision"] == np.float32(precision)
    assert result.metrics["recall"] == np.float32(recall)
    assert (result.samples, result.reference_images, result.by_statistics) == (50, 40, [])


@pytest.mark.quick
def test_statistics_give_what_their_images_give(pair: Any, tmp_path: Path) -> None:
    npz, reference, _, real = pair
    (mu, sigma), (mu_s, sigma_s) = moments(real[:, 0, 0]), moments(real[..., 0])
    stored = {"mu": mu, "sigma": np.asfortranarray(sigma), "mu_s": mu_s, "sigma_s": sigma_s}
    from_images = evaluate(npz, reference, metrics=["fid", "sfid"], extractor=Corner())
    alone = evaluate(npz, saved(tmp_path / "alone.npz", **stored), extractor=Corner())
    for metric, value in from_images.metrics.items():
        close(alone.metrics[metric], value)
    assert list(alone.metrics) == ["fid", "sfid", "is"] and alone.by_statistics == ["fid", "sfid"]
    assert list(alone.missing) == ["precision", "recall"] and "statistics alone" in alone.missing["recall"]
    # as in ADM's references: statistics of a whole data set beside some of its images
    mixed = saved(tmp_path / "mixed.npz", real[:20], **stored)
    result = evaluate(npz, mixed, extractor=Corner())
    close(result.metrics["fid"], from_images.metrics["fid"])
    assert result.metrics["recall"] == evaluate(
        npz, saved(tmp_path / "some.npz", real[:20]), metrics=["recall"], extractor=Corner()
    ).metrics["recall"]
    # fp32 statistics are ADM's; without mu_s no sFID, and the reason
    part = saved(tmp_path / "part.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
    result = evaluate(npz, part, metrics=["fid", "sfid"], extractor=Corner())
    assert result.metrics["fid"] == pytest.approx(from_images.metrics["fid"], rel=torch.finfo(torch.float32).eps * 10)
    assert result.missing == {"sfid": "the reference has neither mu_s and sigma_s nor images"}


def test_the_inception_score_of_known_classifiers() -> None:
    close(inception_score(torch.zeros(30, 5)), 1.0)  # every image has the same prediction
    close(inception_score(99 * torch.eye(7).repeat(10, 1)), 7.0)  # sure of each of seven classes equally
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    close(inception_score(p.log().repeat(50, 1)), np.exp(0.9 * np.log(1.8) + 0.1 * np.log(0.2)))
    # parts of 5,000 in their order, as in ADM: each of these sees one class alone
    halves = 99 * torch.eye(2).repeat_interleave(5000, 0)
    close(inception_score(halves), 1.0)
    close(inception_score(halves[2500:7500]), 2.0)


@pytest.mark.parametrize("swapped", [False, True])
def test_precision_and_recall_of_points_on_a_line(swapped: bool) -> None:
    # the reference's third neighbours are 30, 20, 20 and 30 away: 60 lies on the border, 61 outside;
    # the samples' are 190 and more away, and reach all of the reference
    reference, samples = ([[x] for x in points] for points in ((0, 10, 20, 30), (35, 60, 61, 250)))
    generated, real = (torch.tensor(points) for points in ((reference, samples) if swapped else (samples, reference)))
    expected = {"precision": 1.0, "recall": 0.5} if swapped else {"precision": 0.5, "recall": 1.0}
    assert precision_recall(generated, real) == expected


@pytest.mark.quick
def test_precision_and_recall_against_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    generated, real = torch.randn(60, 5, dtype=torch.float64), torch.randn(45, 5, dtype=torch.float64) * 1.3
    expected = tuple(map(np.float32, neighbourhoods(generated.numpy(), real.numpy())))
    assert tuple(precision_recall(generated, real).values()) == expected
    monkeypatch.setattr("ditfast.evaluation.metrics._ROWS", 7)  # blocks that divide neither number
    assert tuple(precision_recall(generated, real).values()) == expected


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_is_read_as_a_stream(compressed: bool, tmp_path: Path) -> None:
    array = images(23)
    npz = Npz(saved(tmp_path / "samples.npz", array, compressed), "npz")
    assert npz.image_shape() == (23, 4, 3)
    for size in (1, 5, 23, 100):
        whole = torch.cat(list(npz.batches(size)))
        assert torch.equal(whole, torch.from_numpy(array).permute(0, 3, 1, 2))
    results = [evaluate(npz.path, npz.path, extractor=Corner(), batch_size=size) for size in (1, 5, 100)]
    assert results[0] == results[1] == results[2]


def test_a_large_file_is_never_in_memory(tmp_path: Path) -> None:
    path = saved(tmp_path / "samples.npz", np.zeros((512, 256, 256, 3), np.uint8))  # 100 MB
    tracemalloc.start()
    try:
        assert sum(len(batch) for batch in Npz(path, "npz").batches(8)) == 512
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_few_images_are_warned_of(tmp_path: Path) -> None:
    three = saved(tmp_path / "three.npz", images(3))
    result = evaluate(three, three, extractor=Corner())
    assert list(result.missing) == ["precision", "recall"] and "more than 3 images" in result.missing["precision"]
    assert [note for note in result.notes if "rank 2 at most" in note and note.startswith("fid: 3 samples")]
    assert [note for note in result.notes if "rank 2 at most" in note and note.startswith("sfid: 3 images of the ref")]
    assert any("published ones are of 50,000" in note for note in result.notes)


def test_the_inception_score_needs_no_reference(pair: Any) -> None:
    alone = evaluate(pair[0], metrics=["is"], extractor=Corner())
    assert alone.metrics == evaluate(pair[0], pair[1], metrics=["is"], extractor=Corner()).metrics
    with pytest.raises(ValueError, match="reference must be given for fid"):
        evaluate(pair[0], metrics=["is", "fid"], extractor=Corner())


def test_a_value_that_is_no_number_is_missing(pair: Any) -> None:
    # probabilities that underflow to zero
    result = evaluate(pair[0], metrics=["is"], extractor=Returns((1e4 * torch.eye(2)[:1].repeat(50, 1),)))
    assert not result.metrics and result.missing["is"] == "it came out as nan"


def test_features_that_an_extractor_lacks(pair: Any) -> None:
    class NoSpatial(Corner):
        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return {"fid": "corner", "prc": "corner", "isc": "classes"}[metric]

    result = evaluate(pair[0], pair[1], extractor=NoSpatial(["corner"]))
    assert list(result.metrics) == ["fid", "precision", "recall"]
    assert result.missing["sfid"] == "the extractor names no features for 'sfid'"
    assert result.missing["is"] == "the extractor does not return its features 'classes'"


def _longer_than_it_is(path: Path) -> Path:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 64, 64, 3)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(99))
    return path


_OBJECTS = np.array([Runs()], object)


@pytest.mark.parametrize("argument", ["npz", "reference"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "must be an .npz file, and there is none at"),
        (lambda path: path.parent, "must be an .npz file, and there is none at"),
        (lambda path: path.write_text("hello") and path, "must be an .npz file; .* is none"),
        (lambda path: damaged(path, "flipped"), "is damaged: Bad CRC-32"),
        (lambda path: damaged(path, "cut"), "must be an .npz file; .* is none, or is cut off"),
        (lambda path: damaged(path, "directory"), "is damaged"),
        (_longer_than_it_is, "is damaged: 'arr_0' has 99 bytes"),
        (lambda path: saved(path, images(9).astype(np.float32)), "must hold uint8 images .* got float32"),
        (lambda path: saved(path, images(9)[0]), r"must hold uint8 images .* got uint8 \(4, 3, 3\)"),
        (lambda path: saved(path, images(9)[..., :1]), r"must hold uint8 images .* got uint8 \(9, 4, 3, 1\)"),
        (lambda path: saved(path, images(0)), r"must hold uint8 images .* got uint8 \(0, 4, 3, 3\)"),
        (lambda path: saved(path, images(1)), "must hold at least 2 images, got 1"),
        (lambda path: saved(path, np.asfortranarray(images(9))), "must hold its images in C order"),
        (lambda path: saved(path, _OBJECTS), "is damaged: it holds Python objects"),
        (lambda path: saved(path, labels=np.zeros(3)), "must hold images under 'arr_0'"),
    ],
)
def test_a_file_that_cannot_serve(argument: str, make: Any, message: str, pair: Any, tmp_path: Path) -> None:
    files = {"npz": pair[0], "reference": pair[1], argument: make(tmp_path / "bad.npz")}
    with pytest.raises(ValueError, match=rf"^{argument} .*{message}"):
        evaluate(**files, extractor=Corner())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "must hold both 'mu' and 'sigma', got 'mu' alone"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"got \(3,\) and \(4, 4\)"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, r"got \(3, 1\) and \(3, 3\)"),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "must hold floating-point numbers under 'mu', got int64"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "must hold finite numbers under 'mu'"),
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, "must hold statistics of the network's 3 features 'corner', got 4"),
    ],
)
def test_statistics_that_cannot_serve(arrays: Any, message: str, pair: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^reference {message}|^reference .*{message}"):
        evaluate(pair[0], saved(tmp_path / "bad.npz", **arrays), metrics=["fid"], extractor=Corner())


def test_arguments_that_cannot_serve(pair: Any, tmp_path: Path) -> None:
    def refused(message: str, kind: type[Exception] = ValueError, **arguments: Any) -> None:
        with pytest.raises(kind, match=message):
            evaluate(*pair[:2], **{"extractor": Corner(), **arguments})

    for metrics in ([], ["kid"], "fid"):
        refused("metrics must be some of fid, sfid, is, precision, recall", metrics=metrics)
    refused("batch_size must be an int above 0, got 0", batch_size=0)
    refused("give one of the two", weights=tmp_path)
    refused("extractor must be a torch-fidelity FeatureExtractorBase, got Linear", TypeError, extractor=nn.Linear(1, 1))
    features = torch.zeros(50, 3)
    for returned in (features, (features, features)):
        refused("extractor must return a tuple of its 1 features", extractor=Returns(returned))
    for returned in (features[:9], features[0], features.int()):
        refused(r"extractor must return 'a' as \(50, D\) floats", extractor=Returns((returned,)))
    features[3, 1] = torch.nan
    refused("extractor must return finite features", extractor=Returns((features,)))
    refused("device must be a device of torch's, such as cpu or cuda, got 'tpux'", device="tpux")
    with pytest.raises(ValueError, match="reference must hold images of the samples' size, 4x3, got 5x3"):
        evaluate(pair[0], saved(tmp_path / "other.npz", images(9, 5)), extractor=Corner())
