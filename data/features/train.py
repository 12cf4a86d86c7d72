"""Train a small classifier of CIFAR-10, whose features give a distance of images that needs no download.

    python data/features/train.py --data-root DIR --out data/features

Writes cifar10-classifier.pt, a TorchScript file from uint8 images (N, 1 or 3, H, W) of any size to 64 features, and
cifar10-classifier.json beside it. Each feature is divided by its standard deviation over the training images. The same
seed gives the same weights on one machine. Distances on these features are not FID.
"""

import argparse
import hashlib
import io
import time
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dysigma.data import ImageData, batch, load_data
from dysigma.models import count_parameters
from dysigma.runs import provenance, write_atomically, write_json


class Features(nn.Module):
    """Convolutions at three resolutions and the mean over positions, in units of `scale`."""

    def __init__(
        self, widths: tuple[int, ...] = (20, 40, 64), strides: tuple[int, ...] = (1, 2, 2)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width, stride in zip((3, *widths), widths, strides, strict=False):
            for i, o, s in ((before, width, stride), (width, width, 1)):
                layers += [nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("scale", torch.ones(widths[-1]))

    def forward(self, images: Tensor) -> Tensor:
        x = images.expand(-1, 3, -1, -1).float() / 127.5 - 1
        if x.shape[2] != 32 or x.shape[3] != 32:
            x = F.interpolate(x, [32, 32], mode="bilinear", align_corners=False, antialias=True)
        return self.layers(x).mean([2, 3]) / self.scale


@torch.no_grad()
def features(network: Features, images: Tensor) -> Tensor:
    """Features (N, 64) in evaluation mode."""
    network.eval()
    return torch.cat([network(part) for part in images.split(500)])


def fit(
    network: Features,
    head: nn.Linear,
    data: ImageData,
    epochs: int,
    seed: int,
    batch_size: int = 128,
) -> None:
    """Cross-entropy with one cycle of the learning rate, on mirrored images."""
    parameters, steps = (
        [*network.parameters(), *head.parameters()],
        epochs * len(data) // batch_size,
    )
    optimizer = torch.optim.SGD(parameters, 0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps, pct_start=0.2)
    network.train()
    start = time.perf_counter()
    for step in range(steps):
        x0, labels, _ = batch(data, seed, step, batch_size)
        images = x0.add(1).mul(127.5).round()
        loss = F.cross_entropy(head(network(images)), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 50 == 0:
            print(
                f"step {step} of {steps}: {float(loss.detach()):.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def torchscript(network: Features) -> bytes:
    """The file: batch norms folded into convolutions, and without the names of source files on this machine."""
    kept, frozen = io.BytesIO(), torch.jit.freeze(torch.jit.script(network.eval())).save_to_buffer()
    with zipfile.ZipFile(io.BytesIO(frozen)) as whole, zipfile.ZipFile(kept, "w") as file:
        for entry in whole.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                file.writestr(entry, whole.read(entry))
    return kept.getvalue()


def main() -> None:
    """Read the command line, train, test, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root")
    parser.add_argument("--train-images", type=int, help="only the first so many")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    train = load_data("cifar10", root=args.data_root, num_images=args.train_images)
    test = load_data("cifar10", root=args.data_root, split="test")
    torch.manual_seed(args.seed)
    network, head = Features(), nn.Linear(64, 10)
    fit(network, head, train, args.epochs, args.seed)
    accuracy = {
        split: float((head(features(network, data.images)).argmax(1) == data.labels).float().mean())
        for split, data in (("train", train), ("test", test))
    }
    network.scale.copy_(features(network, train.images).std(0))
    if not (network.scale > 0).all():
        raise ValueError(
            "a feature is the same for all images: train longer, or from another --seed"
        )
    path, content = args.out / "cifar10-classifier.pt", torchscript(network)
    write_atomically(path, content)
    approximate = sum(len(data) - len(data.originals) for data in (train, test))
    about = {"sha256": hashlib.sha256(content).hexdigest(), "accuracy": accuracy}
    about |= {"data": f"cifar10, {approximate} of {len(train) + len(test):,} images approximate"}
    about |= {
        "seed": args.seed,
        "epochs": args.epochs,
        "parameters": count_parameters(network),
        "features": 64,
    }
    write_json(path.with_suffix(".json"), about | {"provenance": provenance()})
    print(about)


if __name__ == "__main__":
    main()
