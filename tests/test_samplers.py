"""Timestep samplers: what they draw, that the importance correction is right, the adaptive one against its paper."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from hypothesis import given
from hypothesis import strategies as st

from dysigma.samplers import (
    DENSITIES,
    TIMESTEP_SAMPLERS,
    TimestepSampler,
    effective_weights,
    make_sampler,
)
from dysigma.schedule import SCHEDULES, NoiseSchedule, make_schedule
from dysigma.training import TrainConfig, build, load_split, train_step
from dysigma.training.parts import make_parts
from dysigma.weightings import Weighting, make_weighting

LINEAR = NoiseSchedule.linear(1000)
GRID = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def adapted(schedule=LINEAR, **params):
    sampler = make_sampler("loss-second-moment", schedule, **params)
    timesteps = torch.arange(len(schedule.log_snr)).repeat(12)
    sampler.update(1.5 * (timesteps + 1.0) / len(schedule.log_snr), timesteps)
    return sampler


ADAPTIVE = ("loss-second-moment", "gradient-norm")


def weighting_for(name, schedule=LINEAR):
    """A weighting that the sampler can draw by."""
    if name == "weighting":
        return make_weighting("dy-sigma", schedule, "sample", variant="density", bins=2)
    return make_weighting("min-snr", schedule, "sample")


def every(schedule=LINEAR):
    """Every sampler, and one that has adapted. The weighting is for those that draw by one."""
    bins = {"bins": min(100, schedule.num_timesteps)}
    samplers = {}
    for name in TIMESTEP_SAMPLERS:
        params = bins if name in ADAPTIVE else {}
        weighting = weighting_for(name, schedule)
        samplers[name] = make_sampler(name, schedule, weighting=weighting, **params)
    samplers["adapted"] = adapted(schedule, **bins)
    return samplers


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_probabilities_are_positive_and_sum_to_one(name, zero_terminal_snr):
    for sampler in every(make_schedule(name, zero_terminal_snr=zero_terminal_snr)).values():
        p = sampler.probabilities()
        assert p.shape == (1000,) and p.dtype == torch.float64 and (p > 0).all()
        torch.testing.assert_close(p.sum(), torch.tensor(1.0).double())


@pytest.mark.parametrize("name", [name for name in every() if name != "stratified"])
def test_timesteps_come_up_as_often_as_stated_and_rise_with_u(name):
    sampler = every()[name]
    timesteps, importance = sampler(GRID)
    frequency = torch.bincount(timesteps, minlength=1000).double() / len(GRID)
    torch.testing.assert_close(frequency, sampler.probabilities(), rtol=0, atol=1.01 / len(GRID))
    assert (
        (timesteps.diff() >= 0).all()
        and timesteps.dtype == torch.int64
        and importance.dtype == torch.float32
    )
    torch.testing.assert_close(
        importance.double() * 1000 * sampler.probabilities()[timesteps], torch.ones_like(GRID)
    )


@pytest.mark.parametrize("name", every())
def test_corrected_expectations_agree_with_the_uniform_mean(name):
    sampler, losses = every()[name], torch.sin(torch.arange(1000) / 100.0) + 2
    if name == "stratified":
        u = torch.rand(500, 40, generator=torch.Generator().manual_seed(0))
        means = torch.stack([(importance * losses[t]).mean() for t, importance in map(sampler, u)])
        assert abs(float(means.mean() - losses.mean())) < 4 * float(means.std()) / math.sqrt(500)
    else:
        p = sampler.probabilities()
        corrected = (p * losses / (1000 * p)).sum()
        torch.testing.assert_close(corrected, losses.double().mean())
        timesteps, importance = sampler(GRID)
        # The grid misses what is rarer than 1 in 200,000; nowhere does it add anything.
        assert (importance * losses[timesteps]).double().mean() <= losses.double().mean() * 1.001
    if name in ("uniform", "stratified", *ADAPTIVE, "adapted"):
        timesteps, importance = sampler(GRID)
        torch.testing.assert_close(
            (importance * losses[timesteps]).double().mean(),
            losses.double().mean(),
            rtol=2e-3,
            atol=0,
        )


SHORT = NoiseSchedule(torch.sigmoid(torch.linspace(5, -5, 12, dtype=torch.float64)))
LOSSES = torch.linspace(0.1, 1, 12)
# Learned without a running mean, the objective is linear in the samples, so that expectations are exact.
WEIGHTED = [
    ("min-snr", {}),
    ("uncertainty", {"bins": 4}),
    ("dy-sigma", {"half_life": None, "bins": 4}),
]


def expected_gradients(weighting, probabilities, importance):
    """Expectation, over one timestep drawn with p_t, of the gradient of each loss and of what the weighting learns."""
    losses = LOSSES.clone().requires_grad_()
    for t in range(12):
        one = torch.tensor([t])
        correction = None if importance is None else importance[one]
        (probabilities[t].float() * weighting(losses[one], one, correction)).backward()
    return [losses.grad, *(p.grad for p in weighting.parameters())]


@functools.cache
def uniform_gradients(number):
    name, params = WEIGHTED[number]
    uniform = torch.full((12,), 1 / 12, dtype=torch.float64)
    return expected_gradients(make_weighting(name, SHORT, **params), uniform, None)


@pytest.mark.parametrize("number", range(len(WEIGHTED)), ids=[name for name, _ in WEIGHTED])
@pytest.mark.parametrize("sampler_name", every())
def test_with_importance_the_sampler_changes_no_expectation_and_without_it_is_a_second_weight(
    sampler_name, number
):
    name, params = WEIGHTED[number]
    sampler = every(SHORT)[sampler_name]
    p = sampler.probabilities()
    wanted = uniform_gradients(number)
    corrected = expected_gradients(make_weighting(name, SHORT, **params), p, (1 / (12 * p)).float())
    for one, other in zip(corrected, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    bare = expected_gradients(make_weighting(name, SHORT, **params), p, None)
    torch.testing.assert_close(bare[0], 12 * p.float() * wanted[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["dy-sigma", "loss-balance", "variance-aware"])
def test_statistics_of_a_weighting_are_those_of_uniform_timesteps(name):
    learned = {}
    for sampler_name, corrected in (("uniform", True), ("adapted", True), ("adapted", False)):
        weighting, sampler = make_weighting(name, SHORT, bins=12), every(SHORT)[sampler_name]
        timesteps, importance = sampler(GRID[::10].clone())
        losses = (LOSSES * (1 + 0.2 * torch.sin(torch.arange(12))))[timesteps].requires_grad_()
        weighting(losses, timesteps, importance if corrected else None).backward()
        grads = [p.grad for p in weighting.parameters()]
        learned[sampler_name, corrected] = torch.cat([weighting.weights(), *grads])
    torch.testing.assert_close(
        learned["adapted", True], learned["uniform", True], rtol=2e-3, atol=1e-4
    )
    moved = (learned["adapted", False] - learned["uniform", True]).abs().max()
    # The rules that look at means of a bin alone need no correction: a mean does not depend on how often it was drawn.
    assert (moved > 0.01) == (name != "loss-balance")


def test_training_with_gradient_norms_adapts_to_the_weighted_gradients():
    """And does not depend on how a batch is split."""
    moments = []
    for accumulate in (1, 2):
        config = TrainConfig(
            model="micro", image_size=8, train_images=32, weighting="min-snr", batch_size=16,
            timestep_sampler="gradient-norm", sampler_params={"bins": 5}, accumulate=accumulate,
            compile=False, precision="float32",
        )  # fmt: skip
        data = load_split(config, "train", torch.device("cpu"))
        state = build(config, data)
        weights = state.weighting.weights()
        record = train_step(state, data, config)
        assert record.losses.shape == (16,) and weights.isfinite().all()
        moments.append(state.sampler.moments.clone())
    assert moments[0][0].sum() == 16 and moments[0][2].sum() > 0
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="no-compile"):
        make_parts(TrainConfig(timestep_sampler="gradient-norm", compile=True))


class LearnsFromNorms(Weighting):
    """A weighting of one's own that observes gradients and proposes no density."""

    observes = "gradient-norms"

    def __init__(self, setting):
        super().__init__(setting, bins=4)
        self.register_buffer("seen", torch.zeros(()))

    def weights(self):
        return self.scaled(torch.ones(self.num_timesteps))

    def observe_gradient_norms(self, squared_norms, timesteps, importance):
        self.seen += squared_norms.sum()
        return torch.zeros((), requires_grad=True)


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment", "gradient-norm"])
def test_a_weighting_that_observes_gradients_gets_them_from_any_sampler(name):
    config = TrainConfig(
        model="micro", image_size=8, train_images=32, batch_size=16, timestep_sampler=name, compile=False
    )  # fmt: skip
    data = load_split(config, "train", torch.device("cpu"))
    state = build(config, data)
    state.weighting = make_weighting(LearnsFromNorms, state.schedule, config.prediction)
    record = train_step(state, data, config)
    assert state.weighting.seen > 0
    if name == "loss-second-moment":  # it goes on to take losses, with weights of 1
        torch.testing.assert_close(state.sampler.moments[2].sum(), record.losses.square().sum())


