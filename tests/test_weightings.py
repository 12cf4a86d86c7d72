"""Weightings: closed forms, other people's code where it is right, fixed points, and behaviour in a training loop."""

import copy
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dysigma.bins import Bins
from dysigma.pareto import min_norm_weights
from dysigma.samplers import make_sampler
from dysigma.schedule import SCHEDULES, NoiseSchedule, make_schedule
from dysigma.testing import check_weighting
from dysigma.weightings import (
    GRAMIAN_RULES,
    PREDEFINED,
    SCALARIZATION_RULES,
    VARIANTS,
    WEIGHTINGS,
    DySigma,
    effective_sample_size,
    fluctuation,
    log_conversion,
    make_weighting,
    share_changed,
)
from dysigma.weightings.formulas import log_error_factor

# Those of the variance-preserving path.
SCHEDULES = {name: make for name, make in SCHEDULES.items() if name != "flow"}

LINEAR = NoiseSchedule.linear(1000)
VP_TYPES = ("sample", "epsilon", "v_prediction")
# A short schedule that spans SNR 300 .. 0.002, for tests that visit every timestep.
SHORT = NoiseSchedule(torch.sigmoid(torch.linspace(5.7, -6.2, 12, dtype=torch.float64)))
# The variants that learn weights; "density" has tests of its own in test_density.py.
WEIGHING = [name for name, rule in VARIANTS.items() if not rule.density]
OF_DENSITY = {"variant": "density", "observes": "losses"}
# Every weighting that make_weighting can make, Dy-Sigma in all variants.
KINDS = [(name, {}) for name in WEIGHTINGS if name != "dy-sigma"]
KINDS += [("dy-sigma", {"variant": variant}) for variant in WEIGHING]
KINDS += [
    ("dy-sigma", OF_DENSITY),
    ("uncertainty", {"fourier": True}),
    ("dy-sigma", {"fourier": True, "floor": "online", "variant": "tilt"}),
]
IDS = ["-".join([name, *map(str, params.values())]) for name, params in KINDS]
every_kind = pytest.mark.parametrize(("name", "params"), KINDS, ids=IDS)


def random_gramian(size, seed=0):
    gradients = torch.randn(
        size, size + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    gradients *= torch.logspace(-0.5, 0.5, size, dtype=torch.float64)[:, None]
    return gradients @ gradients.T


def batches(count, size=24, num_timesteps=1000, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        timesteps = torch.randint(num_timesteps, (size,), generator=draw)
        losses = (0.02 + timesteps / num_timesteps) * (0.5 + torch.rand(size, generator=draw))
        yield losses, timesteps


def train(weighting, steps, lr=0.02, size=24, seed=0, gramian_every=5):
    """Some steps with random losses, so that the state of the weighting is nothing special."""
    groups = weighting.parameter_groups(lr)
    optimizer = torch.optim.Adam(groups) if groups else None
    for step, (losses, timesteps) in enumerate(batches(steps, size, weighting.num_timesteps, seed)):
        if weighting.needs_gramian and step % gramian_every == 0:
            weighting.observe_gramian(random_gramian(weighting.bins.num_bins, seed + step))
        loss = weighting(losses.requires_grad_(), timesteps)
        if optimizer is not None:
            optimizer.zero_grad()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
    return weighting


def settle(weighting, losses, steps=350, lr=0.3):
    """Every timestep once a step with constant losses (T,), until the parameters rest; returns weights()."""
    timesteps = torch.arange(weighting.num_timesteps)
    optimizer = torch.optim.Adam(weighting.parameter_groups(lr), betas=(0.8, 0.9))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    for _ in range(steps):
        optimizer.zero_grad()
        weighting(losses, timesteps).backward()
        optimizer.step()
        schedule.step()
    return weighting.weights()


# ---------------------------------------------------------------- predefined: closed forms

# Weights on the x0 error as the papers write them, of S = SNR.
X0_FORMULAS = {
    "const-x0": lambda S: torch.ones_like(S),
    "const-eps": lambda S: S,
    "const-v": lambda S: S + 1,
    "truncated-snr": lambda S: S.clamp(min=1),
    "min-snr": lambda S: S.clamp(max=5),
    "max-snr": lambda S: S.clamp(min=5),
    "soft-min-snr": lambda S: 4 * S / (S + 4),
    "p2": lambda S: S / (1 + S),
    "debiased": lambda S: S.sqrt(),
    "edm": lambda S: S + 1 / 0.5**2,
    "sigmoid": lambda S: S / (1 + S * math.exp(-2.0)),
    "elbo": lambda S: torch.cat([S[:1] * (S[0] / S[1] - 1) / 2, -S.diff() / 2]),
    "split": lambda S: S,
}
X0_FORMULAS["const-flow"] = lambda S: (1 + S.sqrt()) ** 2
ERROR_RATIO = {
    "sample": lambda S: torch.ones_like(S),
    "epsilon": lambda S: S,
    "v_prediction": lambda S: S + 1,
}
ERROR_RATIO["flow_prediction"] = X0_FORMULAS["const-flow"]
PATHS = [(name, kind) for name in SCHEDULES for kind in VP_TYPES] + [
    ("flow", "sample"),
    ("flow", "flow_prediction"),
]


@pytest.mark.parametrize(("schedule_name", "kind"), PATHS)
@pytest.mark.parametrize("name", X0_FORMULAS)
def test_predefined_weights_equal_the_papers_formulas(name, kind, schedule_name):
    schedule = NoiseSchedule.flow() if schedule_name == "flow" else make_schedule(schedule_name)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    wanted = X0_FORMULAS[name](snr) / ERROR_RATIO[kind](snr)
    ours = make_weighting(name, schedule, kind, normalize=False).weights()
    torch.testing.assert_close(ours.double(), wanted, rtol=2e-6, atol=0)
    normalized = make_weighting(name, schedule, kind).weights()
    torch.testing.assert_close(normalized.double(), wanted / wanted.mean(), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "params", "formula"),
    [
        ("min-snr", {"gamma": 2.0}, lambda S: S.clamp(max=2)),
        ("max-snr", {"gamma": 1}, lambda S: S.clamp(min=1)),
        ("truncated-snr", {"gamma": 3.0}, lambda S: S.clamp(min=3)),
        ("soft-min-snr", {"gamma": 5.0}, lambda S: 5 * S / (S + 5)),
        ("p2", {"k": 2.0, "gamma": 0.5}, lambda S: S / (2 + S).sqrt()),
        ("edm", {"sigma_data": 0.25}, lambda S: S + 16),
        ("sigmoid", {"bias": -3.0}, lambda S: S / (1 + S * math.exp(3.0))),
        ("split", {"ratio": 8.0, "at": -2.0}, lambda S: torch.where(S.log() > -2.0, 8 * S, S)),
    ],
)
def test_parameters_of_predefined_weights(name, params, formula):
    snr = LINEAR.log_snr.exp()
    ours = make_weighting(name, LINEAR, "sample", normalize=False, **params).weights()
    torch.testing.assert_close(ours.double(), formula(snr), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", PREDEFINED)
def test_every_predefined_weighting_says_its_equation(name):
    assert PREDEFINED[name].__doc__.startswith("w = "), f"{name}: docstring opens with 'w = ...'"


def test_the_elbo_weight_is_that_of_the_variational_bound():
    # Ho, Jain, Abbeel 2020: beta_t^2 / (2 sigma_t^2 alpha_t (1 - bar_t)) on the epsilon error, with the variance of the
    # posterior, sigma_t^2 = beta_t (1 - bar_(t-1)) / (1 - bar_t); it exists from the second timestep on.
    bar = LINEAR.alphas_cumprod
    beta = 1 - bar[1:] / bar[:-1]
    variance = beta * (1 - bar[:-1]) / (1 - bar[1:])
    wanted = beta**2 / (2 * variance * (1 - beta) * (1 - bar[1:]))
    ours = make_weighting("elbo", LINEAR, "epsilon", normalize=False).weights()[1:]
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=0)


@given(st.floats(-30, 20), st.floats(0.01, 100))
def test_the_soft_minimum_lies_within_a_factor_two_of_the_minimum(log_snr, gamma):
    at = torch.tensor([log_snr], dtype=torch.float64)
    hard, soft = (PREDEFINED[name](at, gamma=gamma) for name in ("min-snr", "soft-min-snr"))
    assert hard - math.log(2) - 1e-9 <= soft <= hard + 1e-9


def test_identities_between_weightings():
    def weights(name, **params):
        return make_weighting(name, LINEAR, **params).weights()

    close = {"rtol": 1e-5, "atol": 0}
    torch.testing.assert_close(
        weights("soft-min-snr", gamma=5.0), weights("sigmoid", bias=math.log(5)), **close
    )
    torch.testing.assert_close(
        weights("soft-min-snr", gamma=5.0), weights("p2", k=5.0, gamma=1.0), **close
    )
    torch.testing.assert_close(weights("truncated-snr", gamma=5.0), weights("max-snr"), **close)
    torch.testing.assert_close(weights("edm", sigma_data=1.0), weights("const-v"), **close)


@every_kind
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_weights_are_finite_positive_and_of_mean_one(name, params, zero_terminal_snr):
    for schedule_name in SCHEDULES:
        schedule = make_schedule(schedule_name, zero_terminal_snr=zero_terminal_snr)
        for kind in VP_TYPES[:: 1 + zero_terminal_snr]:
            weighting = make_weighting(name, schedule, kind, **params)
            weights = weighting.weights()
            assert (
                weights.shape == (1000,)
                and weights.dtype == torch.float32
                and not weights.requires_grad
            )
            assert torch.isfinite(weights).all() and (weights >= 0).all()
            torch.testing.assert_close(
                weights.double().mean(), torch.tensor(1.0).double(), rtol=1e-5, atol=0
            )


@every_kind
def test_epsilon_at_zero_snr_is_refused_when_constructed(name, params):
    with pytest.raises(ValueError, match=r"zero terminal SNR.*v_prediction"):
        make_weighting(name, NoiseSchedule.linear(100, zero_terminal_snr=True), "epsilon", **params)


# ---------------------------------------------------------------- predefined: other people's code, and their bugs


@pytest.mark.slow
def test_min_snr_agrees_with_the_diffusers_training_scripts():
    from diffusers.training_utils import compute_snr

    scheduler = LINEAR.to_diffusers()
    snr = compute_snr(scheduler, torch.arange(1000)).double()
    clipped = snr.clamp(max=5)
    for kind, wanted in {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1)}.items():
        ours = make_weighting(
            "min-snr", NoiseSchedule.from_diffusers(scheduler), kind, normalize=False
        ).weights()
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-3, atol=1e-7)


