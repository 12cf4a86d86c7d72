"""Distances between sets of images, against closed forms and scipy."""

import hashlib

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import scipy.linalg
import torch

from dysigma import distances
from dysigma.data import leaves
from dysigma.distances import (
    Features,
    Moments,
    compare_features,
    extract,
    frechet_distance,
    inception,
    kernel_distance,
    load_features,
    moments,
    reference_features,
)
from dysigma.downloads import data_folder
from dysigma.exact import field_variances, gaussian_fields
from dysigma.randomness import generator


def test_of_diagonal_gaussians_it_is_that_of_their_standard_deviations():
    a = Moments(
        torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double()), 10
    )
    b = Moments(
        torch.tensor([1.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 16.0]).double()), 10
    )
    assert frechet_distance(a, b) == pytest.approx(4 + (2 - 1) ** 2 + (3 - 4) ** 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_agrees_with_the_matrix_root_of_scipy_and_is_symmetric():
    draw = generator(0, 0, "test")
    x, y = (
        torch.randn(50, 7, generator=draw, dtype=torch.float64)
        @ torch.randn(7, 7, generator=draw).double()
        for _ in "ab"
    )
    a, b = moments(x), moments(y + 0.3)
    root = scipy.linalg.sqrtm(np.asarray(a.covariance @ b.covariance)).real
    wanted = float(
        (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace()
    ) - 2 * np.trace(root)
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


def test_opening_a_network_warns_of_nothing(tmp_path, recwarn):
    file = save(tmp_path / "net.pt")
    recwarn.clear()
    load_features(str(file))
    assert not recwarn.list


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"pixels.*fid.*TorchScript.*nowhere\.pt does not exist",
    ):
        load_features("nowhere.pt")
    (tmp_path / "x.pt").write_bytes(b"not a network")
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        load_features(str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match=r"\(N, D\).*\(1, 3\)"):
        moments(torch.ones(1, 3))


class Means(torch.nn.Module):
    """Mean and largest value of each channel; classes unless features are asked for, as FID's network has it."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = images.float().flatten(2)
        found = torch.cat([x.mean(2), x.amax(2)], 1)
        return found if return_features else found[:, :1]


def save(path, network=None):
    torch.jit.save(torch.jit.script(network or Means()), str(path))  # what is traced stays as it is
    return path


def test_networks_that_return_classes_are_asked_for_features_and_grey_images_become_three_channels(
    tmp_path,
):
    features = load_features(str(save(tmp_path / "net.pt")))
    grey = torch.randint(256, (4, 1, 5, 5), generator=generator(0, 0, "test"), dtype=torch.uint8)
    assert extract(features, grey).shape == (4, 6)
    assert torch.equal(extract(features, grey), extract(features, grey.expand(-1, 3, -1, -1)))


def gaussian(count, draw, scale=1.0, dimension=12):
    x = torch.randn(count, dimension, generator=draw, dtype=torch.float64)
    return x * scale * torch.linspace(0.5, 1.5, dimension).double() + 0.1


@pytest.mark.parametrize("count", [60, 150])
def test_the_jackknife_knows_the_spread_and_removes_the_bias(count):
    """True distance of the populations in closed form; 60 draws, the fewest images that have a limit and more."""
    draw, found = generator(0, 0, "jackknife"), []
    reference = gaussian(20_000, draw)
    true = float((0.3 * torch.linspace(0.5, 1.5, 12).double()).square().sum())
    for _ in range(60):
        found.append(compare_features(gaussian(count, draw, 1.3), reference))
    values = {key: torch.tensor([row[key] for row in found]) for key in ("distance", "limit")}
    half = torch.tensor([row["interval"][1] - row["distance"] for row in found]) / 2.262
    error = values["distance"].std() / 60**0.5
    assert values["distance"].mean() > true + 10 * error
    assert abs(values["limit"].mean() - true) < 3 * error + 0.02 * true
    assert float(half.mean() / values["distance"].std()) == pytest.approx(1, abs=0.3)
    inside = [row["limit_interval"][0] < true < row["limit_interval"][1] for row in found]
    assert sum(inside) >= 50


def test_groups_left_out_by_sums_are_those_left_out_in_fact(monkeypatch):
    """The ten covariances of the jackknife are those of the rows that remain."""
    x, seen = gaussian(43, generator(0, 0, "groups")) + 100, []
    monkeypatch.setattr(distances, "frechet_distance", lambda a, b: seen.append(a) or 0.0)
    compare_features(x, gaussian(30, generator(1, 0, "groups")))
    for i, part in enumerate(seen[1:11]):
        wanted = moments(x[[row for row in range(43) if row % 10 != i]])
        torch.testing.assert_close(part.mean, wanted.mean)
        torch.testing.assert_close(part.covariance, wanted.covariance)


def test_with_few_images_for_the_features_no_limit_is_claimed():
    x, y = (gaussian(n, generator(n, 0, "few")) for n in (59, 60))
    assert compare_features(x, y)["limit"] is None
    assert compare_features(y, x)["limit"] is not None


def test_the_kernel_distance_is_its_definition_and_unbiased():
    draw = generator(0, 0, "kernel")
    x, y = gaussian(20, draw), gaussian(25, draw)
    value, _ = kernel_distance(x, y)
    pairs = []
    for i in range(10):  # ten subsets of two
        (a, b), (c, d) = x[[i, i + 10]], y[[i, i + 10]]
        k = [
            float((p @ q / 12 + 1) ** 3)
            for p, q in ((a, b), (c, d), (a, c), (a, d), (b, c), (b, d))
        ]
        pairs.append(k[0] + k[1] - sum(k[2:]) / 2)
    assert value == pytest.approx(sum(pairs) / 10)
    values = torch.tensor(
        [kernel_distance(gaussian(40, draw), gaussian(40, draw)) for _ in range(100)]
    )
    assert abs(values[:, 0].mean()) < 3 * values[:, 0].std() / 10
    assert float(values[:, 1].mean() / values[:, 0].std()) == pytest.approx(1, abs=0.25)
    with pytest.raises(ValueError, match=r"20.*got 19 and 40"):
        kernel_distance(gaussian(19, draw), gaussian(40, draw))


def test_agrees_with_torchmetrics():
    fid, kid = (pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid"))
    draw = generator(0, 0, "published")
    x, y = gaussian(300, draw, 1.2), gaussian(200, draw)
    a, b = moments(x), moments(y)
    wanted = float(fid._compute_fid(a.mean, a.covariance, b.mean, b.covariance))
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    subsets = [kid.poly_mmd(x[i::10][:20].float(), y[i::10][:20].float()) for i in range(10)]
    assert kernel_distance(x, y)[0] == pytest.approx(float(torch.stack(subsets).mean()), rel=1e-3)


def random_inception(inception, dims, patch):
    """pytorch-fid's network with random weights, for those of FID are no part of it."""
    patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
    patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
    torch.manual_seed(0)
    return inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval()


def test_agrees_with_pytorch_fid_and_torch_fidelity_on_the_same_images(tmp_path, monkeypatch):
    """Theirs from PNG files through their own reader, network and matrix root; ours from the pixels in memory."""
    inception, score = (
        pytest.importorskip(f"pytorch_fid.{name}") for name in ("inception", "fid_score")
    )
    kid, dims = pytest.importorskip("torch_fidelity.metric_kid"), 64
    with monkeypatch.context() as patch:
        network = random_inception(inception, dims, patch)
    monkeypatch.setattr(score, "InceptionV3", lambda blocks: network)
    monkeypatch.setattr(
        score.InceptionV3,
        "BLOCK_INDEX_BY_DIM",
        inception.InceptionV3.BLOCK_INDEX_BY_DIM,
        raising=False,
    )
    parts = leaves(60, 32).images.split(30)
    for name, images in zip("ab", parts, strict=True):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(
                tmp_path / name / f"{i:02d}.png"
            )
    theirs = score.calculate_fid_given_paths(
        [str(tmp_path / name) for name in "ab"], 10, "cpu", dims, num_workers=0
    )

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network(images.float() / 255)[0].mean([2, 3])

    traced = torch.jit.trace(Pooled().eval(), parts[0][:2])
    features = load_features(str(save(tmp_path / "net.pt", traced)))
    x, y = (extract(features, images) for images in parts)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(theirs, rel=1e-3)
    options = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_coef0": 1.0}
    subsets = [kid.kernel_mmd(x[i::10].numpy(), y[i::10].numpy(), **options) for i in range(10)]
    assert kernel_distance(x, y)[0] == pytest.approx(np.mean(subsets), rel=1e-9)


def test_fid_uses_the_pinned_file_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(distances, "INCEPTION_URL", "http://127.0.0.1:9/net.pt")
    with pytest.raises(ConnectionError, match=r"FID's network.*--features.*DYSIGMA_DATA"):
        load_features("fid")
    file = save(tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net\.pt.*SHA256.*f58cb9b6"):
        inception(file)
    with pytest.raises(ValueError, match=r"there is no file .*none\.pt"):
        inception(tmp_path / "none.pt")
    monkeypatch.setattr(
        distances, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest()
    )
    (folder := data_folder()).mkdir(exist_ok=True)
    (folder / "net.pt").write_bytes(file.read_bytes())
    assert load_features("fid").function(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).shape == (2, 6)


def test_features_of_the_same_images_are_computed_once(tmp_path):
    """The second call does not call the network and has the same bits; other images, orders and networks do."""
    features, calls = load_features(str(save(tmp_path / "net.pt"))), []
    counted = Features(
        lambda images: calls.append(len(images)) or features.function(images), features.sha256
    )
    images = torch.randint(256, (30, 3, 4, 4), generator=generator(0, 0, "test"), dtype=torch.uint8)
    first = reference_features(counted, images)
    assert torch.equal(first, extract(features, images)) and calls == [2, 30]
    assert torch.equal(reference_features(counted, images.clone()), first) and calls == [2, 30]
    changed = images.clone()
    changed[7, 1, 2, 3] += 1
    other = Features(counted.function, "another network")
    for which, what in (
        (counted, changed),
        (counted, images.flip(0)),
        (counted, images.mT.contiguous()),
        (counted, images.view(30, 3, 2, 8)),
        (other, images),
    ):
        assert torch.equal(reference_features(which, what), extract(features, what))
    assert calls == [2, 30] * 6
    kept = len([*(data_folder() / "features").iterdir()])
    reference_features(load_features("pixels"), images)
    assert len([*(data_folder() / "features").iterdir()]) == kept == 6, (
        "pixels are not worth a file"
    )


@pytest.mark.parametrize("damage", ["cut", "bit", "of another network", "no features", "empty"])
def test_kept_features_that_are_damaged_or_foreign_are_computed_anew(tmp_path, damage):
    features, calls = load_features(str(save(tmp_path / "net.pt"))), []
    counted = Features(
        lambda images: calls.append(len(images)) or features.function(images), features.sha256
    )
    images = torch.randint(256, (30, 3, 4, 4), generator=generator(0, 0, "test"), dtype=torch.uint8)
    reference_features(Features(lambda x: features.function(x) + 1, "another"), images)
    (foreign,) = (data_folder() / "features").iterdir()
    first = reference_features(counted, images)
    (file,) = {*(data_folder() / "features").iterdir()} - {foreign}
    whole = file.read_bytes()
    content = {
        "cut": whole[:-4],
        "bit": whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:],
        "of another network": foreign.read_bytes(),
        "no features": safetensors.torch.save({"x": torch.ones(3)}),
        "empty": b"",
    }[damage]
    file.write_bytes(content)
    assert torch.equal(reference_features(counted, images), first) and calls == [2, 30, 2, 30]
    assert file.read_bytes() == whole, "mended"


def test_where_features_come_from_is_said_and_a_folder_that_cannot_be_written_is_no_obstacle(
    tmp_path, capsys, monkeypatch
):
    features = load_features(str(save(tmp_path / "net.pt")))
    images = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)
    for words in ("now in", "from"):
        reference_features(features, images, progress=True)
        assert (
            f"features of 4 images {words} {data_folder() / 'features'}" in capsys.readouterr().out
        )
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYSIGMA_DATA", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"not kept.*Not a directory"):
        assert torch.equal(reference_features(features, images), extract(features, images))


