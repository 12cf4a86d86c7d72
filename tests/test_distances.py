"""Distances between sets of images, against closed forms and scipy."""

import numpy as np
import pytest
import scipy.linalg
import torch

from dysigma.distances import Moments, extract, frechet_distance, load_features, moments
from dysigma.draws import generator
from dysigma.exact import field_variances, gaussian_fields


def test_of_diagonal_gaussians_it_is_that_of_their_standard_deviations():
    a = Moments(torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double()), 10)
    b = Moments(torch.tensor([1.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 16.0]).double()), 10)
    assert frechet_distance(a, b) == pytest.approx(4 + (2 - 1) ** 2 + (3 - 4) ** 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_agrees_with_the_matrix_root_of_scipy_and_is_symmetric():
    draw = generator(0, 0, "test")
    x, y = (
        torch.randn(50, 7, generator=draw, dtype=torch.float64) @ torch.randn(7, 7, generator=draw).double()
        for _ in "ab"
    )
    a, b = moments(x), moments(y + 0.3)
    root = scipy.linalg.sqrtm(np.asarray(a.covariance @ b.covariance)).real
    wanted = float((a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace()) - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_fewer_images_than_features_are_no_trouble():
    x = torch.randn(5, 20, generator=generator(0, 0, "few"), dtype=torch.float64)
    assert frechet_distance(moments(x), moments(x + 2)) == pytest.approx(20 * 4, rel=1e-6)


def test_pixels_of_gaussian_fields_have_the_variances_they_are_made_of():
    images = gaussian_fields(20_000, size=4).images
    found = moments(extract(load_features("pixels"), images))
    total = float(field_variances(4).sum())
    assert float(found.covariance.trace()) == pytest.approx(total, rel=0.02)
    halves = [moments(extract(load_features("pixels"), part)) for part in images.split(10_000)]
    assert 0 < frechet_distance(*halves) < 1e-3 * total


def test_any_torchscript_network_serves(tmp_path):
    class Means(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean([2, 3])

    path = tmp_path / "means.pt"
    torch.jit.save(torch.jit.script(Means()), str(path))
    images = torch.randint(256, (9, 3, 4, 4), generator=generator(0, 0, "test"), dtype=torch.uint8)
    found = extract(load_features(str(path)), images, batch_size=4)
    torch.testing.assert_close(found, images.double().mean([2, 3]), rtol=1e-6, atol=0)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must be .pixels. or a TorchScript file; nowhere\.pt does not exist"):
        load_features("nowhere.pt")
    (tmp_path / "x.pt").write_bytes(b"not a network")
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        load_features(str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match=r"\(N, D\), N >= 2; got shape \(1, 3\)"):
        moments(torch.ones(1, 3))
