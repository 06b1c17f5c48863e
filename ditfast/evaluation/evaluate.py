"""FID, sFID, Inception Score, precision and recall of samples, as ADM's evaluation suite defines them.

torch-fidelity computes all but sFID's features. What differs from ADM's numbers, which come from TensorFlow:

- The network has the same weights, converted, and the same resizing. torch-fidelity states relative differences of
  about 1e-4 in the features, 1e-6 in FID and 1e-3 in the Inception Score.
- FID (Heusel et al. 2017) and sFID (Nash et al. 2021): means in fp64, where ADM has fp32; the matrix root's trace by
  eigenvalues, where it takes scipy's sqrtm.
- Inception Score (Salimans et al. 2016): the mean over parts of 5,000 samples in their order, from logits without bias
  over all 1,008 outputs, as in ADM; where 5,000 does not divide the number, the parts are equal.
- Precision and recall (Kynkaanniemi et al. 2019): three neighbours, distances in fp64, where ADM has fp16 unless that
  overflows.

No published number has been reproduced with this yet: that takes the weights, a reference and 50,000 samples.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import inception
from .metrics import (
    NEIGHBOURS,
    Features,
    extract,
    frechet,
    inception_score,
    precision_recall,
    rank_notes,
    statistics,
)
from .npz import IMAGES, Npz, Statistics

METRICS = ("fid", "sfid", "is", "precision", "recall")

_PUBLISHED = 50_000
# metric -> torch-fidelity's name of what its features are for
_USES = {"fid": "fid", "sfid": "sfid", "is": "isc", "precision": "prc", "recall": "prc"}
_STORED = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`.

    Attributes:
        metrics: those that could be computed, by name.
        missing: why the others could not.
        notes: what to know before comparing them.
        samples, reference_images: how many the two files hold.
        by_statistics: the metrics for which the reference's statistics served, not its images.
    """

    metrics: dict[str, float]
    missing: dict[str, str]
    notes: list[str]
    samples: int
    reference_images: int
    by_statistics: list[str]