@pytest.mark.parametrize("name", ["uniform", "stratified", "lognormal", "loss-second-moment"])
def test_a_training_step_counts_a_density_once(name):
    config = TrainConfig(
        model="micro", image_size=8, train_images=32, timestep_sampler=name, weighting="min-snr"
    )
    data = load_split(config, "train", torch.device("cpu"))
    state = build(config, data)
    if name == "loss-second-moment":
        state.sampler = adapted()
    p, w, twin = (
        state.sampler.probabilities(),
        state.weighting.weights(),
        copy.deepcopy(state.sampler),
    )
    record = train_step(state, data, config)
    each = w[record.timesteps] * record.losses
    if name == "loss-second-moment":  # it sees what it corrects, before the correction
        twin.update(each, record.timesteps)
        torch.testing.assert_close(state.sampler.moments, twin.moments)
        each = each / (1000 * p[record.timesteps]).float()
        assert each.std() > 0 and p.std() > 1e-5
    torch.testing.assert_close(record.loss, each.mean(), rtol=1e-5, atol=0)


def test_stratified_timesteps_fill_the_range_and_each_is_uniform():
    sampler = make_sampler("stratified", LINEAR)
    for seed in range(5):
        timesteps, importance = sampler(
            torch.rand(50, generator=torch.Generator().manual_seed(seed))
        )
        assert torch.equal((timesteps // 20).sort().values, torch.arange(50))
        assert (importance == 1).all()
    last = torch.stack(
        [sampler(torch.rand(7) * 0 + shift)[0][-1] for shift in torch.linspace(0, 0.999, 1000)]
    )
    assert len(last.unique()) > 990


def test_stratified_sampling_varies_less():
    losses = torch.linspace(0, 1, 1000)

    def spread(name):
        sampler = make_sampler(name, LINEAR)
        u = torch.rand(300, 32, generator=torch.Generator().manual_seed(0))
        return float(torch.stack([losses[sampler(row)[0]].mean() for row in u]).std())

    assert spread("stratified") < spread("uniform") / 5


@pytest.mark.parametrize(
    ("name", "quantity"), [("lognormal", "sigma"), ("laplace", "log_snr"), ("logit-normal", "time")]
)
def test_densities_have_the_stated_centre_and_width(name, quantity):
    schedule = NoiseSchedule.cosine(4000)
    p = make_sampler(name, schedule).probabilities()
    x = {
        "sigma": -schedule.log_snr / 2,
        "log_snr": schedule.log_snr,
        "time": ((torch.arange(4000) + 0.5) / 4000).double().logit(),
    }[quantity]
    mean = (p * x).sum()
    deviation = (p * (x - mean) ** 2).sum().sqrt()
    wanted = {
        "lognormal": (-1.2, 1.2),
        "laplace": (0.0, 0.5 * math.sqrt(2)),
        "logit-normal": (0.0, 1.0),
    }[name]
    assert abs(mean - wanted[0]) < 0.02 and abs(deviation / wanted[1] - 1) < 0.02


def test_lognormal_equals_the_sampling_of_edm_on_the_levels_of_the_schedule():
    sampler = make_sampler("lognormal", LINEAR)
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ln_sigma = torch.special.ndtri(u) * 1.2 - 1.2
    timesteps, _ = sampler(u)
    inside = (timesteps > 0) & (timesteps < 999)
    gap = (-LINEAR.log_snr / 2).diff()
    local = torch.maximum(gap[(timesteps - 1).clamp(min=0)], gap[timesteps.clamp(max=998)])
    assert ((-LINEAR.log_snr[timesteps] / 2 - ln_sigma).abs() <= local / 2 + 1e-9)[inside].all()


@given(st.floats(0, 1, exclude_max=True))
def test_the_same_u_gives_the_same_timestep_and_never_one_out_of_range(u):
    for sampler in SAMPLERS.values():
        timesteps, importance = sampler(torch.tensor([u], dtype=torch.float64))
        assert 0 <= int(timesteps[0]) < 1000 and torch.isfinite(importance).all()
    assert int(SAMPLERS["uniform"](torch.tensor([u], dtype=torch.float64))[0][0]) in (
        int(u * 1000 - 1e-9),
        int(u * 1000 + 1e-9),
    )


SAMPLERS = every()


def test_parts_of_the_unit_interval_are_closed_below():
    sampler = make_sampler("uniform", NoiseSchedule(torch.tensor([0.9, 0.6, 0.3, 0.1])))
    assert sampler(torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.75, 0.99999994]))[0].tolist() == [
        0,
        0,
        1,
        2,
        3,
        3,
    ]