# --- networks that do not fit -------------------------------------------------------------------------------------------


class TakesFloat(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 3)

    def forward(self, images):
        return self.convolution(images).mean((2, 3))


class GivesMaps(TakesFloat):
    def forward(self, images):
        return self.convolution(images.float()).mean((2, 3), keepdim=True)


class GivesOne(TakesFloat):
    def forward(self, images):
        return [self.convolution(images.float()).mean((2, 3))]


class GivesTuple(TakesFloat):
    def forward(self, images):
        return (self.convolution(images.float()).mean((2, 3)),)


class GivesTwo(TakesFloat):
    def forward(self, images):
        x = self.convolution(images.float())
        return [x.mean((2, 3)), x.amax((2, 3))]


class GivesDict(TakesFloat):
    def forward(self, images):
        return {"features": self.convolution(images.float()).mean((2, 3))}


class GivesPositions(TakesFloat):
    def forward(self, images):
        return self.convolution(images.float())


class GivesOneForAll(TakesFloat):
    def forward(self, images):
        return self.convolution(images.float()).mean((0, 2, 3))[None]


class GivesClasses(TakesFloat):
    def forward(self, images):
        return self.convolution(images.float()).mean((2, 3)).argmax(1)


class GivesNothing(TakesFloat):
    def forward(self, images):
        return self.convolution(images.float()).mean((2, 3)) / 0