def evaluate(
    npz: PathLike,
    reference: PathLike | None = None,
    *,
    metrics: Sequence[str] = METRICS,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    weights: PathLike | None = None,
    extractor: nn.Module | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Metrics of samples against a reference. Deterministic; features are kept (1 GB for 50,000 samples), images not.

    Args:
        npz: uint8 images (N, H, W, 3) under ``arr_0``, with N at least 2.
        reference: images of the same size in the same form, or their statistics: "mu" (D,), "sigma" (D, D) of FID's
            features, "mu_s" and "sigma_s" of sFID's. Statistics win over images, as in ADM, whose references have both;
            precision and recall need images. The Inception Score needs no reference.
        metrics: any of "fid", "sfid", "is", "precision", "recall".
        batch_size: images that the network gets at a time.
        device: where the network runs; the metrics themselves are computed on the CPU in fp64.
        weights: torch-fidelity's file of the Inception network, by default where torch.hub keeps it. Nothing is
            downloaded.
        extractor: another network, a torch-fidelity ``FeatureExtractorBase``: (B, 3, H, W), uint8 -> features
            (B, D) each; ``get_default_feature_layer_for_metric`` names those for "fid", "isc", "prc" and "sfid". It is
            moved to the device and put into eval mode.
        on_progress: called with "samples" or "reference", the images done, and their number; with a metric's name and
            twice 0 before it is computed.

    Raises:
        ValueError: an argument, a file or the network's weights are missing, or not what they should be.
    """
    requested = _check_arguments(metrics, batch_size, device, weights, extractor)
    samples = Npz(Path(npz), "npz")
    count, *size = samples.image_shape()
    if count < 2:
        raise ValueError(f"npz must hold at least 2 images, got {count}")
    stored, reference_count = _read_reference(reference, requested, size)
    layers, missing = _plan(requested, stored, count, reference_count, extractor)
    by_statistics = [metric for metric in layers if metric in stored]
    result = Evaluation({}, missing, [], count, reference_count, by_statistics)
    if not layers:
        return result
    network: Any = extractor
    if extractor is None:
        network, notes = inception.load(sorted(set(layers.values())), weights)
        result.notes.extend(notes)
    network = network.to(device).eval()
    report = on_progress or (lambda phase, done, total: None)
    widths = {layers[metric]: len(statistic["mu"]) for metric, statistic in stored.items() if metric in layers}
    sample_features = extract(
        network, layers.values(), samples.batches(batch_size), device, lambda n: report("samples", n, count), widths
    )
    # the reference's images, for what its statistics do not tell
    remaining = {metric: layer for metric, layer in layers.items() if metric != "is" and metric not in stored}
    reference_features: Features = {}
    if remaining and reference is not None:
        images = Npz(Path(reference), "reference").batches(batch_size)
        reference_features = extract(
            network, remaining.values(), images, device, lambda n: report("reference", n, reference_count), {}
        )
    for metric, layer in layers.items():
        report(metric, 0, 0)
        if metric in _STORED:
            features = None if metric in stored else reference_features[layer]
            against = stored[metric] if features is None else statistics(features)
            result.metrics[metric] = frechet(statistics(sample_features[layer]), against)
            result.notes.extend(rank_notes(metric, sample_features[layer], features))
        elif metric == "is":
            result.metrics[metric] = inception_score(sample_features[layer])
        elif metric not in result.metrics:
            shares = precision_recall(sample_features[layer], reference_features[layer])
            result.metrics.update((name, shares[name]) for name in ("precision", "recall") if name in layers)
    for metric, value in list(result.metrics.items()):
        if not math.isfinite(value):
            missing[metric] = f"it came out as {result.metrics.pop(metric)}"
    if count < _PUBLISHED:
        result.notes.append(f"{count:,} samples: every metric depends on their number; published ones are of 50,000")
    return result


def _check_arguments(
    metrics: Sequence[str],
    batch_size: int,
    device: torch.device | str,
    weights: PathLike | None,
    extractor: nn.Module | None,
) -> list[str]:
    """The metrics, each once, in the order of METRICS."""
    if isinstance(metrics, str) or not metrics or not set(metrics) <= set(METRICS):
        raise ValueError(f"metrics must be some of {', '.join(METRICS)}, got {metrics!r}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an int above 0, got {batch_size!r}")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a device of torch's, such as cpu or cuda, got {device!r}") from error
    if extractor is not None and weights is not None:
        raise ValueError("weights are the Inception network's, and extractor replaces it: give one of the two")
    interface = ("get_requested_features_list", "get_default_feature_layer_for_metric", "to", "eval")
    if extractor is not None and not all(hasattr(extractor, name) for name in interface):
        raise TypeError(f"extractor must be a torch-fidelity FeatureExtractorBase, got {type(extractor).__name__}")
    inception.require_torch_fidelity()
    return [metric for metric in METRICS if metric in metrics]


def _read_reference(
    reference: PathLike | None, requested: Sequence[str], size: Sequence[int]
) -> tuple[dict[str, Statistics], int]:
    """(metric -> its stored statistics, the number of images, which must have the samples' size)."""
    if reference is None:
        if needy := [metric for metric in requested if metric != "is"]:
            raise ValueError(f"reference must be given for {', '.join(needy)}")
        return {}, 0
    source = Npz(Path(reference), "reference")
    stored = {
        name: moments for name, keys in _STORED.items() if name in requested and (moments := source.statistics(*keys))
    }
    if IMAGES not in source.names():
        if not any(key in source.names() for keys in _STORED.values() for key in keys):
            raise ValueError(f"reference must hold images under {IMAGES!r} or statistics under 'mu', 'sigma'")
        return stored, 0
    count, *image_size = source.image_shape()
    if image_size != list(size):
        raise ValueError(f"reference must hold images of the samples' size, {_times(size)}, got {_times(image_size)}")
    if count < 2:
        raise ValueError(f"reference must hold at least 2 images, got {count}")
    return stored, count


def _plan(
    requested: Sequence[str], stored: Mapping[str, Statistics], count: int, reference_count: int, extractor: Any
) -> tuple[dict[str, str], dict[str, str]]:
    """(metric -> the network's layer, metric -> why it cannot be had)."""
    layers: dict[str, str] = {}
    missing: dict[str, str] = {}
    for metric in requested:
        try:
            layer = (extractor or inception.AdmInception).get_default_feature_layer_for_metric(_USES[metric])
        except (KeyError, NotImplementedError, ValueError):
            missing[metric] = f"the extractor names no features for {_USES[metric]!r}"
            continue
        if extractor is not None and layer not in extractor.get_requested_features_list():
            missing[metric] = f"the extractor does not return its features {layer!r}"
        elif metric in _STORED and metric not in stored and not reference_count:
            missing[metric] = f"the reference has neither {' and '.join(_STORED[metric])} nor images"
        elif metric in ("precision", "recall") and not reference_count:
            missing[metric] = f"the reference holds statistics alone, and it needs images (under {IMAGES!r})"
        elif metric in ("precision", "recall") and min(count, reference_count) <= NEIGHBOURS:
            missing[metric] = f"it needs more than {NEIGHBOURS} images on each side, got {count} and {reference_count}"
        else:
            layers[metric] = layer
    return layers, missing


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
