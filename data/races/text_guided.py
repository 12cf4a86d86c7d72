"""Adapt a small text-to-image model to two classes it has not seen, with five loss weightings.

    python data/races/text_guided.py --out data/runs/text-guided

Everything is trained from scratch: captions made from class names, one token per word, an embedding, and a
UNet2DConditionModel that reads it by cross-attention. For each seed one model is trained on eight classes with
const-eps; then every weighting fine-tunes a copy of it on the other two, on the same draws. Classes 8 and 9 are the
palette "frost" of leaves, ship and truck of CIFAR-10. An interrupted run goes on at the first entry that is missing.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

import dysigma
from dysigma.data import ImageData
from dysigma.evaluation import evaluation_timesteps, sample_images, validation_losses
from dysigma.images import save_grid
from dysigma.randomness import generator
from dysigma.runs import provenance, write_json

ARMS = ("const-eps", "const-x0", "min-snr", "uncertainty", "dy-sigma")
HELD_OUT = (8, 9)
TEMPLATES = {
    "leaves": ("{1} in {0}", "{0} {1}", "a picture of {1} in {0}"),  # palette, shape
    "cifar10": ("a photo of a {0}", "{0}", "a small picture of a {0}"),
}
WORDS_PER_CAPTION = 8


def captions(data: ImageData) -> list[str]:
    """The empty caption, then one for every class and template."""
    return [""] + [
        t.format(*name.split()) for name in data.class_names for t in TEMPLATES[data.name]
    ]


class TextToImage(nn.Module):
    """A U-Net that reads captions, called with their numbers as class_labels: so all tools of dysigma work on it."""

    def __init__(self, texts: list[str], size: int, width: int) -> None:
        super().__init__()
        words = sorted({word for text in texts for word in text.split()})
        rows = [[1 + words.index(word) for word in text.split()] for text in texts]
        table = torch.tensor([row + [0] * (WORDS_PER_CAPTION - len(row)) for row in rows])
        self.register_buffer("tokens", table, persistent=False)
        self.embed = nn.Embedding(1 + len(words), 2 * width)
        self.place = nn.Parameter(0.02 * torch.randn(WORDS_PER_CAPTION, 2 * width))
        self.norm = nn.LayerNorm(2 * width)
        self.unet = UNet2DConditionModel(
            sample_size=size,
            in_channels=3,
            out_channels=3,
            block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=2 * width,
            attention_head_dim=8,
        )

    def forward(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        text = self.norm(self.embed(self.tokens[class_labels]) + self.place)
        return self.unet(x_t, timesteps, encoder_hidden_states=text).sample


class Guided(nn.Module):
    """Classifier-free guidance (Ho, Salimans 2022): away from the empty caption, by a factor."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        told, free = (
            self.model(x_t, timesteps, labels) for labels in (class_labels, 0 * class_labels)
        )
        return free + self.factor * (told - free)


