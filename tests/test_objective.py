"""Identities between the losses of the three prediction types, on a denoiser whose optimum is known."""

import math

import pytest
import torch
from torch import nn
from toys import GaussianDenoiser

from dysigma.objective import OutputLayerGradients, predict, sample_losses
from dysigma.schedule import NoiseSchedule


def draws(size=512):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(size, 64, generator=g) * 0.5,
        torch.randn(size, 64, generator=g),
        torch.randint(0, 1000, (size,), generator=g),
    )


def test_losses_of_the_three_types_differ_by_the_snr_factors():
    schedule = NoiseSchedule.linear()
    x0, noise, timesteps = draws()
    losses = {
        kind: sample_losses(
            GaussianDenoiser(schedule, 0.5, kind), schedule, x0, noise, timesteps, kind
        ).double()
        for kind in ("sample", "epsilon", "v_prediction")
    }
    snr = schedule.log_snr[timesteps].exp()
    torch.testing.assert_close(losses["epsilon"], snr * losses["sample"], rtol=2e-2, atol=1e-6)
    torch.testing.assert_close(
        losses["v_prediction"], (1 + snr) * losses["sample"], rtol=2e-2, atol=1e-6
    )


def test_the_optimal_denoiser_attains_the_known_minimum():
    schedule = NoiseSchedule.linear()
    x0, noise, _ = draws(4096)
    for t in (50, 300, 900):
        timesteps = torch.full((4096,), t)
        loss = sample_losses(
            GaussianDenoiser(schedule, 0.5, "sample"), schedule, x0, noise, timesteps, "sample"
        ).mean()
        expected = 1 / (float(schedule.log_snr[t].exp()) + 1 / 0.5**2)
        assert math.isclose(float(loss), expected, rel_tol=0.02)


def test_losses_are_unreduced_and_float32_under_autocast():
    model = nn.Conv2d(1, 1, 3, padding=1)
    schedule = NoiseSchedule.cosine(10)
    with torch.autocast("cpu", torch.bfloat16):
        losses = sample_losses(
            lambda x, t: model(x),
            schedule,
            torch.rand(4, 1, 8, 8),
            torch.randn(4, 1, 8, 8),
            torch.arange(4),
        )
    assert losses.shape == (4,) and losses.dtype == torch.float32


def test_diffusers_outputs_dicts_and_tuples_are_unwrapped():
    x, t = torch.randn(2, 3), torch.zeros(2, dtype=torch.long)
    for packed in ((x,), [x, None], {"sample": x, "logvar": -x}, {"anything": x}):
        assert predict(lambda x, t, packed=packed: packed, x, t) is x
    for other in (None, {}, {"a": x, "b": x}, (), ("text",), 3.0):
        with pytest.raises(ValueError, match="must return a tensor"):
            predict(lambda x, t, other=other: other, x, t)
    with pytest.raises(ValueError, match=r"\(2, 6\).*\(2, 3\)"):
        predict(lambda x, t: torch.cat([x, x], 1), x, t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_gets_its_input_in_the_precision_of_its_weights(dtype):
    model, schedule = nn.Conv2d(1, 1, 3, padding=1).to(dtype), NoiseSchedule.cosine(10)
    x0, noise = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8)

    class Timeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = model

        def forward(self, x, timesteps):
            assert x.dtype == dtype
            return self.network(x)

    losses = sample_losses(Timeless(), schedule, x0, noise, torch.arange(4))
    exact = sample_losses(lambda x, t: model.float()(x), schedule, x0, noise, torch.arange(4))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=1e-2, atol=1e-3)


def test_a_schedule_on_another_device_is_named():
    schedule = NoiseSchedule.linear(10).to("meta")
    with pytest.raises(ValueError, match=r"meta.*cpu"):
        sample_losses(
            nn.Identity(), schedule, torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1])
        )


def test_errors_of_a_network_are_its_own():
    class Broken(nn.Module):
        def forward(self, x, timesteps):
            raise RuntimeError("no such type of layer")

    with pytest.raises(RuntimeError, match="no such type of layer"):
        predict(Broken(), torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))


def test_mismatched_noise_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        sample_losses(
            lambda x, t: x,
            NoiseSchedule.linear(10),
            torch.zeros(2, 3),
            torch.zeros(1, 3),
            torch.zeros(2, dtype=torch.long),
        )


def conv_network():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 3, 3, padding=1),  # by patches of the gradient
        nn.Conv2d(6, 2, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 3, 1),
        nn.Conv2d(2, 5, 3, padding=1),  # by patches of the input
        nn.Conv2d(6, 3, 3, padding=1, stride=2),
        nn.Conv2d(6, 3, 3, padding="same"),
        nn.Conv2d(6, 3, (3, 1)),
        nn.Conv2d(6, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 5, 3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)
def test_squares_of_a_last_convolution_are_those_of_autograd(layer):
    features = torch.randn(3, layer.in_channels, 8, 8)
    output = layer(features)
    gradient = torch.randn_like(output)
    found = OutputLayerGradients(layer).squares(features, gradient)
    for i in range(3):
        one = (output[i] * gradient[i]).sum()
        gradients = torch.autograd.grad(one, list(layer.parameters()), retain_graph=True)
        torch.testing.assert_close(found[i], sum(g.square().sum() for g in gradients))


def token_network():
    return nn.Sequential(nn.Linear(8, 6), nn.SiLU(), nn.Linear(6, 8, bias=False))


@pytest.mark.parametrize("make", [conv_network, token_network])
def test_gradient_norms_of_the_output_layer_are_those_of_single_samples(make):
    """Against autograd, one sample after the other, under weights that must not matter."""
    model, schedule = make(), NoiseSchedule.cosine(10)
    x0, noise = torch.randn(2, 5, 2, 8, 8)
    timesteps = torch.arange(5)

    def losses_of(part):
        return sample_losses(
            lambda x, t: model(x), schedule, x0[part], noise[part], timesteps[part]
        )

    with OutputLayerGradients(model) as output:
        losses = losses_of(slice(None))
        losses.retain_grad()
        (losses * torch.tensor([1.0, 3.0, 0.1, 0.0, 2.0])).mean().backward()
    found = output.squared_norms(losses)
    for i in range(5):
        gradients = torch.autograd.grad(
            losses_of(slice(i, i + 1)).sum(), list(model[-1].parameters())
        )
        wanted = sum(g.square().sum() for g in gradients)
        torch.testing.assert_close(found[i], wanted if i != 3 else torch.zeros(()))


def test_gradient_norms_need_a_layer_and_a_backward():
    with pytest.raises(ValueError, match="no nn"):
        OutputLayerGradients(nn.ReLU())
    with pytest.raises(ValueError, match="groups"):
        OutputLayerGradients(nn.Conv2d(4, 4, 3, groups=2))
    with (
        pytest.raises(RuntimeError, match="retain_grad"),
        OutputLayerGradients(nn.Linear(1, 1)) as o,
    ):
        o.squared_norms(torch.zeros(2))
