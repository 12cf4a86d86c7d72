"""The distance that needs no download: features of a small classifier trained here, and the script that trains it."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dysigma.data import leaves
from dysigma.distances import compare_features, extract, frechet_distance, load_features, moments
from dysigma.randomness import generator

FOLDER = Path(__file__).resolve().parent.parent / "data/features"
FILE = FOLDER / "cifar10-classifier.pt"


@pytest.fixture(scope="module")
def classifier():
    return load_features(str(FILE))


@pytest.fixture(scope="module")
def pictures():
    """Leaves to change and others to compare them with; for the classifier both are something new."""
    return leaves(600, 32).images.split(300)


def test_the_file_is_the_recorded_one_and_small():
    about = json.loads(FILE.with_suffix(".json").read_text())
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == about["sha256"]
    assert FILE.stat().st_size <= 500_000 and b"site-packages" not in FILE.read_bytes()
    records = json.loads(
        (FOLDER.parent / "runs/distance-cifar10-cpu/fd_cifar10-classifier.json").read_text()
    )
    assert {record["sha256"] for record in records} == {about["sha256"]}
    assert about["accuracy"]["test"] > 0.8


@pytest.mark.slow
def test_features_are_the_same_each_time_and_of_images_of_any_size_and_colour(classifier, pictures):
    images = pictures[0][:40]
    found = extract(classifier, images)
    assert (
        found.shape == (40, 64)
        and found.isfinite().all()
        and torch.equal(extract(classifier, images), found)
    )
    torch.testing.assert_close(
        extract(load_features(str(FILE)), images, batch_size=7), found, rtol=1e-4, atol=1e-4
    )
    network = torch.jit.load(FILE)
    grey = images[:, :1, ::2, 4:28]
    assert network(grey).shape == (40, 64)
    assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))


def blurred(images, amount):
    kernel = torch.ones(3, 1, 3, 3) / 9
    smooth = F.conv2d(F.pad(images.float(), [1, 1, 1, 1], mode="reflect"), kernel, groups=3)
    return images + amount * (smooth - images)


def noisy(images, amount):
    noise = torch.randn(images.shape, generator=generator(0, 0, "noise"))
    return images + 40 * amount * noise


def contaminated(images, amount):
    count = int(amount * len(images))
    return torch.cat(
        [
            images[count:],
            torch.randint(256, (count, *images.shape[1:]), generator=generator(0, 0, "x")),
        ]
    )


@pytest.mark.parametrize("change", [blurred, noisy, contaminated])
def test_the_distance_grows_with_what_is_wrong(classifier, pictures, change):
    first, reference = pictures[0], moments(extract(classifier, pictures[1]))
    images = [
        change(first, amount).round().clamp(0, 255).to(torch.uint8) for amount in (0, 0.1, 0.3, 1)
    ]
    found = [
        frechet_distance(moments(extract(classifier, changed)), reference) for changed in images
    ]
    assert found[1] > found[0] and found[2] > 1.5 * found[1] and found[3] > 1.5 * found[2]


def test_equal_populations_are_told_from_others(classifier, pictures):
    a, b = (extract(classifier, images) for images in pictures)
    kid, error = (compare_features(a, b)[key] for key in ("kid", "kid_standard_error"))
    assert abs(kid) < 3 * error
    other = extract(classifier, blurred(pictures[0], 1).round().to(torch.uint8))
    assert compare_features(other, b)["kid"] > 10 * error


@pytest.mark.slow
def test_the_script_trains_and_writes_such_a_file(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("train_features", FOLDER / "train.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_features", script)
    spec.loader.exec_module(script)
    data = leaves(64, 32)
    images, labels = data.images.permute(0, 2, 3, 1).numpy(), data.labels.numpy()
    splits = {
        f"{s}_{k}": v
        for s in ("train", "test")
        for k, v in (("images", images), ("labels", labels))
    }
    np.savez(tmp_path / "cifar10.npz", **splits, train_exact=np.arange(64) > 2)
    arguments = ["train.py", "--data-root", str(tmp_path), "--epochs", "40", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    about = json.loads((tmp_path / "cifar10-classifier.json").read_text())
    content = (tmp_path / "cifar10-classifier.pt").read_bytes()
    assert hashlib.sha256(content).hexdigest() == about["sha256"] and b"debug_pkl" not in content
    assert (
        about["accuracy"]["train"] > 0.3 and about["data"] == "cifar10, 3 of 128 images approximate"
    )
    features = extract(load_features(str(tmp_path / "cifar10-classifier.pt")), data.images)
    torch.testing.assert_close(features.std(0), torch.ones(64).double(), rtol=1e-3, atol=1e-3)