def test_the_step_at_zero_snr_gets_the_mass_beyond_the_last_level():
    from scipy.stats import laplace, norm

    schedule = NoiseSchedule(torch.tensor([0.9, 0.5, 0.2, 0.0]))
    level = schedule.log_snr[:3].numpy()
    edges = np.array(
        [np.inf, level[:2].mean(), level[1:].mean(), level[2] - (level[1] - level[2]) / 2, -np.inf]
    )
    for name, distribution, x in (
        ("laplace", laplace(0, 0.5), edges),
        ("lognormal", norm(-1.2, 1.2), -edges / 2),
    ):
        wanted = np.abs(np.diff(distribution.cdf(x)))
        np.testing.assert_allclose(
            make_sampler(name, schedule).probabilities().numpy(), wanted, rtol=1e-9
        )


# ---------------------------------------------------------------- loss-second-moment


def test_it_follows_the_second_moment_after_the_warm_up():
    """As in improved-diffusion: uniform up to ten losses a timestep, then roots of second moments, 0.1 % uniform."""
    schedule = make_schedule("linear", 20)
    sampler = make_sampler("loss-second-moment", schedule, bins=20, half_life=1e9)
    timesteps = torch.arange(20).repeat(9)
    losses = torch.rand(180, generator=torch.Generator().manual_seed(0)) * (1 + timesteps)
    sampler.update(losses, timesteps)
    torch.testing.assert_close(
        sampler.probabilities(), torch.full((20,), 0.05, dtype=torch.float64)
    )
    more = torch.rand(20, generator=torch.Generator().manual_seed(1)) * torch.arange(1.0, 21)
    sampler.update(more, torch.arange(20))
    history = np.concatenate([losses.numpy().reshape(9, 20), more.numpy()[None]])
    roots = np.sqrt(np.mean(history**2, axis=0))
    wanted = roots / roots.sum() * (1 - 0.001) + 0.001 / 20
    np.testing.assert_allclose(sampler.probabilities().numpy(), wanted, rtol=1e-5)


