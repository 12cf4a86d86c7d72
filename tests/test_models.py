import pytest
import torch

from dysigma.models import EMA, PRESETS, count_parameters, make_model


def test_presets_have_the_sizes_they_promise():
    sizes = {name: count_parameters(make_model(name)) for name in PRESETS}
    assert sizes["tiny"] <= 200_000 < sizes["small"] < sizes["compact"] < sizes["ddpm"]
    assert (
        sizes["ddpm"] == 35_746_307
    )  # the CIFAR-10 network of Ho, Jain, Abbeel 2020, as in google/ddpm-cifar10-32


def test_a_model_keeps_the_shape_of_its_input_and_takes_labels():
    model = make_model("tiny", 16, channels=1, num_classes=3)
    x = torch.randn(2, 1, 16, 16)
    out = model(x, torch.tensor([0, 999]), class_labels=torch.tensor([0, 2])).sample
    assert out.shape == x.shape


@pytest.mark.parametrize(("preset", "size"), [("compact", 20), ("tiny", 15), ("ddpm", 8)])
def test_sizes_that_cannot_be_halved_are_refused(preset, size):
    with pytest.raises(ValueError, match="multiple of"):
        make_model(preset, size)


def test_unknown_preset_shows_the_choices():
    with pytest.raises(KeyError, match="compact"):
        make_model("big")


def test_ema_forgets_half_in_one_half_life():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = EMA(model, half_life=100, ramp=1e9)
    model.weight.data.fill_(1.0)
    for _ in range(10):
        ema.update(model, images_seen=10, batch_size=10)
    torch.testing.assert_close(ema.state["weight"], torch.full((1, 1), 0.5))


def test_ema_of_equal_images_does_not_depend_on_the_batch_size():
    model = torch.nn.Linear(1, 1, bias=False)
    averages = []
    for size in (5, 20):
        model.weight.data.fill_(0.0)
        ema = EMA(model, half_life=100, ramp=1e9)
        model.weight.data.fill_(1.0)
        for _ in range(100 // size):
            ema.update(model, images_seen=1, batch_size=size)
        averages.append(ema.state["weight"])
    torch.testing.assert_close(*averages)


def test_early_ema_follows_the_model_closely():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = EMA(model, half_life=1e6)
    model.weight.data.fill_(1.0)
    ema.update(model, images_seen=32, batch_size=32)
    assert float(ema.state["weight"]) > 0.99
