"""Small feature networks, image files and formulas for the tests of the metrics."""

import os

import numpy as np
import torch
from torch import nn

from tests.torchvision_stand_in import imported

torch_fidelity = imported("torch_fidelity")


class Corner(torch_fidelity.FeatureExtractorBase):
    """The first pixel as FID's features, the red channel as sFID's, logits of two classes; all exact in fp64."""

    def __init__(self, features=("corner", "red", "classes")):
        super().__init__("corner", list(features))

    @staticmethod
    def get_provided_features_list():
        return "corner", "red", "classes"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"fid": "corner", "prc": "corner", "sfid": "red", "isc": "classes"}[metric]

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        features = {
            "corner": images[:, :, 0, 0].double(),
            "red": images[:, 0].flatten(1).double(),
            "classes": images[:, :2, 0, 0].double() / 64,
        }
        return tuple(features[name] for name in self.features_list)


class Returns(nn.Module):
    """An extractor that returns this."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def get_requested_features_list(self):
        return ["a"]

    def get_default_feature_layer_for_metric(self, metric):
        return "a"

    def forward(self, images):
        return self.features


def images(count, height=4, width=3, seed=0, high=256):
    return np.random.default_rng(seed).integers(0, high, (count, height, width, 3), dtype=np.uint8)


def saved(path, array=None, compressed=False, **arrays):
    """An .npz file, of images first."""
    first = () if array is None else (array,)
    (np.savez_compressed if compressed else np.savez)(path, *first, **arrays)
    return path


def two_files(folder):
    """Samples and a reference that overlap: two files, and their arrays."""
    generated, real = images(50, seed=1, high=200), images(40, seed=2, high=200) + np.uint8(56)
    return saved(folder / "samples.npz", generated), saved(folder / "reference.npz", real), generated, real


def moments(features):
    """Mean and covariance by their sums, fp64."""
    x = features.astype(np.float64).reshape(len(features), -1)
    centred = x - x.sum(0) / len(x)
    return x.sum(0) / len(x), centred.T @ centred / (len(x) - 1)


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def distance(samples, reference):
    """The Frechet distance, by roots of symmetric matrices alone."""
    (mu, sigma), (nu, tau) = samples, reference
    half = root(sigma)
    return ((mu - nu) ** 2).sum() + np.trace(sigma + tau - 2 * root(half @ tau @ half))


def close(actual, expected):
    torch.testing.assert_close(torch.tensor(actual).double(), torch.tensor(expected).double())


def damaged(path, how):
    """An .npz file of images with an error of this kind."""
    data = bytearray(saved(path, images(9)).read_bytes())
    if how == "flipped":
        data[400] ^= 1
    elif how == "cut":
        del data[len(data) // 2 :]
    elif how == "directory":
        at = data.rindex(b"PK\x01\x02")
        data[at : at + 4] = b"PK\x00\x00"
    path.write_bytes(data)
    return path


class Runs:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)
