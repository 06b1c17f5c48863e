"""Features of images, and the metrics of features: torch-fidelity's functions, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .npz import Statistics

NEIGHBOURS = 3
_SPLIT = 5_000  # samples in a part of the Inception Score
_ROWS = 2_500  # a block of distances to 50,000 samples is then 1 GB

Features = Mapping[str, Tensor]


def extract(
    network: Any,
    layers: Iterable[str],
    batches: Iterable[Tensor],
    device: torch.device | str,
    report: Callable[[int], None],
    widths: Mapping[str, int],
) -> Features:
    """What the network gives for all batches: layer -> (N, D), on the CPU.

    Args:
        network: a torch-fidelity ``FeatureExtractorBase``.
        layers: the names to keep.
        batches: (B, 3, H, W), uint8.
        report: called with the number of images done.
        widths: layer -> D, where the reference's statistics settle it.

    Raises:
        ValueError: the network returns something else.
    """
    names = list(network.get_requested_features_list())
    parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    done = 0
    # TF32 would cost three digits
    with torch.inference_mode(), torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
        for images in batches:
            outputs = network(images.to(device))
            if not isinstance(outputs, tuple) or len(outputs) != len(names):
                raise ValueError(f"extractor must return a tuple of its {len(names)} features ({', '.join(names)})")
            for layer, values in zip(names, outputs, strict=True):
                if layer in parts:
                    _check(layer, values, len(images), widths.get(layer))
                    parts[layer].append(values.cpu())
            done += len(images)
            report(done)
    return {layer: torch.cat(values) for layer, values in parts.items()}


def _check(layer: str, values: Tensor, batch: int, width: int | None) -> None:
    if values.ndim != 2 or len(values) != batch or not values.is_floating_point():
        raise ValueError(f"extractor must return {layer!r} as ({batch}, D) floats, got {tuple(values.shape)}")
    if not values.isfinite().all():
        raise ValueError(f"extractor must return finite features, and its {layer!r} are not")
    if width is not None and values.shape[1] != width:
        raise ValueError(
            f"reference must hold statistics of the network's {values.shape[1]} features {layer!r}, got {width}"
        )


def statistics(features: Tensor) -> Statistics:
    """Mean and covariance of (N, D)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    moments: Statistics = fid_features_to_statistics(features.double())
    return moments


def frechet(samples: Statistics, reference: Statistics) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): Heusel et al. 2017."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return float(fid_statistics_to_metric(samples, reference, verbose=False)[KEY_METRIC_FID])


def inception_score(logits: Tensor) -> float:
    """exp(E[KL(p(y|x) || p(y))]) of (N, classes), the mean over parts: Salimans et al. 2016."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    splits = math.ceil(len(logits) / _SPLIT)
    return float(isc_features_to_metric(logits, splits=splits, shuffle=False)[KEY_METRIC_ISC_MEAN])


def precision_recall(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """The share of samples (N, D) in the reference's balls (M, D), and the reverse: Kynkaanniemi et al. 2019."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": _ROWS, "save_cpu_ram": True, "verbose": False}
    values = prc_features_to_metric(samples.double(), reference.double(), **options)
    return {"precision": values[KEY_METRIC_PRECISION], "recall": values[KEY_METRIC_RECALL]}


def rank_notes(metric: str, samples: Tensor, reference: Tensor | None) -> list[str]:
    """A sentence for each side with too few images for its covariance."""
    sides = [("samples", samples), *([] if reference is None else [("images of the reference", reference)])]
    return [
        f"{metric}: {len(features):,} {images} give a covariance of {features.shape[1]:,} features that has rank "
        f"{len(features) - 1:,} at most; the value is far too high"
        for images, features in sides
        if len(features) <= features.shape[1]
    ]