def test_the_warm_up_counts_losses_that_the_running_mean_forgets():
    sampler = make_sampler(
        "loss-second-moment", make_schedule("linear", 4), bins=4, warmup=10, half_life=4.0
    )
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for _ in range(10):
        assert sampler.probabilities().std() < 1e-12
        sampler.update(losses, torch.arange(4))
    torch.testing.assert_close(
        sampler.probabilities(), losses.double() / 10 * 0.999 + 0.001 / 4, rtol=1e-6, atol=0
    )


def test_it_lowers_the_variance_of_the_corrected_mean():
    u = torch.rand(400, 16, generator=torch.Generator().manual_seed(0))
    losses = 1.5 * torch.arange(1, 1001) / 1000
    means = {
        name: torch.stack(
            [(importance * losses[t]).mean() for t, importance in map(SAMPLERS[name], u)]
        )
        for name in ("uniform", "adapted")
    }
    assert (
        means["adapted"].std() < means["uniform"].std() / 10
    )  # losses without noise: all but none is left
    assert abs(float(means["adapted"].mean() - losses.mean())) < 1e-2


def test_it_needs_no_process_group_and_learns_in_train_mode_alone():
    assert not torch.distributed.is_initialized()
    sampler = adapted()
    before = sampler.probabilities()
    sampler.eval().update(torch.full((64,), 100.0), torch.zeros(64, dtype=torch.int64))
    assert torch.equal(sampler.probabilities(), before)
    sampler.train().update(torch.full((64,), 100.0), torch.zeros(64, dtype=torch.int64))
    assert sampler.probabilities()[0] > 2 * before[0]