def test_min_snr_agrees_with_denoising_diffusion_pytorch(lucidrains):
    class Network(nn.Module):
        channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 3, 3, False, False

    objectives = {"epsilon": "pred_noise", "sample": "pred_x0", "v_prediction": "pred_v"}
    for kind, objective in objectives.items():
        theirs = lucidrains.GaussianDiffusion(
            Network(),
            image_size=8,
            objective=objective,
            beta_schedule="linear",
            min_snr_loss_weight=True,
        )
        schedule = NoiseSchedule(theirs.alphas_cumprod.double())
        ours = make_weighting("min-snr", schedule, kind, normalize=False).weights()
        torch.testing.assert_close(ours, theirs.loss_weight, rtol=1e-3, atol=1e-6)


def test_min_snr_for_v_is_none_of_the_formulas_in_circulation():
    snr = LINEAR.log_snr.exp()
    ours = make_weighting("min-snr", LINEAR, "v_prediction", normalize=False).weights().double()
    torch.testing.assert_close(ours, snr.clamp(max=5) / (snr + 1), rtol=1e-5, atol=0)
    plus_one = snr.clamp(max=5) / snr + 1  # still in example scripts
    inside = (snr + 1).clamp(max=5) / (snr + 1)  # for a while in the others
    assert ours[0] < plus_one[0] / 1000 and ours[-1] < plus_one[-1] / 1000
    assert ours[-1] < inside[-1] / 1000


def test_min_snr_clips_from_above():
    weights = make_weighting("min-snr", LINEAR, normalize=False).weights()
    assert (
        weights.max() == 1 and weights.min() < 1e-3
    )  # max(SNR, 5) / SNR in place of min is >= 1 everywhere
    assert make_weighting("max-snr", LINEAR, normalize=False).weights().min() == 1


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_zero_terminal_snr_gives_the_limit_where_the_usual_formula_gives_nan(kind):
    schedule = NoiseSchedule.linear(1000, zero_terminal_snr=True)
    snr = schedule.log_snr.exp()
    assert torch.isnan((snr.clamp(max=5) / snr)[-1])
    weights = make_weighting("min-snr", schedule, kind, normalize=False).weights()
    assert weights[-1] == 0 and weights[-2] < 1e-4  # no jump to 1 at the last step either
    assert make_weighting("const-x0", schedule, kind, normalize=False).weights()[-1] == 1


# ---------------------------------------------------------------- one scale: the same step for every kind of network


