"""The fast path (bfloat16, channels last, compiled) against float32 on the same draws; nothing in a step waits."""

import copy
import dataclasses
import functools
import itertools

import pytest
import torch
from diffusers import DDPMPipeline

from dysigma import data, training
from dysigma import randomness as draws
from dysigma.data import ImageData
from dysigma.devices import fast_kernels
from dysigma.models import channels_last, make_model
from dysigma.runs import RunError, load_checkpoint
from dysigma.samplers import TIMESTEP_SAMPLERS
from dysigma.training import TrainConfig, build, iterate, load_split, train, train_step
from dysigma.weightings import WEIGHTINGS

SLOW = TrainConfig(
    model="micro", image_size=8, train_images=64, images=100 * 16, batch_size=16, warmup_images=320, seed=3,
    validation_images=8, validation_timesteps=5, device="cpu", precision="float32", compile=False,
)  # fmt: skip
FAST = dataclasses.replace(SLOW, precision="bfloat16", compile=True)
CPU = torch.device("cpu")


@pytest.fixture
def graphs(monkeypatch):
    """What was compiled, each graph once; traced and run without generated code, which takes long to make."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def gradient(config):
    images = load_split(config, "train", CPU)
    state = build(config, images)
    train_step(state, images, dataclasses.replace(config, grad_clip=1e9))
    return torch.cat([p.grad.flatten() for p in state.model.parameters()])


@pytest.mark.slow
def test_gradients_of_the_fast_path_agree(graphs):
    slow, fast = gradient(SLOW), gradient(FAST)
    assert 1e-6 < float((fast - slow).norm() / slow.norm()) < 1e-2


@pytest.mark.slow
def test_loss_curves_agree_and_nothing_is_compiled_twice(graphs):
    images, curves = load_split(SLOW, "train", CPU), []
    for config in (SLOW, FAST):
        records = list(iterate(build(config, images), images, config))
        curves.append(torch.stack([record.losses.mean() for record in records]))
    slow, fast = curves
    assert float(slow[-20:].mean()) < 0.6 * float(slow[:5].mean())
    torch.testing.assert_close(
        fast.view(5, 20).mean(1), slow.view(5, 20).mean(1), rtol=1e-2, atol=0
    )
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_a_compiled_run_leaves_what_any_run_leaves_and_resumes_as_one(tmp_path, graphs):
    """No name of the compiled wrapper in checkpoint or pipeline; a resume restores every memory format."""
    config = dataclasses.replace(FAST, images=64)
    whole = train(config, tmp_path / "whole", progress=False)
    names = set(load_checkpoint(whole.path / "checkpoint")[1])
    assert not any("_orig_mod" in name for name in names)
    plain = set(build(SLOW, load_split(SLOW, "train", CPU)).model.state_dict())
    assert {name.removeprefix("ema.") for name in names if name.startswith("ema.")} == plain
    assert set(DDPMPipeline.from_pretrained(whole.path / "pipeline").unet.state_dict()) == plain

    images = load_split(config, "train", CPU)
    states = [build(config, images) for _ in "ab"]
    for _ in itertools.islice(iterate(states[0], images, config), 4):
        pass
    tensors, rest = states[0].state_dict()
    states[1].load_state_dict(
        4, {name: value.clone().contiguous() for name, value in tensors.items()}, rest
    )
    for state in states:
        for parameter, values in state.optimizer.state.items():
            assert {v.stride() for v in values.values() if v.ndim} == {parameter.stride()}
        train_step(state, images, config)
    for a, b in zip(*(state.model.parameters() for state in states), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("preset", "size", "batch"), [("small", 16, 64), ("compact", 32, 2)])
def test_every_convolution_reads_channels_last_and_gives_the_same(preset, size, batch):
    """At 64 images and in training diffusers itself goes back to channels first in between."""
    plain = make_model(preset, size)
    model = copy.deepcopy(channels_last(copy.deepcopy(plain)))
    images, timesteps = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    wrong = []
    for name, module in model.named_modules():
        if (
            isinstance(module, torch.nn.Conv2d) and name != "conv_in"
        ):  # that gets the images as they are
            look = functools.partial(
                lambda name, module, given: wrong.append((name, given[0].stride())), name
            )
            module.register_forward_pre_hook(
                lambda m, given, look=look: (
                    None
                    if given[0].is_contiguous(memory_format=torch.channels_last)
                    else look(m, given)
                )
            )
    found = model(images, timesteps).sample
    torch.testing.assert_close(found, plain(images, timesteps).sample, rtol=1e-4, atol=1e-5)
    assert not wrong
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.slow
def test_no_number_of_a_step_crosses_to_the_host(monkeypatch):
    """Tensors on the device "meta" have shapes and no numbers: whoever asks for one gets an error."""
    real = draws.generator

    def elsewhere(seed, step, stream, device="cpu"):
        return None if torch.device(device).type == "meta" else real(seed, step, stream)

    monkeypatch.setattr(training.step, "generator", elsewhere)
    images = ImageData(torch.zeros(40, 3, 8, 8, dtype=torch.uint8)).to("meta")
    state = build(SLOW, images)
    assert len(train_step(state, images, dataclasses.replace(SLOW, accumulate=2)).losses) == 16

    # What follows is of weightings and samplers: a stand-in for the network is fast. Left out are
    # those that read a Gramian's bins, or the norms of gradients in the network's last layer: that
    # turns autocast off, which "meta" does not have.
    density = {"variant": "density", "observes": "losses"}
    cases = [{"weighting": name} for name in WEIGHTINGS if name not in ("gramian", "ugd")]
    for name in TIMESTEP_SAMPLERS:
        if name not in ("gradient-norm", "weighting"):
            cases.append({"weighting": "min-snr", "timestep_sampler": name})

    cases.append(
        {"weighting": "dy-sigma", "weighting_params": density, "timestep_sampler": "weighting"}
    )
    first = next(state.model.parameters())
    state.forward = lambda x_t, timesteps: x_t * first.sum()
    for changes in cases:
        config = dataclasses.replace(SLOW, **changes)
        _, weighting, sampler = training.make_parts(config)
        state.weighting = weighting.to("meta")
        state.sampler = sampler.to("meta")
        for _ in range(2):
            train_step(state, images, config)


def test_the_images_of_a_step_are_copied_as_bytes_and_not_waited_for(monkeypatch):
    """On CUDA every copy from the host is of pinned memory, and asynchronous; images are there already."""
    moved = []
    monkeypatch.setattr(
        data.dataset, "to_device", lambda values, device: moved.append(values) or values
    )
    monkeypatch.setattr(
        training.step, "to_device", lambda values, device: moved.append(values) or values
    )
    images = load_split(SLOW, "train", CPU)
    train_step(build(SLOW, images), images, SLOW)
    assert [values.numel() for values in moved] == [
        16,
        16,
        16,
    ]  # which images, which mirrored, timesteps
    assert images.images.dtype == torch.uint8


def test_a_batch_too_large_for_the_memory_gets_advice(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(training.step, "sample_losses", full)
    with pytest.raises(
        RunError,
        match=r"16 images in 1 parts.*--accumulate 2",
    ):
        train(SLOW, tmp_path / "run", progress=False)


def test_settings_of_the_process_are_left_as_they_were(monkeypatch):
    cuda = torch.device("cuda")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    with pytest.raises(KeyError), fast_kernels(cuda):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == (
            "high",
            True,
        )
        raise KeyError
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before


def test_compiled_code_with_wrong_gradients_is_not_used(tmp_path, monkeypatch):
    """torch 2.13.0 generated such code on one CPU, for the plain UNet of diffusers in float32; 2.14.1 no more."""

    class Wrong(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *inputs):
            out = self.model(*inputs)
            out.sample = 1.5 * out.sample - 0.5 * out.sample.detach()
            return out

    monkeypatch.setattr(torch, "compile", lambda model, fullgraph, dynamic: Wrong(model))
    config = dataclasses.replace(FAST, images=32)
    with pytest.warns(UserWarning, match=r"uncompiled.*gradients.*50%"):
        run = train(config, tmp_path / "run", progress=False, finish=False)
    assert run.summary["compile"].startswith("no: ")
    assert "50% off" in run.summary["compile"]


@pytest.mark.gpu
def test_on_a_gpu_a_step_does_not_wait_and_agrees():
    slow, fast = (
        dataclasses.replace(config, device="cuda", model="small", image_size=16)
        for config in (SLOW, FAST)
    )
    images = load_split(fast, "train", torch.device("cuda"))
    state = build(fast, images)
    train_step(state, images, fast)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, images, fast)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradients = []
    for config in (slow, fast):
        state = build(config, images)
        train_step(state, images, config)
        gradients.append(torch.cat([p.grad.flatten() for p in state.model.parameters()]))
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-2