def test_its_state_is_in_the_state_dict():
    sampler, fresh = adapted(), make_sampler("loss-second-moment", LINEAR)
    fresh.load_state_dict(sampler.state_dict())
    assert torch.equal(fresh.probabilities(), sampler.probabilities())
    for name, sampler in SAMPLERS.items():
        keeps_nothing = sampler.observes == "nothing" or name == "weighting"
        assert keeps_nothing == (not sampler.state_dict())


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_values_that_are_not_finite_are_as_if_they_had_not_been_there(name, value):
    """1e30 is finite. Its square in float32 is not, and a few squared norms of 1e38 add up to infinity."""
    if name == "gradient-norm" and value == 1e30:
        value = 1e38
    first, second = (make_sampler(name, LINEAR, bins=10, half_life=1e9) for _ in range(2))
    timesteps = torch.arange(1000)
    values = 1 + timesteps / 1000
    spoilt = values.clone()
    spoilt[::100] = value
    kept = spoilt == values
    for _ in range(3):
        first.update(spoilt, timesteps)
        second.update(values[kept], timesteps[kept])
    torch.testing.assert_close(first.moments, second.moments, rtol=1e-6, atol=0)
    assert first.probabilities().std() > 0


def test_a_squared_norm_below_zero_is_left_out():
    """It cannot be one, and its root would make every density NaN."""
    sampler = make_sampler("gradient-norm", LINEAR, bins=1, warmup=0)
    sampler.update(torch.tensor([-8.0, 2.0]), torch.tensor([1, 2]))
    assert sampler.moments[:, 0].tolist() == [1.0, 1.0, 2.0]


def test_losses_of_zero_are_losses():
    sampler = make_sampler("loss-second-moment", LINEAR, bins=10)
    for _ in range(20):
        sampler.update(torch.zeros(1000), torch.arange(1000))
    torch.testing.assert_close(sampler.probabilities(), torch.full((1000,), 1e-3).double())
    half = torch.where(torch.arange(1000) < 500, 0.0, 1.0)
    sampler.update(half, torch.arange(1000))
    p = sampler.probabilities()
    assert p.isfinite().all() and (p > 0).all() and p[999] > 100 * p[0]


def test_gradient_norms_give_the_density_of_least_variance():
    """S(p) = mean of w^2 m / (T p) is least at p as sqrt(w^2 m); the floor costs 1 / (1 - u) at most."""
    norms = torch.linspace(0.1, 3, 1000).double() ** 4
    timesteps = torch.arange(1000)
    sampler = make_sampler("gradient-norm", LINEAR, bins=1000, warmup=1, uniform=0.1)
    sampler.update(norms, timesteps)

    def second_moment(p):
        return float((norms / p).sum() / 1000**2)

    best = norms.sqrt() / norms.sqrt().sum()
    found = sampler.probabilities()
    assert second_moment(best) < second_moment(found)
    assert second_moment(found) <= second_moment(best) / 0.9
    assert second_moment(found) < second_moment(torch.full((1000,), 1e-3).double())
    torch.testing.assert_close(found, 0.9 * best + 0.1 / 1000, rtol=1e-4, atol=0)


