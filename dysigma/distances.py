"""Distances between sets of images, on the features of any network or on the pixels.

The Fréchet distance is called FID with one particular network, Inception, and comparable with published FIDs with that
alone: name the features and the numbers of images beside every value.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

Features = Callable[[Tensor], Tensor]  # (N, C, H, W) uint8 to (N, D)


class Moments(NamedTuple):
    """Mean (D,), covariance (D, D) and number of the features of some images; float64, on the CPU."""

    mean: Tensor
    covariance: Tensor
    number: int


def load_features(source: str, device: torch.device | str = "cpu") -> Features:
    """ "pixels": each image as one vector in [-1, 1]; else a TorchScript file: uint8 (N, C, H, W) to features (N, D).

    Raises ValueError for a file that is not there or not TorchScript.
    """
    if source == "pixels":
        return lambda images: images.flatten(1).double() / 127.5 - 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, the format that needs no code to open
            network = torch.jit.load(source, map_location=device)
    except (RuntimeError, ValueError) as error:
        what = "is not a TorchScript file" if Path(source).is_file() else "does not exist"
        raise ValueError(f"features must be 'pixels' or a TorchScript file; {source} {what}") from error
    return lambda images: network(images.to(device))


@torch.no_grad()
def extract(features: Features, images: Tensor, batch_size: int = 256) -> Tensor:
    """Features (N, D) float64, on the CPU, of uint8 images (N, C, H, W)."""
    return torch.cat([features(part).double().cpu() for part in images.split(batch_size)])


def moments(features: Tensor) -> Moments:
    """Mean and covariance (over N - 1) of features (N, D). Raises ValueError for fewer than two rows."""
    if features.ndim != 2 or len(features) < 2 or not features.isfinite().all():
        raise ValueError(f"features must be finite, (N, D), N >= 2; got shape {tuple(features.shape)}")
    return Moments(features.double().mean(0), torch.atleast_2d(features.double().T.cov()), len(features))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), the squared 2-Wasserstein distance of Gaussians (Fréchet 1957).

    Estimated covariances bias it upwards, by about a constant over the number of images: compare equal numbers alone.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # A and B both semi-definite: the roots of the eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2).
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    square = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return float(square)
