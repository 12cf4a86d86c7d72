"""Distances between sets of images, on the features of any network or on the pixels.

The Fréchet distance is called FID with one particular network, Inception, and comparable with
published FIDs with that alone: name the features and the numbers of images beside every value.
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

from .devices import in_parts_that_fit, is_out_of_memory
from .downloads import check_digest, data_folder, download
from .images import to_real
from .runs.files import digest, write_atomically

# The network of most published FIDs (Heusel et al. 2017), translated to TorchScript by the authors of
# StyleGAN2-ADA; it resizes the images itself. k-diffusion and others pin the same hash.
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

INCEPTION_BYTES = 95_607_719

INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

# Images of each kind that a kernel distance needs, in ten subsets of two.
FEWEST_IMAGES = 20

_WANTED = "uint8 images (N, 3, H, W), 0 to 255, to features (N, D)"


@dataclass(frozen=True, eq=False)
class Features:
    """A function from uint8 images (N, C, H, W) to features (N, D), and the SHA-256 of its file.

    Pixels have no file. name is what messages call the features.
    """

    function: Callable[[Tensor], Any]
    sha256: str | None = None
    name: str = "the features"

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D). Raises ValueError for a network that takes or returns something else.

        (N, D, 1, 1) is flattened, and a list or tuple that holds one tensor is unpacked.
        """
        try:
            found = self.function(images)
        except RuntimeError as error:  # what TorchScript raises, on many lines
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
            raise ValueError(
                f"{self.name} cannot be applied to uint8 images {tuple(images.shape)} ({reason}): give a "
                f"network from {_WANTED}, so one that scales them itself"
            ) from error
        if isinstance(found, list | tuple) and len(found) == 1:
            found = found[0]
        if not isinstance(found, Tensor):
            raise ValueError(
                f"{self.name} returns a {type(found).__name__}: give a network from {_WANTED}"
            )
        shape = tuple(found.shape)
        if found.ndim == 4 and shape[2:] == (1, 1):
            found = found.flatten(1)
        if found.ndim != 2 or len(found) != len(images) or found.is_complex():
            raise ValueError(
                f"{self.name} returns {found.dtype} {shape} for {len(images)} images: give a network "
                f"from {_WANTED}"
            )
        if not bool(found.isfinite().all()):
            raise ValueError(
                f"{self.name} returns features that are NaN or infinite: give a network from {_WANTED}"
            )
        return found


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
    """The verified file of FID's network: the one given, else that in the data folder.

    Where it is not there it is downloaded. Raises ConnectionError offline, ValueError for another
    file.
    """
    path = Path(file) if file else data_folder() / INCEPTION_URL.rpartition("/")[2]
    if file is None and not path.exists():
        other = (
            "--features or DYSIGMA_DATA; losses, the ELBO, --metric pixels and other networks by path "
            "need none"
        )
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

    source: "pixels", each image as one vector in [-1, 1]; "fid", the network of FID; or a TorchScript
    file from uint8 images (N, 3, H, W) to features (N, D), called with return_features=True where it
    takes that. file: where the network lies, if not there.
    Raises ValueError for anything else. Whether the network takes and returns what it should is seen
    when it is first called.

    >>> load_features("pixels")(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).shape
    torch.Size([2, 48])
    """
    if source == "pixels":
        return Features(_pixels, name="pixels")
    path = inception(file) if source == "fid" else Path(file or source)
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated, but no other format needs no code to open.
            warnings.simplefilter("ignore")
            network: Any = torch.jit.load(path, map_location=device)
        options = {}
        if "return_features" in str(network.forward.schema):
            options["return_features"] = True
    except (RuntimeError, ValueError) as error:
        what = "is not a TorchScript file" if path.is_file() else "does not exist"
        raise ValueError(
            f"features must be 'pixels', 'fid' or a TorchScript file; {path} {what}"
        ) from error

    def features(images: Tensor) -> Any:
        # A distance would show the rounding of TF32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return network(images.to(device).expand(-1, 3, -1, -1), **options)

    return Features(features, digest(path.read_bytes()), str(path))


def _pixels(images: Tensor) -> Tensor:
    return to_real(images.flatten(1), torch.float64)


@torch.no_grad()
def extract(
    features: Features, images: Tensor, batch_size: int | None = None, progress: bool = False
) -> Tensor:
    """Features (N, D) float64 of uint8 images (N, C, H, W).

    They stay on a CUDA device if the images come from one, and come to the CPU otherwise.
    batch_size: by default 256, and 1024 on CUDA; half as many, and again half, where they do not fit
    in memory. Two images go first, so that a network that cannot take them is told at once.
    """
    from tqdm.auto import tqdm

    size = batch_size or (1024 if images.is_cuda else 256)
    features(images[:2])
    found = []
    with tqdm(total=len(images), desc="features", unit="img", disable=not progress) as bar:
        for values in in_parts_that_fit(
            lambda part: features(images[part.start : part.stop]), len(images), size
        ):
            found.append(values.to(values.device if values.is_cuda else "cpu"))
            bar.update(len(values))
    return torch.cat(found).double()


def reference_features(features: Features, images: Tensor, progress: bool = False) -> Tensor:
    """As extract, in float32, and kept in the data folder for the next call with the same images.

    Those of pixels are not worth a file. A file there that is damaged or foreign is replaced; one
    that cannot be written is told in a warning.
    """
    if features.sha256 is None:
        return extract(features, images, progress=progress)
    pixels = images.cpu().numpy()
    key = digest(f"{features.sha256} {pixels.shape}".encode() + pixels.tobytes())
    path = data_folder() / "features" / f"{key}.safetensors"
    found = _read_kept(path, key)
    where = "from"
    if found is None:
        where = "now in"
        found = extract(features, images, progress=progress).float().cpu()
        _keep(path, key, found)
    if progress:
        print(f"features of {len(images):,} images {where} {path}")
    return found.double().to(images.device if images.is_cuda else "cpu")


def _check_of(key: str, found: Tensor) -> str:
    return digest(key.encode() + found.numpy().tobytes())


def _read_kept(path: Path, key: str) -> Tensor | None:
    """Features as they were kept, or None if the file is missing, damaged or of another key."""
    from safetensors import safe_open

    # What is no such file makes the reader raise almost anything.
    with suppress(Exception), safe_open(path, "pt") as file:
        found: Tensor = file.get_tensor("features")
        if file.metadata() == {"check": _check_of(key, found)}:
            return found
    return None


def _keep(path: Path, key: str, found: Tensor) -> None:
    from safetensors.torch import save

    try:
        write_atomically(path, save({"features": found}, {"check": _check_of(key, found)}))
    except OSError as error:
        warnings.warn(f"features are not kept for the next time: {error}", stacklevel=3)


def moments(features: Tensor) -> Moments:
    """Mean and covariance (over N - 1) of features (N, D).

    Raises ValueError for fewer than two rows or values that are not finite.

    >>> moments(torch.tensor([[0.0, 1.0], [2.0, 1.0]])).covariance
    tensor([[2., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    if features.ndim != 2 or len(features) < 2 or not features.isfinite().all():
        raise ValueError(
            f"features must be finite, (N, D), N >= 2; got shape {tuple(features.shape)}"
        )
    covariance = torch.atleast_2d(features.double().T.cov())
    return Moments(features.double().mean(0), covariance, len(features))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared 2-Wasserstein distance of two Gaussians (Fréchet 1957).

    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) with covariances A and B. Estimated covariances
    bias it upwards, by about a constant over the number of images: compare equal numbers alone.

    >>> a = Moments(torch.zeros(1).double(), torch.eye(1).double(), 10)
    >>> b = Moments(torch.ones(1).double(), 4 * torch.eye(1).double(), 10)
    >>> frechet_distance(a, b)  # 1 of the means, (2 - 1)^2 of the standard deviations
    2.0
    """
    # The eigenvalues of A B are those of the symmetric B^(1/2) A B^(1/2), as both are semi-definite.
    eigenvalues = torch.linalg.eigvalsh(b.root @ a.covariance @ b.root)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    means = (a.mean - b.mean).square().sum()
    return float(means + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def kernel_distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """KID, the squared maximum mean discrepancy of features (N, D) and (M, D), and its standard error.

    Unbiased, with the kernel (a b / D + 1)^3 (Bińkowski et al. 2018): the mean over disjoint subsets,
    ten or more, of 1000 at most. Raises ValueError for fewer than 20 rows.
    """
    rows = min(len(x), len(y))
    if rows < FEWEST_IMAGES:
        raise ValueError(
            f"a kernel distance needs {FEWEST_IMAGES} images of each kind or more; "
            f"got {len(x)} and {len(y)}"
        )
    count = max(10, rows // 1000)
    size = rows // count
    values = []
    for i in range(count):
        a = x[i::count][:size]
        b = y[i::count][:size]
        within = _sum_over_pairs(_kernel(a, a)) + _sum_over_pairs(_kernel(b, b))
        values.append(within / (size * (size - 1)) - 2 * _kernel(a, b).mean())
    found = torch.stack(values)
    return float(found.mean()), float(found.std() / count**0.5)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _sum_over_pairs(kernel: Tensor) -> Tensor:
    """The sum over ordered pairs of different rows, of (n, n)."""
    return kernel.sum() - kernel.trace()


def compare_features(features: Tensor, reference: Tensor) -> dict[str, Any]:
    """How far samples with these features (N, D) are from images with reference (M, D).

    Both are on one device. Returns
    distance, interval: frechet_distance, and its 95 % interval over samples, the reference being given;
    limit, limit_interval: what a bias proportional to 1 / N leaves of it. With N < 5 D the bias is
        not of that form, and limit is None;
    kid, kid_standard_error: kernel_distance, unbiased at any N;
    images, reference_images, features: N, M and D.
    Raises ValueError for fewer than 20 rows.
    """
    kid, kid_error = kernel_distance(features, reference)
    whole = moments(features)
    target = moments(reference)
    distance = frechet_distance(whole, target)
    limit, half = _jackknife(features, whole, target, distance)
    has_limit = whole.number >= 5 * features.shape[1]
    found: dict[str, Any] = {
        "distance": distance,
        "interval": [distance - half, distance + half],
        "limit": limit if has_limit else None,
    }
    if has_limit:
        found["limit_interval"] = [limit - half, limit + half]
    found["kid"] = kid
    found["kid_standard_error"] = kid_error
    found["images"] = whole.number
    found["reference_images"] = target.number
    found["features"] = features.shape[1]
    return found


def _jackknife(
    features: Tensor, whole: Moments, target: Moments, distance: float
) -> tuple[float, float]:
    """The distance without its bias, and half its 95 % interval (Tukey 1958).

    Leaving one of g groups out gives distances d_i. The pseudo-values g d - (g - 1) d_i have the mean
    that a bias proportional to 1 / N leaves, and their spread tells the error. Resampling with
    replacement would bias the distance further.
    """
    groups = 10
    centred = features - whole.mean
    parts = [centred[i::groups] for i in range(groups)]
    squares = [part.T @ part for part in parts]
    total = torch.stack(squares).sum(0)
    left_out = []
    for part, square in zip(parts, squares, strict=True):
        # What remains has the sums of the whole less those of the group; the whole's mean is 0 here.
        number = whole.number - len(part)
        mean = -part.sum(0) / number
        covariance = (total - square - number * torch.outer(mean, mean)) / (number - 1)
        remaining = Moments(whole.mean + mean, covariance, number)
        left_out.append(frechet_distance(remaining, target))
    pseudo = groups * distance - (groups - 1) * torch.tensor(left_out, dtype=torch.float64)
    half = 2.262 * float(pseudo.std()) / groups**0.5  # Student's t, 9 degrees of freedom
    return float(pseudo.mean()), half