# ---------------------------------------------------------------- densities of a weighting


@pytest.mark.parametrize(("name", "power"), [("weight", 1.0), ("sqrt-weight", 0.5)])
@pytest.mark.parametrize("uniform", [0.1, 0.5])
def test_density_of_a_weighting(name, power, uniform):
    weighting = make_weighting("min-snr", LINEAR, "sample")
    sampler = make_sampler(name, LINEAR, weighting=weighting, uniform=uniform)
    mass = weighting.weights().double() ** power
    wanted = (1 - uniform) * mass / mass.sum() + uniform / 1000
    torch.testing.assert_close(sampler.probabilities(), wanted)
    by_table = make_sampler(name, LINEAR, weighting=weighting.weights(), uniform=uniform)
    assert torch.equal(by_table.probabilities(), sampler.probabilities())


@pytest.mark.parametrize("name", ["weight", "sqrt-weight", "gradient-norm", "loss-second-moment"])
def test_the_floor_bounds_importance(name):
    """Also where almost all weight or gradient lies on one timestep."""
    peak = torch.full((1000,), 1e-12)
    peak[3] = 1.0
    bins = {"bins": 1000, "warmup": 1} if name in ADAPTIVE else {}
    sampler = make_sampler(name, LINEAR, weighting=peak, uniform=0.2, **bins)
    sampler.update(peak, torch.arange(1000))
    importance = 1 / (1000 * sampler.probabilities())
    assert importance.max() <= 1 / 0.2 + 1e-9


# ---------------------------------------------------------------- stratified draws of any density


@pytest.mark.parametrize("name", [name for name in TIMESTEP_SAMPLERS if name != "stratified"])
def test_any_density_can_be_drawn_stratified(name):
    schedule = NoiseSchedule.linear(100, beta_end=0.2)
    bins = {"bins": 10, "warmup": 1} if name in ADAPTIVE else {}
    weighting = weighting_for(name, schedule)
    sampler = make_sampler(name, schedule, weighting=weighting, stratified=True, **bins)
    sampler.update(torch.arange(1.0, 101.0), torch.arange(100))
    p = sampler.probabilities()
    below = p.cumsum(0) - p
    size = 40
    # Over the shifts of the grid each timestep comes up as often as p says: its marginal is p.
    shifts = (torch.arange(250, dtype=torch.float64) + 0.5) / (250 * size)
    count = torch.zeros(100, dtype=torch.float64)
    for shift in shifts:
        timesteps, importance = sampler(shift.expand(size).contiguous())
        count += torch.bincount(timesteps, minlength=100)
        torch.testing.assert_close(importance.double(), 1 / (100 * p[timesteps]), rtol=1e-5, atol=0)
    torch.testing.assert_close(count / count.sum(), p, rtol=0, atol=1.1 / (250 * size))
    # And each of `size` equal parts of the distribution holds one of them.
    timesteps, _ = sampler(torch.full((size,), 0.3))
    part_of = torch.arange(size).double() / size
    for low in part_of:
        touches = (below[timesteps] < low + 1 / size) & (below[timesteps] + p[timesteps] > low)
        assert touches.any()


# ---------------------------------------------------------------- densities of SD3, against diffusers


@pytest.mark.parametrize(
    ("name", "params", "scheme", "options"),
    [
        ("mode", {"scale": 1.29}, "mode", {"mode_scale": 1.29}),
        ("mode", {"scale": -0.5}, "mode", {"mode_scale": -0.5}),
        # diffusers counts from the noisy end, so its mean is minus ours.
        ("logit-normal", {"mean": -0.7, "std": 0.8}, "logit_normal", {"logit_mean": 0.7, "logit_std": 0.8}),
        ("uniform", {}, "none", {}),
    ],
)  # fmt: skip
def test_densities_are_those_of_diffusers(name, params, scheme, options):
    count = 200_000
    torch.manual_seed(0)
    u = compute_density_for_timestep_sampling(scheme, count, **options)
    schedule = make_schedule("flow", 20)
    timesteps = 19 - (u * 20).long().clamp(max=19)
    frequency = torch.bincount(timesteps, minlength=20).double() / count
    p = make_sampler(name, schedule, **params).probabilities()
    torch.testing.assert_close(p, frequency, rtol=0, atol=5 * 0.5 / math.sqrt(count))