class TinyDenoiser(nn.Module):
    """One network for x0, read as a predictor of any target."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()

    def output(self, schedule, x_t, timesteps, kind):
        x0 = self.net(torch.cat([x_t, schedule.alphas_cumprod[timesteps, None]], 1))
        alpha, sigma = (
            schedule.alphas_cumprod[timesteps, None] ** 0.5,
            (1 - schedule.alphas_cumprod[timesteps, None]) ** 0.5,
        )
        noise = (x_t - alpha * x0) / sigma
        return {"sample": x0, "epsilon": noise, "v_prediction": alpha * noise - sigma * x0}[kind]


def parameter_gradient(weighting, kind, timesteps):
    torch.manual_seed(3)
    model = TinyDenoiser()
    x0, noise = torch.randn(2, len(timesteps), 4, dtype=torch.float64)
    bar = SHORT.alphas_cumprod[timesteps, None]
    x_t = bar**0.5 * x0 + (1 - bar) ** 0.5 * noise
    target = {
        "sample": x0,
        "epsilon": noise,
        "v_prediction": bar**0.5 * noise - (1 - bar) ** 0.5 * x0,
    }[kind]
    losses = (model.output(SHORT, x_t, timesteps, kind) - target).square().mean(1)
    weighting(losses, timesteps).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


SAME_IN_EVERY_TARGET = [(name, {}) for name in PREDEFINED]
SAME_IN_EVERY_TARGET += [
    ("dy-sigma", {"variant": v}) for v in ("anchored", "inside", "excess", "tilt")
]


@pytest.mark.parametrize(("name", "params"), SAME_IN_EVERY_TARGET)
def test_the_gradient_of_the_network_does_not_depend_on_its_target(name, params):
    timesteps = torch.arange(12).repeat(3)
    gradients, learned = [], []
    for kind in VP_TYPES:
        options = params if name in PREDEFINED else params | {"bins": 6}
        weighting = make_weighting(name, SHORT, kind, normalize=False, **options)
        groups = weighting.parameter_groups(0.1)
        for _ in range(
            5 * len(groups)
        ):  # some steps of the learned part, from the losses of this target
            optimizer = torch.optim.SGD(groups)
            optimizer.zero_grad()
            parameter_gradient(weighting, kind, timesteps)
            optimizer.step()
        learned += [p.detach().clone() for p in weighting.parameters()]
        gradients.append(parameter_gradient(weighting, kind, timesteps))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=2e-5, atol=1e-6)
    for other in learned[1:]:
        torch.testing.assert_close(other, learned[0], rtol=1e-4, atol=1e-6)
        assert other.abs().max() > 1e-3


def weights_on_x0(weighting):
    """Of mean 1, on the error of x0."""
    log_weights = weighting.weights().double().log() - weighting.log_conversion
    return (log_weights.softmax(0) * len(log_weights)).numpy()


@pytest.mark.slow
def test_uncertainty_at_rest_does_not_depend_on_the_target_but_starts_from_it():
    x0_losses = torch.rand(12, generator=torch.Generator().manual_seed(0)).double() + 0.1
    start, rest = [], []
    for kind in VP_TYPES:
        losses = x0_losses * (-log_conversion(SHORT.log_snr, kind)).exp()
        weighting = make_weighting("uncertainty", SHORT, kind, bins=12)
        start.append(weights_on_x0(weighting))
        settle(weighting, losses.float())
        rest.append(weights_on_x0(weighting))
    np.testing.assert_allclose(rest[1:], [rest[0]] * 2, rtol=1e-3)
    assert max(start[0] / start[1]) > 5


# ---------------------------------------------------------------- laws, and noise levels between timesteps


@every_kind
def test_every_weighting_keeps_the_laws(name, params):
    check_weighting(name, **params)


def gradient_at(weighting, log_snr, importance=None):
    losses = torch.full_like(log_snr, 0.5, dtype=torch.float32, requires_grad=True)
    weighting.at(losses, log_snr, importance).backward()
    return losses.grad * len(losses)


@pytest.mark.parametrize(("schedule_name", "kind"), PATHS)
def test_predefined_weights_are_exact_at_any_noise_level(schedule_name, kind):
    schedule = (
        NoiseSchedule.flow(50) if schedule_name == "flow" else make_schedule(schedule_name, 50)
    )
    log_snr = torch.linspace(-12, 12, 77, dtype=torch.float64)  # beyond the timesteps too
    for name in X0_FORMULAS:
        snr = log_snr.exp()
        weighting = make_weighting(name, schedule, kind, normalize=False)
        if name != "elbo":  # a difference of neighbours
            wanted = X0_FORMULAS[name](snr) / ERROR_RATIO[kind](snr)
            torch.testing.assert_close(
                gradient_at(weighting, log_snr).double(), wanted, rtol=1e-5, atol=0
            )
        scale = make_weighting(name, schedule, kind).weights()[20] / weighting.weights()[20]
        normalized = gradient_at(make_weighting(name, schedule, kind), log_snr)
        torch.testing.assert_close(
            normalized, scale * gradient_at(weighting, log_snr), rtol=1e-5, atol=0
        )


def test_between_timesteps_what_is_learned_is_linear_in_log_snr_and_beyond_constant():
    weighting = train(make_weighting("dy-sigma", SHORT, "sample", bins=12), 30, lr=0.2).eval()
    prior = make_weighting("min-snr", SHORT, "sample", normalize=False).weights()
    boost = (weighting.weights() / prior).double()
    high, low = SHORT.log_snr[:-1], SHORT.log_snr[1:]
    for share in (0.25, 0.6):
        level = high + share * (low - high)
        wanted = level.exp().clamp(max=5) * (boost[:-1] + share * boost.diff())
        torch.testing.assert_close(
            gradient_at(weighting, level).double(), wanted, rtol=1e-5, atol=0
        )
    beyond = torch.tensor([20.0, -20.0])
    wanted = beyond.exp().clamp(max=5) * boost[[0, -1]]
    torch.testing.assert_close(gradient_at(weighting, beyond), wanted.float(), rtol=1e-5, atol=0)
    elbo = make_weighting("elbo", SHORT, "sample", normalize=False)
    middle = gradient_at(elbo, (high + low) / 2)
    torch.testing.assert_close(
        middle, (elbo.weights()[1:] + elbo.weights()[:-1]) / 2, rtol=1e-5, atol=0
    )


def test_between_timesteps_the_nearest_one_learns():
    gap = SHORT.log_snr[4] - SHORT.log_snr[5]
    for name, params in (("dy-sigma", {"bins": 12}), ("loss-balance", {"bins": 12})):
        for share, nearest in ((0.4, 4), (0.6, 5)):
            off, on = (make_weighting(name, SHORT, **params) for _ in range(2))
            off.at(torch.tensor([0.7]), SHORT.log_snr[4:5] - share * gap)
            on(torch.tensor([0.7]), torch.tensor([nearest]))
            assert all(
                torch.equal(value, on.state_dict()[key]) for key, value in off.state_dict().items()
            )


@pytest.mark.parametrize("kind", ["sample", "flow_prediction"])
def test_no_signal_is_a_level_too(kind):
    flow = NoiseSchedule.flow(20)
    for name in ("min-snr", "const-x0", "dy-sigma", "uncertainty", "elbo"):
        weighting = make_weighting(name, flow, kind)
        levels = torch.tensor([-torch.inf, float(flow.log_snr[3])])
        torch.testing.assert_close(
            gradient_at(weighting, levels), weighting.weights()[[19, 3]], rtol=1e-5, atol=1e-9
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["min-snr", "elbo", "dy-sigma"])
def test_noise_levels_compile_to_one_graph(name):
    torch._dynamo.reset()
    one, other = make_weighting(name, LINEAR), make_weighting(name, LINEAR)
    losses, levels = torch.rand(6), torch.linspace(-5, 5, 6)
    compiled = torch.compile(one.at, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(losses, levels), other.at(losses, levels))


def test_bad_noise_levels_are_refused():
    weighting = make_weighting("min-snr", LINEAR)
    good = torch.zeros(3)
    bad = [good[:2], good.long(), good + torch.nan, good + torch.inf, good - torch.inf]
    for log_snr in bad:
        with pytest.raises(ValueError, match=r"log_snr.*\(3,\).*finite"):
            weighting.at(torch.rand(3), log_snr)
    with pytest.raises(ValueError, match="finite or -inf"):
        make_weighting("min-snr", LINEAR, "v").at(torch.rand(3), good + torch.inf)
    with pytest.raises(ValueError, match="losses must"):
        weighting.at(torch.rand(3, 1), good)


POINTWISE = {
    "a lambda": lambda x: 0.3 * x,
    "with a branch": lambda x: torch.where(x > 0.1, x, x / 2),
    "through numpy": lambda x: torch.from_numpy(np.sqrt(1 + x.numpy() ** 2)),
    "in float32": lambda x: (x / 3).float(),
}
IN_COMPANY = {
    "gradient": lambda x: torch.gradient(x)[0].abs().log(),
    "second difference": lambda x: torch.gradient(torch.gradient(x)[0])[0].abs() / 10,
    "mean": lambda x: -(x - x.mean()).abs() / 4,
    "standard deviation": lambda x: x / x.std(),
    "maximum": lambda x: x - x.max(),
    "median": lambda x: x.clamp(max=float(x.median())),
    "rank": lambda x: x.argsort().argsort().double() / len(x),
    "quantile": lambda x: (x > x.quantile(0.7)).double(),
    "sum": lambda x: x.softmax(0).log(),
    "running sum": lambda x: x.cumsum(0) / 100,
    "number of levels": lambda x: torch.linspace(0, 1, len(x), dtype=torch.float64),
    "first level": lambda x: (x == x[0]).double(),
    "table": lambda x: torch.arange(12.0, dtype=torch.float64).sin(),
    "random": lambda x: torch.rand(len(x), dtype=torch.float64),
}


@pytest.mark.parametrize("kind", VP_TYPES)
@pytest.mark.parametrize("name", POINTWISE)
def test_at_is_exact_for_own_formulas_of_the_level(name, kind):
    formula = POINTWISE[name]
    weighting = make_weighting(formula, SHORT, kind, normalize=False)
    levels = torch.linspace(-8, 8, 29, dtype=torch.float64)  # beyond the timesteps too
    wanted = formula(levels).double().exp() / ERROR_RATIO[kind](levels.exp())
    torch.testing.assert_close(gradient_at(weighting, levels).double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("levels", ["linear in t", "uneven"])
@pytest.mark.parametrize("name", IN_COMPANY)
def test_at_interpolates_own_formulas_that_look_at_other_levels(name, levels):
    schedule = SHORT if levels == "linear in t" else NoiseSchedule.linear(12, beta_end=0.9)
    weighting = make_weighting(IN_COMPANY[name], schedule, "sample")
    table = weighting.weights()
    on_timesteps = gradient_at(weighting, schedule.log_snr[[7, 2, 2, 11, 0]])
    torch.testing.assert_close(on_timesteps, table[[7, 2, 2, 11, 0]], rtol=1e-5, atol=1e-9)
    middle = (schedule.log_snr[1:] + schedule.log_snr[:-1]) / 2
    wanted = (table[1:] + table[:-1]) / 2
    torch.testing.assert_close(gradient_at(weighting, middle), wanted, rtol=1e-5, atol=1e-9)
    alone = torch.cat([gradient_at(weighting, middle[i : i + 1]) for i in range(len(middle))])
    torch.testing.assert_close(alone, wanted, rtol=1e-5, atol=1e-9)


def test_a_formula_is_asked_as_such_where_the_level_alone_decides():
    exact = [name for name in PREDEFINED if make_weighting(name, LINEAR).formula[0] == name]
    assert "elbo" not in exact and set(X0_FORMULAS) - set(exact) == {"elbo"}


def test_where_a_formula_has_no_weight_others_keep_theirs():
    weighting = make_weighting("split", SHORT, "sample", normalize=False, ratio=0)
    levels = SHORT.log_snr
    wanted = torch.where(levels > 0, 0.0, levels.exp())
    torch.testing.assert_close(weighting.weights().double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient_at(weighting, levels).double(), wanted, rtol=1e-5, atol=0)


# ---------------------------------------------------------------- one bad step


GUARDED = [("dy-sigma", {"variant": variant}) for variant in WEIGHING] + [("dy-sigma", OF_DENSITY)]
GUARDED += [(name, {}) for name in ("uncertainty", "loss-balance", "variance-aware", "ugd")]


@pytest.mark.parametrize(("name", "params"), GUARDED)
def test_a_step_that_a_grad_scaler_skips_changes_no_later_one(name, params):
    ends = {}
    for value in (None, math.nan, math.inf, 1e30):
        torch.manual_seed(0)
        net = nn.Linear(4, 4)
        weighting = make_weighting(name, LINEAR, **params)
        groups = [{"params": list(net.parameters())}, *weighting.parameter_groups()]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(12):
            x = torch.randn(8, 4)
            timesteps = torch.randint(1000, (8,))
            if step == 4 and value is None:
                continue  # never happened
            losses = (net(x) - x).square().mean(1)
            if step == 4:
                losses = losses * torch.full((8,), value)
            loss = weighting(losses, timesteps)
            assert bool(loss.isfinite()) == (step != 4 or value == 1e30)
            if step == 4 and value == 1e30:
                continue  # a guard by size
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert all(bool(tensor.isfinite().all()) for tensor in weighting.state_dict().values())
        ends[value] = weighting.weights()
    without = ends.pop(None)
    for end in ends.values():  # the empty step counts in half-lives only
        torch.testing.assert_close(end, without, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("is_flow", [False, True])
def test_the_error_factor_of_v_has_its_limits_at_both_ends(is_flow):
    ends = torch.tensor([math.inf, -math.inf])
    assert log_error_factor(ends, "v_prediction", is_flow).exp().tolist() == [math.inf, 1.0]


def test_importance_that_is_not_finite_is_no_importance():
    one, other = (make_weighting("dy-sigma", LINEAR) for _ in range(2))
    (losses, timesteps), importance = next(batches(1, 4)), torch.ones(4)
    one(losses, timesteps, importance.index_fill(0, torch.tensor([1]), math.nan))
    other(losses, timesteps, importance.index_fill(0, torch.tensor([1]), 0.0))
    assert torch.equal(one.running, other.running)


def test_a_bin_of_masked_losses_is_average_and_one_of_tiny_losses_is_finite():
    schedule = NoiseSchedule(torch.tensor([0.9, 0.7, 0.4, 0.1]))
    weighting = make_weighting("loss-balance", schedule, bins=4)
    losses = torch.tensor([0.0, 0.4, 1.0, 2.0])
    weighting(losses, torch.arange(4))
    wanted = torch.cat([1 / losses.mean()[None], 1 / losses[1:]])
    torch.testing.assert_close(weighting.weights(), wanted / wanted.mean(), rtol=1e-5, atol=0)
    for strength in (1, 8, 100):
        weighting = make_weighting("loss-balance", schedule, bins=4, strength=strength)
        weighting(torch.tensor([1e-30, 0.4, 1.0, 2.0]), torch.arange(4))
        assert weighting.weights().isfinite().all()


@pytest.mark.parametrize("name", ["loss-balance", "variance-aware"])
def test_a_batch_of_zeros_prefers_no_bin(name):
    weighting = make_weighting(name, SHORT, bins=4)
    weighting(torch.zeros(12), torch.arange(12))
    torch.testing.assert_close(weighting.weights(), torch.ones(12))


def test_a_first_batch_without_importance_teaches_nothing():
    weighting = make_weighting("dy-sigma", SHORT, bins=4)
    losses = LOSSES.clone().requires_grad_()
    weighting(losses, torch.arange(12), torch.zeros(12)).backward()
    assert not weighting.coefficients.grad.any() and not weighting.running.any()


# ---------------------------------------------------------------- fixed points

LOSSES = torch.tensor([3e-3, 5e-3, 8e-3, 0.013, 0.02, 0.04, 0.07, 0.1, 0.17, 0.3, 0.6, 0.9])


def relative(weighting, losses=LOSSES):
    z = make_weighting("min-snr", SHORT).weights() * losses
    return (z / z.mean()).double()


def test_uncertainty_rests_at_one_over_the_loss():
    weighting = make_weighting("uncertainty", SHORT, normalize=False, bins=12)
    torch.testing.assert_close(settle(weighting, LOSSES), 1 / LOSSES, rtol=1e-3, atol=0)
    torch.testing.assert_close(weighting.log_variances().detach(), LOSSES.log(), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_uncertainty_on_white_gaussian_data_becomes_edm():
    # The optimal denoiser of N(0, v) data has x0 error 1 / (SNR + 1 / v).
    snr = SHORT.log_snr.exp()
    losses = {"sample": 1 / (snr + 1 / 0.25), "epsilon": snr / (snr + 1 / 0.25)}
    for kind, loss in losses.items():
        weighting = make_weighting("uncertainty", SHORT, kind, bins=12)
        edm = make_weighting("edm", SHORT, kind, sigma_data=0.5).weights()
        torch.testing.assert_close(settle(weighting, loss.float()), edm, rtol=2e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [0.25, 1.0, 4.0])
def test_anchored_rests_at_the_lambert_point(kappa):
    from scipy.special import lambertw

    weighting = make_weighting("dy-sigma", SHORT, kappa=kappa, bins=12)
    z = relative(weighting)
    wanted = torch.tensor(lambertw((z / kappa * math.exp(1 / kappa)).numpy()).real - 1 / kappa)
    torch.testing.assert_close(weighting.fixed_point(z), wanted, rtol=1e-9, atol=1e-9)
    settle(weighting, LOSSES)
    torch.testing.assert_close(
        weighting.log_variances().detach().double(), wanted, rtol=0, atol=2e-3
    )
    boost = (-weighting.log_variances()).exp()
    assert boost.max() < math.exp(1 / kappa)


@given(st.floats(1e-6, 1e4), st.floats(0.02, 50))
def test_the_lambert_point_solves_its_equation_and_keeps_the_bound(z, kappa):
    weighting = make_weighting("dy-sigma", SHORT, kappa=kappa, bins=3, clamp=60.0)
    s = float(weighting.fixed_point(torch.tensor([z]))[0])
    assert math.isclose(
        1 + kappa * s, z * math.exp(-s), rel_tol=1e-6, abs_tol=1e-6 * (1 + 1 / kappa)
    )
    assert s >= -1 / kappa - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in WEIGHING if name != "excess"])
def test_every_variant_rests_where_it_says(variant):
    weighting = make_weighting("dy-sigma", SHORT, variant=variant, bins=12)
    prior = make_weighting("min-snr", SHORT).weights()
    z = prior * LOSSES if weighting.variant.weighted else LOSSES
    wanted = weighting.fixed_point(z / z.mean())
    settle(weighting, LOSSES)
    torch.testing.assert_close(
        weighting.log_variances().detach().double(), wanted, rtol=0, atol=3e-3
    )


@pytest.mark.slow
def test_final_weights_of_the_variants_in_closed_form():
    prior = make_weighting("min-snr", SHORT).weights()
    wanted = {
        "inside": 1 / LOSSES,
        "outside": prior / LOSSES,
        "tempered": prior * LOSSES**-0.5,
        "tilt": prior * (prior * LOSSES) ** 0.5,
    }
    for variant, formula in wanted.items():
        weights = settle(
            make_weighting("dy-sigma", SHORT, variant=variant, bins=12, clamp=12.0), LOSSES
        )
        torch.testing.assert_close(weights, formula / formula.mean(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("variant", [name for name in WEIGHING if VARIANTS[name].kappa_in])
def test_a_large_kappa_is_the_prior(variant):
    weighting = make_weighting("dy-sigma", SHORT, variant=variant, kappa=1e6, bins=12)
    prior = make_weighting("min-snr", SHORT).weights()
    torch.testing.assert_close(weighting.weights(), prior, rtol=1e-6, atol=0)
    if weighting.needs_gramian:
        weighting.observe_gramian(random_gramian(12))
    torch.testing.assert_close(settle(weighting, LOSSES, steps=100), prior, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_a_small_kappa_is_the_learnable_weighting_and_inside_forgets_its_prior():
    small = settle(make_weighting("dy-sigma", SHORT, kappa=1e-3, bins=12, clamp=12.0), LOSSES)
    pure = settle(make_weighting("uncertainty", SHORT, bins=12), LOSSES)
    torch.testing.assert_close(small, pure, rtol=2e-2, atol=0)
    for prior in ("min-snr", "const-eps", "debiased"):
        inside = settle(
            make_weighting("dy-sigma", SHORT, variant="inside", prior=prior, bins=12, clamp=12.0),
            LOSSES,
        )
        torch.testing.assert_close(inside, pure, rtol=5e-3, atol=0)


def test_over_a_wide_bin_outside_weighs_the_losses_by_the_prior_and_tempered_does_not():
    w = make_weighting("min-snr", SHORT).weights()
    wanted = {
        "outside": (w * LOSSES).sum() / w.sum() / LOSSES.mean(),
        "tempered": torch.tensor(1.0),
    }
    for variant, ratio in wanted.items():
        weighting = make_weighting("dy-sigma", SHORT, variant=variant, bins=1)
        settle(weighting, LOSSES, steps=300)
        torch.testing.assert_close(
            weighting.log_variances()[0].detach(), ratio.log(), rtol=0, atol=5e-3
        )


def test_dy_sigma_starts_exactly_at_its_prior():
    for variant in VARIANTS:
        for prior, params in (("min-snr", {"gamma": 2.0}), ("p2", {}), ("debiased", {})):
            for fourier in (False, True):
                weighting = make_weighting(
                    "dy-sigma",
                    LINEAR,
                    "v",
                    variant=variant,
                    prior=prior,
                    prior_params=params,
                    fourier=fourier,
                )
                wanted = make_weighting(prior, LINEAR, "v", **params).weights()
                torch.testing.assert_close(weighting.weights(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", WEIGHING)
def test_the_scale_of_the_losses_does_not_matter(variant):
    ends = [
        settle(
            make_weighting("dy-sigma", SHORT, variant=variant, bins=12), LOSSES * scale, steps=50
        )
        for scale in (1.0, 1e-3)
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=0)


def test_without_a_running_mean_the_formula_is_literal():
    weighting = make_weighting(
        "dy-sigma", SHORT, normalize=False, variant="inside", half_life=None, bins=12, clamp=12.0
    )
    torch.testing.assert_close(settle(weighting, LOSSES), 1 / LOSSES, rtol=2e-3, atol=0)


@pytest.mark.slow
def test_s_returns_from_beyond_the_clamp():
    weighting = make_weighting(
        "dy-sigma", SHORT, variant="inside", bins=12, clamp=1.0, half_life=100.0
    )
    settle(weighting, LOSSES * torch.logspace(-2, 2, 12))
    assert weighting.log_variances().abs().max() == 1
    settle(weighting, 1 / make_weighting("min-snr", SHORT).weights(), steps=400)  # now every z is 1
    assert weighting.log_variances().abs().max() < 0.05


def test_importance_corrects_what_is_learned():
    # Timestep 3 comes up four times as often as the others, with a quarter of the importance.
    timesteps = torch.cat([torch.arange(12), torch.tensor([3, 3, 3])])
    importance = torch.where(timesteps == 3, 0.25, 1.0)
    weightings = [make_weighting("dy-sigma", SHORT, bins=12) for _ in range(2)]
    weightings[0](LOSSES[timesteps], timesteps, importance).backward()
    weightings[1](LOSSES, torch.arange(12)).backward()
    torch.testing.assert_close(
        weightings[0].running[1] / weightings[0].running[0],
        (LOSSES * make_weighting("min-snr", SHORT).weights()).mean(),
    )
    torch.testing.assert_close(
        15 * weightings[0].coefficients.grad, 12 * weightings[1].coefficients.grad
    )


# ---------------------------------------------------------------- our own variants


@pytest.mark.slow
def test_excess_judges_by_the_learnable_part():
    floor = LOSSES * torch.linspace(0.9, 0.1, 12)
    weighting = make_weighting("dy-sigma", SHORT, variant="excess", bins=12, floor=floor)
    settle(weighting, LOSSES)
    wanted = weighting.fixed_point(relative(None, LOSSES - floor))
    torch.testing.assert_close(
        weighting.log_variances().detach().double(), wanted, rtol=0, atol=3e-3
    )
    # Equal weighted losses: the more of a loss is floor, the sooner it counts as solved.
    equal = 1 / make_weighting("min-snr", SHORT).weights()
    weighting = make_weighting(
        "dy-sigma", SHORT, variant="excess", bins=12, floor=equal * torch.linspace(0.9, 0.1, 12)
    )
    boost = settle(weighting, equal) * equal
    assert (boost.diff() < 0).all()


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_online_floor_finds_the_learnable_share(power):
    """Losses floor + c / images^power: the share of c is found; for another power than 1, up to a common factor."""
    weighting = make_weighting("dy-sigma", SHORT, variant="excess", bins=12)
    shares = torch.linspace(0.05, 0.5, 12)
    steps = torch.arange(1, 301)
    learnable = (300 / steps[:, None]) ** power * shares * LOSSES
    for losses in (1 - shares) * LOSSES + learnable:
        found = weighting._learnable_share(losses, torch.arange(12), torch.ones(12))
    factor = {1.0: 1.0, 0.5: (4 / 3) * (2 / 1.5 - 8 / 7.5)}[power]
    torch.testing.assert_close(found, factor * shares, rtol=0.1, atol=0.02)
    # The two means, summed directly with the weights they are meant to have.
    long, short = (
        (1 - shares) * LOSSES
        + (learnable * steps[:, None] ** (p - 1.0)).sum(0) / (steps ** (p - 1.0)).sum()
        for p in (2, 8)
    )
    torch.testing.assert_close(found, 4 / 3 * (long - short) / short, rtol=2e-4, atol=0)


def test_conflict_without_a_gramian_is_anchored_and_with_one_helps_the_hurt_bin():
    plain, aware = (
        make_weighting("dy-sigma", SHORT, variant=v, bins=3) for v in ("anchored", "conflict")
    )
    for weighting in (plain, aware):
        train(weighting, 0)
        settle(weighting, LOSSES, steps=50)
    torch.testing.assert_close(plain.weights(), aware.weights())
    # Bins 0 and 1 agree and outvote bin 2, which the common step hurts.
    gradients = torch.tensor([[1.0, 0.0], [1.0, 0.2], [-0.6, 0.4]])
    aware.observe_gramian(gradients @ gradients.T)
    settle(aware, LOSSES, steps=200)
    shares = [w.weights().view(3, 4).mean(1) / 3 for w in (plain, aware)]
    hurt = [float(gradients[2] @ (share @ gradients)) for share in shares]
    assert hurt[0] < 0 and hurt[1] > hurt[0] and shares[1][2] > 1.2 * shares[0][2]
    squared = [float((share @ gradients).square().sum()) for share in shares]
    assert squared[1] < squared[0]


# ---------------------------------------------------------------- weightings from Gramians


@pytest.mark.slow
def test_ugd_without_regularization_rests_at_the_min_norm_point():
    gramian = random_gramian(6)
    weighting = make_weighting("ugd", SHORT, bins=6, regularization=0.0)
    weighting.observe_gramian(gramian)
    settle(weighting, LOSSES, steps=1500)
    shares = weighting.weights().view(6, 2).mean(1).double() / 6
    best = min_norm_weights(gramian)
    assert shares @ gramian @ shares < 1.02 * (best @ gramian @ best)
    weighting = make_weighting("ugd", SHORT, bins=6, regularization=1e3)
    weighting.observe_gramian(gramian)
    torch.testing.assert_close(settle(weighting, LOSSES), torch.ones(12), rtol=1e-2, atol=0)


def make_rule(rule, **params):
    pytest.importorskip("torchjd")
    if rule == "cagrad":
        pytest.importorskip("cvxpy")
    return make_weighting("gramian", SHORT, rule=rule, bins=6, **params)


@pytest.mark.parametrize("rule", GRAMIAN_RULES)
def test_gramian_rules_give_the_shares_of_torchjd(rule):
    weighting, gramian = make_rule(rule), random_gramian(6)
    torch.testing.assert_close(weighting.weights(), torch.ones(12))
    random_state = torch.random.get_rng_state()
    weighting.observe_gramian(gramian)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    torch.manual_seed(1)  # the count of Gramians seen
    alone = weighting.rule(gramian * 6 / gramian.trace())
    torch.testing.assert_close(weighting.shares, alone.float())
    each = (alone / alone.sum() * 6).float()
    torch.testing.assert_close(weighting.weights(), each.repeat_interleave(2), rtol=1e-5, atol=1e-6)


def test_rules_satisfy_the_equations_of_their_papers():
    gramian = random_gramian(6)
    scaled = gramian * 6 / gramian.trace()

    def shares(rule):
        weighting = make_rule(rule)
        weighting.observe_gramian(gramian)
        return weighting.shares.double()

    nash = shares("nash-mtl")
    torch.testing.assert_close(scaled @ nash, 1 / nash, rtol=1e-3, atol=0)  # Navon et al. 2022
    impartial = shares("imtl-g")
    torch.testing.assert_close(
        (scaled @ impartial / scaled.diag().sqrt()).diff(),
        torch.zeros(5).double(),
        rtol=0,
        atol=1e-5,
    )
    mgda, best = shares("mgda"), min_norm_weights(scaled)
    assert mgda @ scaled @ mgda < 1.1 * (best @ scaled @ best)
    assert (scaled @ shares("upgrad") > -1e-4).all()  # hurts no bin


def test_unequal_bins_share_their_weight_over_their_timesteps():
    pytest.importorskip("torchjd")
    bins = Bins([0, 2, 12])
    weighting = make_weighting("gramian", SHORT, rule="mgda", bins=bins)
    weighting.observe_gramian(torch.diag(torch.tensor([1.0, 3.0])))  # min-norm shares 3/4 and 1/4
    torch.testing.assert_close(
        weighting.weights()[[0, 2]], torch.tensor([0.75 * 6, 0.25 * 1.2]), rtol=1e-3, atol=0
    )


def test_noisy_indefinite_gramians_are_averaged_into_a_semi_definite_one():
    gramian = random_gramian(6) * 6 / random_gramian(6).trace()
    weighting = make_weighting("ugd", SHORT, bins=6)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(40):
        noise = torch.randn(6, 6, generator=generator)
        estimate = gramian + (noise + noise.T) / 2
        assert torch.linalg.eigvalsh(estimate)[0] < 0
        weighting.observe_gramian(estimate)
        assert (
            torch.linalg.eigvalsh(weighting.gramian)[0] > -1e-5
            and abs(weighting.gramian.trace() - 6) < 1e-4
        )
        errors.append(float((weighting.gramian - gramian).square().mean()))
    assert sum(errors[20:]) < 0.4 * errors[0] * 20


def test_large_early_gradients_do_not_rule_the_mean_of_gramians():
    early, late = torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([1.0, 4.0]))
    scaled, plain = (make_weighting("ugd", SHORT, bins=2) for _ in range(2))
    for step in range(30):
        gramian = early if step == 0 else late
        scaled.observe_gramian(gramian * 0.5**step)
        plain.observe_gramian(gramian)
    torch.testing.assert_close(scaled.gramian, plain.gramian)
    torch.testing.assert_close(scaled.gramian, late / 2.5, rtol=0.05, atol=0.02)


def test_a_gramian_without_positive_part_changes_nothing():
    for name, params in (("ugd", {}), ("dy-sigma", {"variant": "conflict"})):
        weighting = make_weighting(name, SHORT, bins=6, **params)
        weighting.observe_gramian(-torch.eye(6))
        assert not weighting.gramian.any() and torch.isfinite(weighting.weights()).all()


@pytest.mark.parametrize("rule", ["pcgrad", "upgrad"])
def test_gramian_rules_seed_no_generator_of_an_accelerator(rule, monkeypatch):
    weighting = make_rule(rule)

    def seeded(seed):
        pytest.fail("this seeds the generators of all GPUs")

    for module, name in ((torch, "manual_seed"), (torch.random, "manual_seed")):
        monkeypatch.setattr(module, name, seeded)
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, seeded)
    before = torch.random.get_rng_state()
    weighting.observe_gramian(random_gramian(6))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "params"), [("ugd", {}), ("gramian", {}), ("dy-sigma", {"variant": "conflict"})]
)
def test_more_bins_than_a_gramian_can_have_are_refused_when_made(name, params):
    with pytest.raises(ValueError, match=r"bins.*100.*fewer.*64"):
        make_weighting(name, LINEAR, bins=100, **params)
    assert make_weighting(name, LINEAR, bins=64, **params).bins.num_bins == 64


def test_without_torchjd_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match=r"rule='mgda'.*pip install 'dysigma\[moo\]'"):
        make_weighting("gramian", SHORT, rule="mgda", bins=6)


@pytest.mark.parametrize(
    ("gramian", "words"),
    [
        (torch.eye(5), r"\(6, 6\).*got \(5, 5\)"),
        (torch.full((6, 6), torch.nan), "36 of its 36 entries"),
        (torch.ones(6), r"\(6, 6\).*got \(6,\)"),
    ],
    ids=["size", "nan", "shape"],
)
@pytest.mark.parametrize(("name", "params"), [("ugd", {}), ("dy-sigma", {"variant": "conflict"})])
def test_bad_gramians_are_refused(name, params, gramian, words):
    with pytest.raises(ValueError, match=rf"gramian must be .*{words}"):
        make_weighting(name, SHORT, bins=6, **params).observe_gramian(gramian)


def test_only_those_that_need_a_gramian_take_one():
    for name, params in KINDS:
        weighting = make_weighting(name, LINEAR, **params)
        assert weighting.needs_gramian == (
            name in ("ugd", "gramian") or params.get("variant") == "conflict"
        )
        assert (weighting.gramian_every > 0) == weighting.needs_gramian
    with pytest.raises(ValueError, match="uses no Gramian"):
        make_weighting("min-snr", LINEAR).observe_gramian(torch.eye(10))


# ---------------------------------------------------------------- scalarisations


def make_scalarization(rule, **params):
    pytest.importorskip("torchjd")
    return make_weighting("scalarization", SHORT, rule=rule, bins=4, **params)


BINS_OF_SHORT = torch.arange(0, 12, 3)  # a timestep of each of the four bins
BIN_LOSSES = torch.tensor([0.5, 1.0, 1.5, 5.0])  # their mean is 2


def shares_of(weighting):
    """Weights of the bins, with mean 1: undo the interpolation between the middles of bins."""
    each = weighting.rule(*weighting.relative_losses())
    return each / each.mean()


@pytest.mark.slow
@pytest.mark.parametrize("rule", SCALARIZATION_RULES)
def test_scalarizations_keep_the_laws(rule):
    pytest.importorskip("torchjd")
    check_weighting("scalarization", rule=rule)


@pytest.mark.parametrize("rule", ["uw", "imtl-l"])
def test_learned_scalarizations_have_the_gradients_and_the_fixed_point_of_the_paper(rule):
    weighting = make_scalarization(rule)
    relative = BIN_LOSSES / 2
    weighting(BIN_LOSSES, BINS_OF_SHORT).backward()
    (parameter,) = weighting.parameters()
    by_hand = {"uw": (1 - relative) / 2, "imtl-l": relative - 1}[rule]
    torch.testing.assert_close(parameter.grad, by_hand)
    sign = {"uw": 1, "imtl-l": -1}[rule]
    with torch.no_grad():
        parameter.copy_(sign * relative.log())
    parameter.grad = None
    weighting(BIN_LOSSES, BINS_OF_SHORT).backward()
    torch.testing.assert_close(parameter.grad, torch.zeros(4), rtol=0, atol=1e-6)
    balance = make_weighting("loss-balance", SHORT, bins=4)
    balance(BIN_LOSSES, BINS_OF_SHORT)
    torch.testing.assert_close(weighting.weights(), balance.weights())


def test_famo_learns_what_torchjd_learns():
    scalarization = pytest.importorskip("torchjd.scalarization")
    weighting = make_scalarization("famo", half_life=1e-3)  # only the last batch counts
    theirs = scalarization.FAMO(4)
    optimizer = torch.optim.Adam(
        weighting.parameters(), lr=weighting.suggested_lr, weight_decay=1e-3
    )
    later = BIN_LOSSES * torch.tensor([0.5, 0.9, 1.1, 1.0])
    weighting(BIN_LOSSES, BINS_OF_SHORT).backward()
    (w,) = weighting.parameters()
    assert not w.grad.any()  # nothing has fallen yet
    for before, after in ((BIN_LOSSES, later), (later, BIN_LOSSES), (BIN_LOSSES, later)):
        optimizer.zero_grad()
        weighting(after, BINS_OF_SHORT).backward()
        optimizer.step()
        theirs(before)
        theirs.update(after)
    (their_w,) = theirs.parameters()
    torch.testing.assert_close(w, their_w)
    by_hand = w.detach().softmax(0) / later
    torch.testing.assert_close(shares_of(weighting), by_hand / by_hand.mean())


def test_dwa_compares_the_last_two_epochs():
    weighting = make_scalarization("dwa", half_life=4)
    weighting(BIN_LOSSES, BINS_OF_SHORT)
    assert weighting.ends[1].tolist() == BIN_LOSSES.tolist()
    torch.testing.assert_close(shares_of(weighting), torch.ones(4))  # one epoch tells no rate
    halved = BIN_LOSSES * torch.tensor([0.5, 1.0, 1.0, 1.0])
    weighting(halved, BINS_OF_SHORT)
    newer = (BIN_LOSSES / 2 + halved) / 1.5
    torch.testing.assert_close(weighting.ends, torch.stack([BIN_LOSSES, newer]))
    by_hand = (newer / BIN_LOSSES / 2).softmax(0) * 4
    torch.testing.assert_close(shares_of(weighting), by_hand)


def test_stch_is_a_softmax_of_the_losses():
    weighting = make_scalarization("stch")
    weighting(BIN_LOSSES, BINS_OF_SHORT)
    by_hand = (BIN_LOSSES / 2 / (4 * 0.1)).softmax(0) * 4
    torch.testing.assert_close(shares_of(weighting), by_hand)


def test_the_geometric_mean_of_torchjd_is_loss_balance():
    scalarization = pytest.importorskip("torchjd.scalarization")
    losses = BIN_LOSSES.clone().requires_grad_()
    scalarization.GeometricMean()(losses).backward()
    balance = make_weighting("loss-balance", SHORT, bins=4)
    balance(BIN_LOSSES, BINS_OF_SHORT)
    torch.testing.assert_close(losses.grad / losses.grad.mean(), shares_of(balance))


@pytest.mark.parametrize("rule", SCALARIZATION_RULES)
def test_a_bin_without_samples_keeps_its_running_mean(rule):
    weighting = make_scalarization(rule)
    weighting(BIN_LOSSES, BINS_OF_SHORT)
    before, _ = weighting.relative_losses()
    weighting(BIN_LOSSES[:1] * 3, BINS_OF_SHORT[:1])
    after, _ = weighting.relative_losses()
    torch.testing.assert_close(after[1:] / after[1], before[1:] / before[1])
    assert after[0] / after[1] > before[0] / before[1]


def test_without_torchjd_a_scalarization_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match=r"rule='uw'.*dysigma\[moo\]"):
        make_weighting("scalarization", SHORT, bins=4)
    with pytest.raises(KeyError, match="scalarization rule"):
        make_weighting("scalarization", SHORT, rule="mean", bins=4)


# ---------------------------------------------------------------- adaptive and random


def test_loss_balance_and_variance_aware_in_closed_form():
    losses = torch.tensor([0.2, 0.4, 1.0, 2.0])
    schedule = NoiseSchedule(torch.tensor([0.9, 0.7, 0.4, 0.1]))
    for name, wanted in {
        "loss-balance": 1 / losses,
        "variance-aware": (1 + (losses - losses.mean()) / losses.std(correction=0)).clamp(min=0),
    }.items():
        weighting = make_weighting(name, schedule, bins=4)
        torch.testing.assert_close(weighting.weights(), torch.ones(4))
        weighting(losses, torch.arange(4))
        torch.testing.assert_close(
            weighting.weights(), wanted / wanted.mean(), rtol=1e-5, atol=1e-6
        )
    halved = make_weighting("loss-balance", schedule, bins=4, strength=0.5)
    halved(losses[:3], torch.arange(3))  # the last bin is unseen: average
    wanted = torch.cat([losses[:3], losses[:3].mean()[None]]) ** -0.5
    torch.testing.assert_close(halved.weights(), wanted / wanted.mean(), rtol=1e-5, atol=0)


def test_running_means_forget_by_half_over_their_half_life():
    schedule = NoiseSchedule(torch.tensor([0.9, 0.1]))
    weighting = make_weighting("loss-balance", schedule, bins=1, half_life=8.0)
    for value in (1.0, 0.0):
        weighting(torch.full((8,), value), torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(weighting.moments[:2, 0], torch.tensor([8 * 1.5, 8 * 0.5]))


def test_random_weights_are_a_fresh_softmax_of_normals_and_part_of_the_state():
    weighting = make_weighting("random", LINEAR, normalize=False, bins=20, seed=4)
    global_state = torch.random.get_rng_state()
    draws = []
    for losses, timesteps in batches(400):
        draws.append(weighting.weights()[::50].log())
        weighting(losses, timesteps)
    assert torch.equal(torch.random.get_rng_state(), global_state)
    draws = torch.stack(draws).double()  # (400, 20), normal up to a constant in each row
    centred = draws - draws.mean(1, keepdim=True)
    assert abs(float(centred.square().sum()) / (400 * 19) - 1) < 0.05
    assert abs(float((centred**4).mean() / centred.var() ** 2) - 3) < 0.2
    assert float((centred[1:] * centred[:-1]).mean().abs()) < 0.03  # fresh at every call
    assert float(torch.corrcoef(centred.T).fill_diagonal_(0).abs().max()) < 0.25
    again = make_weighting("random", LINEAR, normalize=False, bins=20, seed=4)
    torch.testing.assert_close(again.weights()[::50].log().double(), draws[0])
    assert not torch.equal(
        make_weighting("random", LINEAR, normalize=False, seed=5).weights(), again.weights()
    )


# ---------------------------------------------------------------- in a training loop


@every_kind
def test_copies_and_moves_keep_state_and_precision(name, params):
    weighting = train(make_weighting(name, LINEAR, **params), 3)
    wanted = weighting.weights()
    assert torch.equal(copy.deepcopy(weighting).weights(), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(weighting)).weights(), wanted)
    half = nn.ModuleList([copy.deepcopy(weighting)]).half().to(torch.bfloat16)[0]
    assert torch.equal(half.weights(), wanted)
    assert all(
        tensor.device.type == "meta" for tensor in weighting.to("meta").state_dict().values()
    )


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("uncertainty", {}),
        ("dy-sigma", {}),
        ("dy-sigma", {"variant": "outside"}),
        ("loss-balance", {}),
    ],
)
def test_gradient_accumulation_equals_one_large_batch(name, params):
    whole = train(
        make_weighting(name, LINEAR, half_life=2000.0, **params)
        if name != "uncertainty"
        else make_weighting(name, LINEAR),
        20,
        size=96,
    )
    split = copy.deepcopy(whole)
    losses, timesteps = next(batches(1, size=96, seed=8))
    grads = []
    for weighting, parts in ((whole, 1), (split, 4)):
        weighting.zero_grad()
        mine = losses.clone().requires_grad_()
        for part in torch.arange(96).chunk(parts):
            (weighting(mine[part], timesteps[part]) / parts).backward()
        grads.append([mine.grad, *(p.grad for p in weighting.parameters())])
    exact = (
        name == "uncertainty"
    )  # a running mean moves within the accumulated batch, by a few per cent of its noise
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-5 if exact else 0.05, atol=1e-7 if exact else 2e-3
        )
    torch.testing.assert_close(whole.weights(), split.weights(), rtol=1e-2, atol=0)


COMPILED = [
    ("min-snr", {}),
    ("uncertainty", {"fourier": True}),
    ("ugd", {}),
    ("loss-balance", {}),
    ("random", {}),
]
COMPILED += [("dy-sigma", {"variant": variant}) for variant in ("anchored", "excess", "conflict")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "params"), COMPILED)
def test_torch_compile_makes_one_graph_with_the_same_numbers(name, params):
    torch._dynamo.reset()
    eager = train(make_weighting(name, LINEAR, **params), 3)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for losses, timesteps in batches(2, seed=5):
        values = [
            module(losses.clone().requires_grad_(), timesteps) for module in (eager, compiled)
        ]
        torch.testing.assert_close(*values)
        for module, value in zip((eager, traced), values, strict=True):
            module.zero_grad()
            value.backward()
    for one, other in zip(eager.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(value, traced.state_dict()[key])


RANKED = [
    ("uncertainty", {}),
    ("dy-sigma", {"variant": "excess"}),
    ("loss-balance", {}),
    ("ugd", {}),
]


def step_on_share(name, params, rank, ranks):
    """Three steps on every ranks-th sample of common batches: weights, the gradient of parameters, the state."""
    weighting = make_weighting(name, LINEAR, **params)
    optimizer = torch.optim.Adam(
        weighting.parameter_groups() or [torch.zeros(1, requires_grad=True)]
    )
    if weighting.needs_gramian:
        weighting.observe_gramian(random_gramian(weighting.bins.num_bins))
    for losses, timesteps in batches(3, size=32):
        optimizer.zero_grad()
        weighting(losses[rank::ranks].requires_grad_(), timesteps[rank::ranks]).backward()
        optimizer.step()
    return [
        weighting.weights(),
        *weighting.state_dict().values(),
        *(p.grad for p in weighting.parameters()),
    ]


def update_on_share(rank, ranks):
    """The adaptive sampler, which shares its statistics in the same way."""
    sampler = make_sampler("loss-second-moment", LINEAR, bins=10, warmup=1)
    for losses, timesteps in batches(3, size=96):
        sampler.update(losses[rank::ranks], timesteps[rank::ranks])
    return [sampler.probabilities()]


def run_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    results = [step_on_share(name, params, rank, 2) for name, params in RANKED] + [
        update_on_share(rank, 2)
    ]
    torch.distributed.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_ranks_learn_what_one_rank_learns_from_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = [step_on_share(name, params, 0, 1) for name, params in RANKED] + [update_on_share(0, 1)]
    for results in zip(alone, *ranks, strict=True):
        for one, first, second in zip(*results, strict=True):
            assert torch.equal(first, second)
            torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-6)


def test_parameter_groups_fit_an_optimizer():
    assert make_weighting("min-snr", LINEAR).parameter_groups() == []
    weighting = make_weighting("dy-sigma", LINEAR)
    (group,) = weighting.parameter_groups()
    assert group["lr"] == weighting.suggested_lr == 1e-2 and group["weight_decay"] == 0
    assert weighting.parameter_groups(0.3)[0]["lr"] == 0.3
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters()}, *weighting.parameter_groups()], lr=1e-3
    )
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-2, 0.0]


def test_the_fourier_form_learns_a_smooth_curve():
    losses = (-LINEAR.log_snr / 6).exp().float()
    weighting = make_weighting("uncertainty", LINEAR, fourier=True)
    settle(weighting, losses, steps=300, lr=0.3)
    error = (weighting.log_variances().detach() - losses.log()).abs()
    assert (
        error.mean() < 0.05 and error.quantile(0.95) < 0.1
    )  # log_snr moves fast over the first few timesteps


# ---------------------------------------------------------------- comparing weightings


def test_effective_sample_size_and_share_changed_by_hand():
    torch.testing.assert_close(
        effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0])), torch.tensor(0.5).double()
    )
    weights = make_weighting("min-snr", LINEAR).weights()
    plain = make_weighting("const-eps", LINEAR).weights()
    share = (LINEAR.log_snr > math.log(5 * 1.01)).double().mean()
    torch.testing.assert_close(share_changed(weights, plain), share)  # 13 %: only where SNR > 5
    assert share_changed(plain * 3, plain) == 0
    assert 0.12 < share < 0.14 and 0.92 < effective_sample_size(weights) < 0.94


def test_fluctuation_by_hand():
    steady = torch.full((400,), 2.0)
    drift = torch.linspace(1, 3, 400)
    trajectory = torch.stack([steady, drift], 1)
    found = fluctuation(trajectory)
    torch.testing.assert_close(found, trajectory.double().std(0) / trajectory.double().mean(0))
    assert found[0] == 0
    # Two rows are enough: 1 and 3 have standard deviation sqrt(2) and mean 2.
    assert float(fluctuation(torch.tensor([[1.0], [3.0]]))) == pytest.approx(0.5**0.5)
    for short in (torch.ones(5), torch.ones(1, 5)):
        with pytest.raises(ValueError, match="trajectory"):
            fluctuation(short)


@pytest.mark.slow
def test_learned_weights_fluctuate_less_the_more_they_are_anchored():

    def late(**params):
        weighting = make_weighting(params.pop("name", "dy-sigma"), LINEAR, **params)
        optimizer = torch.optim.Adam(weighting.parameter_groups())
        rows = []
        for losses, timesteps in batches(300, size=64):
            optimizer.zero_grad()
            weighting(losses, timesteps).backward()
            optimizer.step()
            rows.append(weighting.weights())
        late_rows = torch.stack(rows[150:])
        # From one step to the next, so that a weight that drifts slowly does not count as unsteady.
        changes = late_rows.diff(dim=0).square().mean(0).sqrt()
        return float((changes / late_rows.mean(0)).mean())

    free = late(name="uncertainty")
    anchored = [late(kappa=kappa) for kappa in (0.25, 1.0, 4.0)]
    assert free > anchored[0] > anchored[1] > anchored[2]


# ---------------------------------------------------------------- parameters and names


SCALARS = [np.int64, np.float32, np.float64, torch.tensor]


@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("min-snr", "gamma", 5),
        ("split", "at", -2),
        ("dy-sigma", "kappa", 2),
        ("dy-sigma", "half_life", 100),
        ("loss-balance", "strength", 2),
        ("ugd", "regularization", 1),
        ("p2", "k", 3),
    ],
)
def test_numpy_and_torch_scalars_are_numbers(name, key, value, scalar):
    ours = make_weighting(name, LINEAR, **{key: scalar(value)})
    wanted = make_weighting(name, LINEAR, **{key: value})
    assert torch.equal(train(ours, 2).weights(), train(wanted, 2).weights())
    assert type(ours.params[key]) in (int, float)


@pytest.mark.parametrize("scalar", [np.int64, np.int32, torch.tensor])
@pytest.mark.parametrize(
    ("name", "key"),
    [("dy-sigma", "bins"), ("ugd", "gramian_every"), ("random", "seed"), ("uncertainty", "bins")],
)
def test_numpy_and_torch_integers_are_integers(name, key, scalar):
    assert make_weighting(name, LINEAR, **{key: scalar(7)}).params[key] == 7
    for bad in (np.float64(7.0), np.bool_(True), "7"):
        with pytest.raises(ValueError, match=f"{key} must be an int"):
            make_weighting(name, LINEAR, **{key: bad})


def test_scalars_inside_the_parameters_of_a_prior_are_numbers_too():
    ours = make_weighting("dy-sigma", LINEAR, prior_params={"gamma": np.float32(2)})
    wanted = make_weighting("min-snr", LINEAR, gamma=2.0)
    torch.testing.assert_close(ours.weights(), wanted.weights())


def positional(log_snr, power):
    return power * log_snr


def by_keyword(log_snr, *, power):
    return power * log_snr


def with_default(log_snr, power=0.25):
    return power * log_snr


def anything(log_snr, **options):
    return options["power"] * log_snr


@pytest.mark.parametrize("formula", [positional, by_keyword, with_default, anything])
def test_own_formulas_take_what_can_be_given_by_name(formula):
    wanted = make_weighting("debiased", LINEAR).weights()
    ours = make_weighting(formula, LINEAR, power=0.5)
    torch.testing.assert_close(ours.weights(), wanted)
    prior = make_weighting(
        "dy-sigma", LINEAR, prior=formula, prior_params={"power": np.float64(0.5)}
    )
    torch.testing.assert_close(prior.weights(), wanted)


def test_what_an_own_formula_needs_is_asked_for_by_name():
    with pytest.raises(ValueError, match=r"needs a value.*power"):
        make_weighting(positional, LINEAR)
    with pytest.raises(ValueError, match=r"no parameter.*gamma.*power"):
        make_weighting(positional, LINEAR, gamma=1, power=0.5)
    with pytest.raises(ValueError, match=r"no parameter.*log_snr"):
        make_weighting(positional, LINEAR, power=0.5, log_snr=1)


@pytest.mark.parametrize(
    ("name", "params", "formula"),
    [
        ("p2", {"gamma": 0}, lambda S: S),
        ("p2", {"k": 0, "gamma": 0.5}, lambda S: S.sqrt()),
        ("max-snr", {"gamma": 0}, lambda S: S),
        ("truncated-snr", {"gamma": 0.0}, lambda S: S),
        ("split", {"ratio": 0}, lambda S: torch.where(S > 1, 0.0, S)),
        ("min-snr", {"gamma": 1e29}, lambda S: S),
        ("edm", {"sigma_data": 1e20}, lambda S: S),
        ("loss-balance", {"strength": 0}, torch.ones_like),
        ("variance-aware", {"strength": 0}, torch.ones_like),
        ("dy-sigma", {"kappa": 1e30, "prior": "debiased"}, lambda S: S.sqrt()),
        ("dy-sigma", {"kappa": 1e300, "prior": "debiased"}, lambda S: S.sqrt()),
        ("dy-sigma", {"kappa": 1e300, "prior": "p2", "variant": "tempered"}, lambda S: S / (1 + S)),
        ("dy-sigma", {"kappa": 1e40, "prior": "p2", "variant": "tilt"}, lambda S: S / (1 + S)),
    ],
)
def test_parameters_at_the_edge_of_a_formula_are_taken(name, params, formula):
    weighting = train(make_weighting(name, LINEAR, "sample", **params), 5)
    wanted = formula(LINEAR.log_snr.exp())
    torch.testing.assert_close(
        weighting.weights().double(), wanted / wanted.mean(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("edge", "like"), [("anchored", "inside"), ("tempered", "outside")])
def test_a_kappa_of_zero_is_the_unconstrained_variant(edge, like):
    options = {"bins": 12, "clamp": 12.0}
    at_edge = make_weighting("dy-sigma", SHORT, variant=edge, kappa=0, **options)
    without = make_weighting("dy-sigma", SHORT, variant=like, **options)
    torch.testing.assert_close(settle(at_edge, LOSSES, 50), settle(without, LOSSES, 50))
    z = torch.tensor([0.1, 3.0])
    torch.testing.assert_close(at_edge.fixed_point(z), z.double().log())


def test_every_weighting_says_what_it_is():
    assert repr(make_weighting("min-snr", LINEAR)) == "min-snr(gamma=5.0, target=epsilon)"
    assert repr(make_weighting("p2", LINEAR, "v", False, k=np.float64(2))) == (
        "p2(k=2.0, gamma=1.0, target=v_prediction, normalize=False)"
    )
    assert "dy-sigma(prior=p2, prior_params={'gamma': 0.5}, variant=tilt, kappa=4" in repr(
        make_weighting(
            "dy-sigma", LINEAR, prior="p2", prior_params={"gamma": 0.5}, variant="tilt", kappa=4
        )
    )
    own = make_weighting(positional, LINEAR, power=0.5)
    assert repr(own) == "positional(power=0.5, target=epsilon)"
    assert "bins=Bins(3)" in repr(make_weighting("ugd", SHORT, bins=Bins([0, 2, 5, 12])))
    assert "floor=tensor(12,)" in repr(
        make_weighting("dy-sigma", SHORT, bins=3, floor=torch.zeros(12))
    )


@every_kind
def test_the_name_stays_with_copies(name, params):
    weighting = make_weighting(name, LINEAR, **params)
    text = repr(weighting)
    assert text.startswith(f"{name}(") and text.endswith("target=epsilon)")
    assert all(f"{key}={value}" in text for key, value in params.items())
    assert repr(pickle.loads(pickle.dumps(weighting))) == text == repr(copy.deepcopy(weighting))


# ---------------------------------------------------------------- bad input


def ddpm():
    from diffusers import DDPMScheduler

    return DDPMScheduler


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (lambda: ddpm(), "class DDPMScheduler.*from_diffusers"),
        (lambda: NoiseSchedule, "class NoiseSchedule"),
        (lambda: ddpm()(), "DDPMScheduler.*from_diffusers"),
        (lambda: ddpm()().config, "configuration.*from_diffusers"),
        (lambda: {"num_train_timesteps": 1000}, "configuration"),
        (lambda: "some/model", "'some/model'.*from_diffusers"),
        (lambda: "cosine", "'cosine'.*make_schedule"),
        (lambda: None, "NoneType"),
        (lambda: LINEAR.log_snr, "Tensor"),
    ],
)
def test_what_is_no_schedule_is_told_so(schedule, words):
    with pytest.raises(TypeError, match=rf"must be a NoiseSchedule.*{words}"):
        make_weighting("dy-sigma", schedule())


def test_a_module_is_no_name_and_a_schedule_no_setting():
    for name in (LINEAR, make_weighting("min-snr", LINEAR), nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r"name must be.*class.*object"):
            make_weighting(name, LINEAR)
    with pytest.raises(TypeError, match=r"Setting\(schedule.*NoiseSchedule"):
        DySigma(LINEAR)


@pytest.mark.parametrize(
    ("timesteps", "words"),
    [
        (torch.tensor([3.0, 999.5]), r"continuous.*weighting\.at\(losses, log_snr\)"),
        (torch.tensor([3, 5], dtype=torch.int32), r"timesteps\.long\(\)"),
        (torch.tensor([[3], [5]]), r"\(2,\).*shape \(2, 1\)"),
        (torch.tensor(3), r"shape \(\)"),
        ([3, 5], "list"),
        (3, "int"),
        (np.array([3, 5]), "ndarray"),
    ],
)
def test_what_are_no_timesteps_is_told_so(timesteps, words):
    with pytest.raises(ValueError, match=rf"timesteps must be.*{words}"):
        make_weighting("min-snr", LINEAR)(torch.rand(2), timesteps)


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        (torch.tensor([3, 999]), r"weighting\(losses, timesteps\)"),
        (torch.tensor([3.0, 731.0]), r"731.*timesteps\?.*2 ln"),
        (torch.tensor([1.0, 60.0]), "below 50"),
        (torch.zeros(2, 1), r"shape \(2, 1\)"),
        ([0.5, 0.7], "list"),
    ],
)
def test_what_are_no_levels_is_told_so(levels, words):
    with pytest.raises(ValueError, match=rf"log_snr must be.*{words}"):
        make_weighting("min-snr", LINEAR, "v").at(torch.rand(2), levels)


@pytest.mark.parametrize("losses", [0.5, [0.1, 0.2], np.ones(2)])
def test_losses_that_are_no_tensor_are_told_so(losses):
    with pytest.raises(ValueError, match=r"losses must be \(B,\).*mse_loss"):
        make_weighting("min-snr", LINEAR)(losses, torch.arange(2))


def test_a_weighting_left_on_another_device_is_told_so():
    with pytest.raises(ValueError, match=r"meta.*cpu.*weighting\.to\(device\)"):
        make_weighting("min-snr", LINEAR)(torch.rand(2, device="meta"), torch.arange(2))


def test_timesteps_may_lie_on_the_cpu():
    weighting = make_weighting("dy-sigma", LINEAR).to("meta")
    loss = weighting(torch.rand(2, device="meta"), torch.arange(2))
    assert loss.device.type == "meta"


def test_unknown_names_show_the_choices():
    with pytest.raises(KeyError, match="min-snr"):
        make_weighting("minsnr", LINEAR)
    with pytest.raises(ValueError, match=r"min-snr.*'gama'.*'gamma'"):
        make_weighting("min-snr", LINEAR, gama=5.0)
    with pytest.raises(ValueError, match=r"dy-sigma has no parameter \['lr'\]"):
        make_weighting("dy-sigma", LINEAR, lr=0.1)
    with pytest.raises(ValueError, match="prediction type"):
        make_weighting("min-snr", LINEAR, "velocity")
    with pytest.raises(KeyError, match="anchored"):
        make_weighting("dy-sigma", LINEAR, variant="anchor")
    with pytest.raises(KeyError, match="min-snr"):
        make_weighting("dy-sigma", LINEAR, prior="uncertainty")
    with pytest.raises(ValueError, match=r"p2 has no parameter \['sigma_data'\]"):
        make_weighting("dy-sigma", LINEAR, prior="p2", prior_params={"sigma_data": 1.0})
    with pytest.raises(KeyError, match="upgrad"):
        make_weighting("gramian", LINEAR, rule="sum")
    with pytest.raises(TypeError, match="from_diffusers"):
        make_weighting("min-snr", LINEAR.to_diffusers())


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("min-snr", {"gamma": 0.0}),
        ("min-snr", {"gamma": "5"}),
        ("edm", {"sigma_data": -0.5}),
        ("sigmoid", {"bias": math.nan}),
        ("p2", {"k": -1}),
        ("dy-sigma", {"kappa": -0.5}),
        ("dy-sigma", {"kappa": math.inf}),
        ("dy-sigma", {"variant": "inside", "kappa": 2.0}),
        ("dy-sigma", {"bins": 0}),
        ("dy-sigma", {"bins": 1001}),
        ("dy-sigma", {"bins": 2.5}),
        ("dy-sigma", {"bins": Bins.uniform(10, 2)}),
        ("dy-sigma", {"clamp": -1.0}),
        ("dy-sigma", {"half_life": 0}),
        ("dy-sigma", {"floor": "offline"}),
        ("dy-sigma", {"floor": torch.zeros(10)}),
        ("dy-sigma", {"floor": torch.full((1000,), math.nan)}),
        ("dy-sigma", {"variant": "conflict", "gramian_every": 2.5}),
        ("ugd", {"regularization": -1.0}),
        ("random", {"seed": 0.5}),
        ("loss-balance", {"strength": -1.0}),
    ],
)
def test_bad_parameters_are_refused(name, params):
    with pytest.raises(ValueError, match=r"must|has no kappa|do not end"):
        make_weighting(name, LINEAR, **params)


@pytest.mark.parametrize(
    ("losses", "timesteps", "message"),
    [
        (
            torch.rand(4, 3, 8, 8),
            torch.arange(4),
            r"losses must be \(B,\).*\(4, 3, 8, 8\).*flatten\(1\)",
        ),
        (torch.rand(()), torch.arange(4), "losses must be"),
        (torch.ones(4, dtype=torch.int64), torch.arange(4), "losses must be"),
        (torch.rand(4), torch.arange(3), r"timesteps must be \(4,\)"),
        (torch.rand(4), torch.arange(4).float(), "timesteps must"),
        (torch.rand(4), torch.arange(4) + 997, "timesteps must lie"),
        (torch.rand(4), torch.arange(4) - 1, "timesteps must lie"),
    ],
)
def test_bad_losses_and_timesteps_are_refused(losses, timesteps, message):
    with pytest.raises(ValueError, match=message):
        make_weighting("min-snr", LINEAR)(losses, timesteps)


def test_bad_importance_is_refused():
    with pytest.raises(ValueError, match="importance must"):
        make_weighting("min-snr", LINEAR)(torch.rand(4), torch.arange(4), torch.ones(4, 1))
