"""Timestep samplers: what they draw, that the importance correction is right, the adaptive one against its paper."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dysigma.samplers import DENSITIES, TIMESTEP_SAMPLERS, make_sampler
from dysigma.schedule import SCHEDULES, NoiseSchedule, make_schedule
from dysigma.training import TrainConfig, build, load_split, train_step
from dysigma.weightings import make_weighting

LINEAR = NoiseSchedule.linear(1000)
GRID = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def adapted(schedule=LINEAR, **params):
    sampler = make_sampler("loss-second-moment", schedule, **params)
    timesteps = torch.arange(len(schedule.log_snr)).repeat(12)
    sampler.update(1.5 * (timesteps + 1.0) / len(schedule.log_snr), timesteps)
    return sampler


def every(schedule=LINEAR):
    bins = {"bins": min(100, schedule.num_timesteps)}
    samplers = {
        name: make_sampler(name, schedule, **(bins if name == "loss-second-moment" else {}))
        for name in TIMESTEP_SAMPLERS
    }
    return samplers | {"adapted": adapted(schedule, **bins)}


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
    if name in ("uniform", "stratified", "loss-second-moment", "adapted"):
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
    ("const-x0", {}),
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


@pytest.mark.parametrize(("name", "params"), WEIGHTED)
@pytest.mark.parametrize("sampler_name", every())
def test_with_importance_the_sampler_changes_no_expectation_and_without_it_is_a_second_weight(
    sampler_name, name, params
):
    sampler = every(SHORT)[sampler_name]
    p, uniform = sampler.probabilities(), torch.full((12,), 1 / 12, dtype=torch.float64)
    wanted = expected_gradients(make_weighting(name, SHORT, **params), uniform, None)
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
    assert all(
        not sampler.state_dict() for name, sampler in SAMPLERS.items() if not sampler.corrected
    )


# ---------------------------------------------------------------- behaviour and bad input


def test_only_loss_second_moment_means_to_be_corrected():
    assert [name for name in TIMESTEP_SAMPLERS if SAMPLERS[name].corrected] == [
        "loss-second-moment"
    ]


@pytest.mark.parametrize("name", every())
def test_copies_and_low_precision_keep_the_probabilities(name):
    sampler = SAMPLERS[name]
    assert torch.equal(copy.deepcopy(sampler).half().probabilities(), sampler.probabilities())
    torch._dynamo.reset()
    u = torch.rand(8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(sampler, fullgraph=True, backend="eager")
    assert torch.equal(compiled(u)[0], sampler(u)[0])


def test_bad_input_is_refused():
    with pytest.raises(KeyError, match="logit-normal"):
        make_sampler("logitnormal", LINEAR)
    with pytest.raises(
        ValueError, match=r"'lognormal' has no parameter \['scale'\]; it has \['mean', 'std'\]"
    ):
        make_sampler("lognormal", LINEAR, scale=1.0)
    for name, params in [
        ("lognormal", {"std": 0.0}),
        ("laplace", {"scale": math.inf}),
        ("loss-second-moment", {"uniform": 0}),
    ]:
        with pytest.raises(ValueError, match="must be a finite number"):
            make_sampler(name, LINEAR, **params)
    with pytest.raises(ValueError, match="no probability; widen it"):
        make_sampler("laplace", LINEAR, scale=1e-3)
    with pytest.raises(ValueError, match="bins must be"):
        make_sampler("loss-second-moment", LINEAR, bins=1001)
    for u in (torch.rand(2, 2), torch.arange(3)):
        with pytest.raises(ValueError, match=r"u must be \(B,\)"):
            SAMPLERS["uniform"](u)
    with pytest.raises(ValueError, match="timesteps must"):
        adapted().update(torch.rand(3), torch.tensor([0, 1, 1000]))
    assert set(DENSITIES) < set(TIMESTEP_SAMPLERS)