def test_cosmap_is_the_map_of_its_paper():
    """t = 1 - 1 / (tan(pi u / 2) + 1) of uniform u, and the density of the weighting of that name."""
    schedule = make_schedule("flow", 50)
    p = make_sampler("cosmap", schedule).probabilities()
    t = 1 - 1 / (torch.tan(GRID * math.pi / 2) + 1)
    frequency = torch.bincount((t * 50).long(), minlength=50).double() / len(GRID)
    torch.testing.assert_close(p, frequency, rtol=0, atol=1e-4)
    middle = (torch.arange(50) + 0.5) / 50
    theirs = compute_loss_weighting_for_sd3("cosmap", sigmas=middle).double()
    torch.testing.assert_close(p / p.mean(), theirs / theirs.mean(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (2.0, 1.0), (2.0, 5.0)])
def test_beta_is_the_beta_distribution(alpha, beta):
    draws = torch.distributions.Beta(alpha, beta).sample((200_000,))
    frequency = torch.bincount((draws * 20).long().clamp(max=19), minlength=20).double() / 200_000
    sampler = make_sampler("beta", NoiseSchedule.linear(20), alpha=alpha, beta=beta)
    torch.testing.assert_close(sampler.probabilities(), frequency, rtol=0, atol=6e-3)


@pytest.mark.parametrize("name", ["logit-normal", "mode", "cosmap", "beta"])
def test_a_shift_moves_the_draws_as_it_moves_the_levels(name):
    """Drawn on a shifted schedule, or shifted and drawn on a plain one: the same noise levels."""
    count = 4000
    shifted = make_schedule("flow", count, shift=3.0)
    plain = make_schedule("flow", count)
    by_schedule, _ = make_sampler(name, shifted)(GRID[::50].clone())
    by_sampler, _ = make_sampler(name, plain, shift=3.0)(GRID[::50].clone())
    torch.testing.assert_close(
        shifted.sigma[by_schedule], plain.sigma[by_sampler], rtol=0, atol=3 * 3 / count
    )


# ---------------------------------------------------------------- density times weight


def test_a_beta_sampler_is_a_weighting_and_which():
    """Beta(a, b) on a flow equals ln w = (b - 1) log_snr / 2 - (a + b - 4) softplus(log_snr / 2) on x0."""
    alpha, beta = 2.0, 3.0

    def as_weighting(log_snr):
        half = log_snr / 2
        return (beta - 1) * half - (alpha + beta - 4) * torch.logaddexp(
            half, torch.zeros_like(half)
        )

    schedule = make_schedule("flow", 4000)
    sampler = make_sampler("beta", schedule, alpha=alpha, beta=beta)
    found = effective_weights(sampler)
    weighting = make_weighting(as_weighting, schedule, "flow_prediction")
    wanted = effective_weights(make_sampler("uniform", schedule), weighting)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", [*TIMESTEP_SAMPLERS, "adapted"])
