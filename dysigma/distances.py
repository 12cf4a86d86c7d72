"""Distances between sets of images, on the features of any network or on the pixels.

The Fréchet distance is called FID with one particular network, Inception, and comparable with published FIDs with that
alone: name the features and the numbers of images beside every value.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .downloads import check_digest, data_folder, download
from .runs.files import digest, write_atomically

# The network of most published FIDs (Heusel et al. 2017), translated to TorchScript by the authors of StyleGAN2-ADA;
# it resizes the images itself. k-diffusion and others pin the same hash.
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

INCEPTION_BYTES = 95_607_719

INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


@dataclass(frozen=True, eq=False)
class Features:
    """A function from uint8 images (N, C, H, W) to features (N, D), and the SHA-256 of its file; pixels have none."""

    function: Callable[[Tensor], Tensor]
    sha256: str | None = None


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (D,), covariance (D, D) and number of the features of some images, float64."""

    mean: Tensor
    covariance: Tensor
    number: int

    @functools.cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


def inception(file: str | Path | None = None) -> Path:
    """The verified file of FID's network: the one given, else that in the data folder, downloaded if it is not there.

    Raises ConnectionError offline, ValueError for another file.
    """
    path = Path(file) if file else data_folder() / INCEPTION_URL.rpartition("/")[2]
    if file is None and not path.exists():
        other = "--features or DYSIGMA_DATA; losses, the ELBO, --metric pixels and other networks by path need none"
        download("FID's network", INCEPTION_URL, path, INCEPTION_BYTES, INCEPTION_SHA256, other)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; {INCEPTION_URL} is what FID needs")
    with path.open("rb") as stream:
        check_digest(stream, str(path), INCEPTION_SHA256)
    return path