def fit(model, data, schedule, name, seed, args, images, phase, checkpoints=()):
    """Train in place with a weighting; returns the averaged model, and its validation losses at the checkpoints."""
    weighting = dysigma.make_weighting(name, schedule).to(data.images.device)
    group = {"params": list(model.parameters()), "lr": args.lr}
    optimizer = torch.optim.AdamW([group, *weighting.parameter_groups()], weight_decay=0.0)
    ema, judge, curve = dysigma.EMA(model, half_life=args.ema_half_life), copy.deepcopy(model), []
    device, per_class = data.images.device, len(TEMPLATES[data.name])
    for step in range(1, images // args.batch_size + 1):
        x0, labels, _ = dysigma.batch(data, seed, step, args.batch_size)
        draw = generator(seed, step, phase)
        timesteps = torch.randint(schedule.num_timesteps, (len(x0),), generator=draw).to(device)
        caption = (
            1 + labels.cpu() * per_class + torch.randint(per_class, (len(x0),), generator=draw)
        )
        caption[torch.rand(len(x0), generator=draw) < 0.1] = (
            0  # so that the model also learns to do without
        )
        noise = torch.randn(
            x0.shape, generator=generator(seed, step, f"{phase} noise", device), device=device
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = dysigma.sample_losses(
                model, schedule, x0, noise, timesteps, "epsilon", class_labels=caption.to(device)
            )
        loss = weighting(losses, timesteps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * min(
            1.0, step * args.batch_size / args.warmup_images
        )
        optimizer.step()
        ema.update(model, step * args.batch_size, args.batch_size)
        if step * args.batch_size in checkpoints:
            ema.copy_to(judge)
            curve.append(judge_losses(judge, args.test_new, schedule).tolist())
    ema.copy_to(judge)
    return judge, curve


def judge_losses(model, data, schedule):
    """Losses at 20 timesteps on fixed images, noise and captions (the first template)."""
    caption = 1 + data.labels * len(TEMPLATES[data.name])
    at = evaluation_timesteps(schedule.num_timesteps, 20)
    return validation_losses(model, data.images, schedule, timesteps=at, labels=caption)


def of_classes(data, classes, count):
    keep = (
        torch.isin(data.labels, torch.tensor(classes, device=data.labels.device))
        .nonzero()
        .flatten()[:count]
    )
    return ImageData(data.images[keep], data.labels[keep], data.name, data.class_names)


def histograms(images):
    """Shares of the 64 colours of two bits a channel: (N, 64)."""
    red, green, blue = (images >> 6).long().flatten(2).unbind(1)
    codes = red * 16 + green * 4 + blue
    return (
        images.new_zeros(len(images), 64, dtype=torch.float32).scatter_add_(
            1, codes, torch.ones_like(codes).float()
        )
        / codes.shape[1]
    )


def obedience(model, train, schedule, count, factor):
    """Sampled images of each held-out caption, and the share whose colours are nearest to those of a class held out.

    Nearest: of the mean histograms of all ten classes, in Hellinger distance. Two classes of ten are right, so that
    chance is near 0.2. Pictures of coloured noise can pass, so look at the samples too.
    """
    labels = torch.tensor(HELD_OUT).repeat_interleave(count // 2)
    caption = 1 + labels * len(TEMPLATES[train.name])
    shape = (count, *train.images.shape[1:])
    images = sample_images(Guided(model, factor), schedule, shape, num_steps=20, labels=caption)
    means = torch.stack(
        [histograms(train.images[train.labels == k]).mean(0) for k in range(10)]
    ).sqrt()
    nearest = torch.cdist(histograms(images).sqrt(), means).argmin(1)
    right = torch.isin(nearest, torch.tensor(HELD_OUT, device=nearest.device))
    return images, float(right.float().mean())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", choices=tuple(TEMPLATES), default="leaves")
    parser.add_argument("--data-root")
    parser.add_argument("--device", default="cpu")
    for name, default in {
        "size": 16, "width": 12, "seeds": 5, "batch-size": 32, "pretrain-images": 19_200, "images": 9_600,
        "warmup-images": 960, "train-new": 512, "test": 64, "samples": 32, "ema-half-life": 5_000,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-3)
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
    }
    settings.pop("out"), settings.pop("device"), settings.pop("data_root")
    options = {"root": args.data_root, "size": args.size}
    train, test = (
        dysigma.load_data(args.data, split=split, **options).to(args.device)
        for split in ("train", "test")
    )
    train.name = test.name = (
        args.data
    )  # which templates are meant, whatever file the images come from
    known = tuple(k for k in range(10) if k not in HELD_OUT)
    old, new = of_classes(train, known, len(train)), of_classes(train, HELD_OUT, args.train_new)
    test_old, args.test_new = (
        of_classes(test, known, args.test),
        of_classes(test, HELD_OUT, args.test),
    )
    schedule, texts = dysigma.NoiseSchedule.linear().to(args.device), captions(train)
    steps = args.images // args.batch_size
    checkpoints = sorted(
        {
            args.batch_size * max(1, round(steps * share))
            for share in (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1)
        }
    )
    path, started = args.out / "records.jsonl", provenance()
    done = (
        {
            tuple(json.loads(line)[k] for k in ("seed", "arm"))
            for line in path.read_text().splitlines()
        }
        if path.exists()
        else set()
    )
    write_json(
        args.out / "config.json",
        settings | {"arms": ARMS, "held_out": HELD_OUT, "checkpoints": checkpoints},
    )
    for seed in range(200, 200 + args.seeds):
        if all((seed, arm) in done for arm in ARMS):
            continue
        torch.manual_seed(seed)
        start = TextToImage(texts, args.size, args.width).to(args.device)
        start, _ = fit(
            start, old, schedule, "const-eps", seed, args, args.pretrain_images, "pretrain"
        )
        before = {"old": judge_losses(start, test_old, schedule).tolist()}
        before["new"] = judge_losses(start, args.test_new, schedule).tolist()
        for arm in (arm for arm in ARMS if (seed, arm) not in done):
            began = time.process_time()
            model, curve = fit(
                copy.deepcopy(start),
                new,
                schedule,
                arm,
                seed,
                args,
                args.images,
                "adapt",
                checkpoints,
            )
            record = {"seed": seed, "arm": arm, "losses": curve, "before": before}
            record["old_after"] = judge_losses(model, test_old, schedule).tolist()
            for factor in (1.0, 3.0):
                images, record[f"obedience_{factor:g}"] = obedience(
                    model, train, schedule, args.samples, factor
                )
            record |= {"parameters": sum(p.numel() for p in model.parameters())}
            record |= {"cpu_seconds": round(time.process_time() - began, 1), "provenance": started}
            if seed == 200:
                save_grid(
                    images, args.out / f"samples-{arm}.png", columns=args.samples // 2, scale=3
                )
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(
                seed,
                arm,
                [round(sum(row) / len(row), 4) for row in curve],
                record["obedience_3"],
                flush=True,
            )


if __name__ == "__main__":
    main()