def test_effective_weights_are_the_objective_in_expectation(name):
    """The expected gradient of each loss, summed exactly over the timesteps that may be drawn."""
    sampler = every(SHORT)[name]
    weighting = make_weighting("min-snr", SHORT, "sample")
    p = sampler.probabilities()
    importance = (1 / (12 * p)).float() if sampler.corrected else None
    gradient = expected_gradients(weighting, p, importance)[0].double()
    effective = effective_weights(sampler, weighting)
    torch.testing.assert_close(gradient / gradient.mean(), effective, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("number", [np.float64, np.float32, torch.tensor])
def test_parameters_may_be_scalars_of_numpy_and_torch(number):
    one = make_sampler("logit-normal", LINEAR, mean=number(0.5), std=number(2.0))
    other = make_sampler("logit-normal", LINEAR, mean=0.5, std=2.0)
    torch.testing.assert_close(one.probabilities(), other.probabilities())
    adaptive = make_sampler(
        "gradient-norm", LINEAR, bins=np.int64(10), warmup=np.int64(5), uniform=number(0.5)
    )
    assert adaptive.bins.num_bins == 10


def test_the_sampler_of_a_weighting_has_its_objective():
    weighting = make_weighting("min-snr", LINEAR, "sample")
    sampler = TimestepSampler(weighting.weights())
    assert not sampler.corrected
    torch.testing.assert_close(
        effective_weights(sampler), effective_weights(SAMPLERS["uniform"], weighting)
    )


# ---------------------------------------------------------------- behaviour and bad input


def test_which_samplers_mean_to_be_corrected_and_what_they_observe():
    found = {name: (SAMPLERS[name].corrected, SAMPLERS[name].observes) for name in SAMPLERS}
    for name in [*DENSITIES, "stratified"]:
        assert found[name] == (False, "nothing"), name
    assert found["weight"] == found["sqrt-weight"] == (True, "nothing")
    assert found["weighting"] == found["gradient-norm"] == (True, "gradient-norms")
    assert found["loss-second-moment"] == (True, "losses")


def test_a_sampler_of_a_contributor_is_made_with_its_own_parameters(monkeypatch):
    class Powers(TimestepSampler):
        def __init__(self, schedule, *, power=1.0):
            masses = torch.arange(1.0, schedule.num_timesteps + 1) ** power
            super().__init__(masses)

    monkeypatch.setitem(TIMESTEP_SAMPLERS, "powers", Powers)
    sampler = make_sampler("powers", SHORT, power=2.0)
    assert float(sampler.probabilities()[-1]) == pytest.approx(144 / 650)
    with pytest.raises(ValueError, match=r"'powers'.*'exponent'.*'power'"):
        make_sampler("powers", SHORT, exponent=2.0)


@pytest.mark.parametrize("name", every())
def test_copies_and_low_precision_keep_the_probabilities(name):
    sampler = SAMPLERS[name]
    assert torch.equal(copy.deepcopy(sampler).half().probabilities(), sampler.probabilities())


@pytest.mark.slow
@pytest.mark.parametrize("name", every())
def test_a_compiled_sampler_draws_the_same(name):
    sampler = SAMPLERS[name]
    torch._dynamo.reset()
    u = torch.rand(8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(sampler, fullgraph=True, backend="eager")
    assert torch.equal(compiled(u)[0], sampler(u)[0])


def test_bad_input_is_refused():
    with pytest.raises(KeyError, match="logit-normal"):
        make_sampler("logitnormal", LINEAR)
    with pytest.raises(ValueError, match=r"lognormal.*scale.*mean"):
        make_sampler("lognormal", LINEAR, scale=1.0)
    for name, params in [
        ("lognormal", {"std": 0.0}),
        ("laplace", {"scale": math.inf}),
        ("loss-second-moment", {"uniform": 0}),
        ("gradient-norm", {"uniform": 1.5}),
        ("gradient-norm", {"half_life": "long"}),
        ("mode", {"scale": 2.0}),
        ("beta", {"alpha": -1.0}),
        ("cosmap", {"shift": 0.0}),
        ("logit-normal", {"std": True}),
    ]:
        with pytest.raises(ValueError, match="must be a finite number"):
            make_sampler(name, LINEAR, **params)
    with pytest.raises(ValueError, match="no probability"):
        make_sampler("laplace", LINEAR, scale=1e-3)
    with pytest.raises(ValueError, match="bins must be"):
        make_sampler("loss-second-moment", LINEAR, bins=1001)
    for weighting in (None, torch.ones(999), torch.zeros(1000), -torch.ones(1000)):
        with pytest.raises(ValueError, match="weight"):
            make_sampler("sqrt-weight", LINEAR, weighting=weighting)
    for u in (torch.rand(2, 2), torch.arange(3)):
        with pytest.raises(ValueError, match=r"u must be \(B,\)"):
            SAMPLERS["uniform"](u)
    with pytest.raises(ValueError, match="timesteps must"):
        adapted().update(torch.rand(3), torch.tensor([0, 1, 1000]))
    assert set(DENSITIES) < set(TIMESTEP_SAMPLERS)