PICTURES = torch.randint(256, (30, 3, 8, 8), generator=generator(0, 0, "fit"), dtype=torch.uint8)


@pytest.mark.parametrize("network", [GivesMaps, GivesOne, GivesTuple])
def test_features_in_another_container_are_unpacked(tmp_path, network):
    module = network()
    found = extract(load_features(str(save(tmp_path / "net.pt", module))), PICTURES)
    with torch.no_grad():
        wanted = module.convolution(PICTURES.float()).mean((2, 3)).double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (TakesFloat, "cannot be applied to uint8"),
        (GivesTwo, "returns a list"),
        (GivesDict, "returns a dict"),
        (GivesPositions, r"returns torch.float32 \(2, 8, 6, 6\) for 2 images"),
        (GivesOneForAll, r"returns torch.float32 \(1, 8\) for 2 images"),
        (GivesNothing, "returns features that are NaN"),
        (GivesClasses, r"returns torch.int64 \(2,\) for 2 images"),
    ],
)
@pytest.mark.parametrize("measure", [extract, reference_features])
def test_networks_that_do_not_fit_are_told_in_one_line(tmp_path, network, words, measure):
    features = load_features(str(save(tmp_path / "net.pt", network())))
    with pytest.raises(ValueError, match=words) as raised:
        measure(features, PICTURES)
    message = str(raised.value)
    assert "net.pt" in message and r"(N, 3, H, W)" in message and "\n" not in message


def test_where_memory_runs_out_fewer_images_are_measured_at_once():
    """TorchScript says so in a RuntimeError of its own."""
    images = leaves(9).images

    def small(part):
        if len(part) > 4:
            raise RuntimeError("The following operation failed in the TorchScript interpreter.\n"
                               "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB")  # fmt: skip
        return part.flatten(1).float()

    found = extract(distances.Features(small), images)
    torch.testing.assert_close(found, images.flatten(1).double())


def test_a_network_is_tried_on_two_images_first():
    sizes = []

    def count(images):
        sizes.append(len(images))
        return images.flatten(1).float()

    extract(Features(count), PICTURES, batch_size=16)
    assert sizes == [2, 16, 14]