def load_features(
    source: str, device: torch.device | str = "cpu", file: Path | None = None
) -> Features:
    """What turns images into features.

    source: "pixels", each image as one vector in [-1, 1]; "fid", the network of FID; or a TorchScript file that does
    the same, called with return_features=True where it takes that. file: where the network lies, if not there. Raises
    ValueError for anything else.
    """
    if source == "pixels":
        return Features(lambda images: images.flatten(1).double() / 127.5 - 1)
    path = inception(file) if source == "fid" else Path(file or source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of TorchScript, deprecated, but the format that needs no code to open
            network: Any = torch.jit.load(path, map_location=device)
        options = (
            {"return_features": True} if "return_features" in str(network.forward.schema) else {}
        )
    except (RuntimeError, ValueError) as error:
        what = "is not a TorchScript file" if path.is_file() else "does not exist"
        raise ValueError(
            f"features must be 'pixels', 'fid' or a TorchScript file; {path} {what}"
        ) from error

    def features(images: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(
            enabled=True, allow_tf32=False
        ):  # whose rounding a distance would show
            return network(images.to(device).expand(-1, 3, -1, -1), **options)

    return Features(features, digest(path.read_bytes()))


@torch.no_grad()
def extract(
    features: Features, images: Tensor, batch_size: int = 256, progress: bool = False
) -> Tensor:
    """Features (N, D) float64 of uint8 images (N, C, H, W); on a CUDA device if they come from one, else on the CPU."""
    from tqdm.auto import tqdm

    found = []
    for part in tqdm(
        images.split(batch_size),
        "features",
        unit="img",
        unit_scale=batch_size,
        disable=not progress,
    ):
        values = features.function(part)
        found.append(values.to(values.device if values.is_cuda else "cpu"))
    return torch.cat(found).double()


def reference_features(features: Features, images: Tensor, progress: bool = False) -> Tensor:
    """As extract, in float32 and, unless of pixels, kept in the data folder for the next call with the same images.

    A file there that is damaged or foreign is replaced; one that cannot be written is told in a warning.
    """
    from safetensors import safe_open
    from safetensors.torch import save

    if features.sha256 is None:
        return extract(features, images, progress=progress)
    pixels, whole = images.cpu().numpy(), False
    key = digest(f"{features.sha256} {pixels.shape}".encode() + pixels.tobytes())
    path = data_folder() / "features" / f"{key}.safetensors"
    with (
        suppress(Exception),
        safe_open(path, "pt") as file,
    ):  # what is no such file raises almost anything
        found = file.get_tensor("features")
        whole = file.metadata() == {"check": digest(key.encode() + found.numpy().tobytes())}
    if not whole:
        found = extract(features, images, progress=progress).float().cpu()
        try:
            check = digest(key.encode() + found.numpy().tobytes())
            write_atomically(path, save({"features": found}, {"check": check}))
        except OSError as error:
            warnings.warn(f"features are not kept for the next time: {error}", stacklevel=2)
    if progress:
        print(f"features of {len(images):,} images {'from' if whole else 'now in'} {path}")
    return found.double().to(images.device if images.is_cuda else "cpu")


def moments(features: Tensor) -> Moments:
    """Mean and covariance (over N - 1) of features (N, D). Raises ValueError for fewer than two rows."""
    if features.ndim != 2 or len(features) < 2 or not features.isfinite().all():
        raise ValueError(
            f"features must be finite, (N, D), N >= 2; got shape {tuple(features.shape)}"
        )
    return Moments(
        features.double().mean(0), torch.atleast_2d(features.double().T.cov()), len(features)
    )


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), the squared 2-Wasserstein distance of Gaussians (Fréchet 1957).

    Estimated covariances bias it upwards, by about a constant over the number of images: compare equal numbers alone.
    """
    # A and B both semi-definite: the roots of the eigenvalues of A B are those of the symmetric B^(1/2) A B^(1/2).
    cross = torch.linalg.eigvalsh(b.root @ a.covariance @ b.root).clamp(min=0).sqrt().sum()
    square = (
        (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    )
    return float(square)


def kernel_distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """KID, the squared maximum mean discrepancy of features (N, D) and (M, D), and its standard error.

    Unbiased, with the kernel (a b / D + 1)^3 (Bińkowski et al. 2018): the mean over disjoint subsets, ten or more, of
    1000 at most. Raises ValueError for fewer than 20 rows.
    """
    rows = min(len(x), len(y))
    if rows < 20:
        raise ValueError(
            f"a kernel distance needs 20 images of each kind or more; got {len(x)} and {len(y)}"
        )
    count = max(10, rows // 1000)
    size, values = rows // count, []
    for i in range(count):
        a, b = x[i::count][:size], y[i::count][:size]
        within = sum((k.sum() - k.trace()) for k in (_kernel(a, a), _kernel(b, b))) / (
            size * (size - 1)
        )
        values.append(within - 2 * _kernel(a, b).mean())
    found = torch.stack(values)
    return float(found.mean()), float(found.std() / count**0.5)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def compare_features(features: Tensor, reference: Tensor) -> dict[str, Any]:
    """How far samples with these features (N, D) are from images with reference (M, D); both are on one device.

    "distance" is frechet_distance, "limit" what a bias proportional to 1 / N leaves of it, both with 95 % intervals
    over samples, the reference being given: from a jackknife over ten groups (Tukey 1958), because resampling with
    replacement would bias the distance further. With N < 5 D the bias is not of that form, and limit is None. "kid"
    is kernel_distance, unbiased at any N, with its standard error. Raises ValueError for fewer than 20 rows.
    """
    kid, kid_se = kernel_distance(features, reference)
    whole, target, groups = moments(features), moments(reference), 10
    parts = [(features - whole.mean)[i::groups] for i in range(groups)]
    squares = [part.T @ part for part in parts]
    total, values = torch.stack(squares).sum(0), []
    for part, square in zip(parts, squares, strict=True):
        number = whole.number - len(part)
        mean = -part.sum(0) / number
        covariance = (total - square - number * torch.outer(mean, mean)) / (number - 1)
        values.append(frechet_distance(Moments(whole.mean + mean, covariance, number), target))
    distance = frechet_distance(whole, target)
    pseudo = groups * distance - (groups - 1) * torch.tensor(values, dtype=torch.float64)
    limit, half = (
        float(pseudo.mean()),
        2.262 * float(pseudo.std()) / groups**0.5,
    )  # Student's t, 9 degrees of freedom
    found: dict[str, Any] = {"distance": distance, "interval": [distance - half, distance + half]}
    known = whole.number >= 5 * features.shape[1]
    found |= (
        {"limit": limit, "limit_interval": [limit - half, limit + half]}
        if known
        else {"limit": None}
    )
    found |= {"kid": kid, "kid_standard_error": kid_se}
    return found | {
        "images": whole.number,
        "reference_images": target.number,
        "features": features.shape[1],
    }
