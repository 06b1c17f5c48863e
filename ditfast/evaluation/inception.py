"""The Inception network of FID, by torch-fidelity, with weights that are on this machine already."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

SPATIAL = "spatial"
_CHANNELS = 7  # ADM takes the first seven: 17 * 17 * 7 = 2023 features, about as many as FID's 2048
_LAYERS = {"fid": "2048", "prc": "2048", "isc": "logits_unbiased", "sfid": SPATIAL}


class AdmInception(nn.Module):
    """torch-fidelity's Inception v3 of 2015 with sFID's spatial features beside its own; its interface.

    The spatial features are ADM's ``mixed_6/conv:0`` in TensorFlow's graph: what the 1x1 branch of Mixed_6d
    gives, after its normalisation and ReLU, in rows, columns, channels.

    Args:
        network: torch-fidelity's ``FeatureExtractorInceptionV3``.
        features: the names of what to return: "spatial", (B, 2023), or what the network provides.
    """

    def __init__(self, network: Any, features: Sequence[str]) -> None:
        super().__init__()
        self.network, self.features = network, list(features)
        self._spatial: Tensor | None = None
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def get_requested_features_list(self) -> list[str]:
        return self.features

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return _LAYERS[metric]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W), uint8 -> the features asked for, each (B, D), fp32."""
        by_name = self.network.convert_features_tuple_to_dict(self.network(images))
        by_name[SPATIAL], self._spatial = self._spatial, None
        return tuple(by_name[name] for name in self.features)


def load(features: Sequence[str], weights: str | os.PathLike[str] | None = None) -> tuple[AdmInception, list[str]]:
    """The network that returns these features, and notes on its weights.

    Args:
        features: as in the class.
        weights: torch-fidelity's file; by default where torch.hub keeps it. Nothing is downloaded, and nothing in
            the file is run.

    Raises:
        ValueError: torch-fidelity or the file is missing, or it holds something else; says where to get it.
    """
    source = require_torch_fidelity()
    name = Path(urlsplit(source.URL_INCEPTION_V3).path).name
    path = Path(torch.hub.get_dir(), "checkpoints", name) if weights is None else Path(weights)
    if not path.is_file():
        raise ValueError(
            f"weights: the Inception network is missing: no file {path}; download {source.URL_INCEPTION_V3} and put "
            f"{name} into {Path(torch.hub.get_dir(), 'checkpoints')}, or say where it is (--weights)"
        )
    data = path.read_bytes()
    # the network stops after the last layer asked for; "768" is the first after the spatial features
    layers = [feature for feature in features if feature != SPATIAL] or ["768"]
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        # torch-fidelity loads without that limit, but the same bytes, which have just been found to be tensors alone
        network = source.FeatureExtractorInceptionV3(name, layers, feature_extractor_weights_path=io.BytesIO(data))
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"weights: {path} is damaged or not torch-fidelity's Inception: {reason}") from error
    # torch.hub's convention: a file's name ends with the beginning of its SHA-256
    official = hashlib.sha256(data).hexdigest().startswith(Path(name).stem.rpartition("-")[2])
    notes = [] if official else [f"{path} is not torch-fidelity's file: no value compares with published ones"]
    return AdmInception(network, features), notes


def require_torch_fidelity() -> Any:
    """torch-fidelity's module of the Inception network.

    Raises:
        ValueError: it is not installed, or its torchvision does not go with this torch.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise ValueError(
            f"evaluating needs torch-fidelity and its torchvision; {missing} is not installed: "
            "pip install 'ditfast[evaluate]'"
        ) from error
    except (ImportError, RuntimeError) as error:  # torchvision's operators are another torch's
        raise ValueError(f"torch-fidelity cannot be imported: {error}; torchvision must match torch") from error
    return feature_extractor_inceptionv3
