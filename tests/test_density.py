"""Dy-Sigma's variant "density": what is learned moves the density of timesteps, never the objective."""

import copy
import dataclasses

import pytest
import torch

import dysigma
from dysigma import TrainConfig, make_sampler, make_schedule, make_weighting
from dysigma.objective import OutputLayerGradients
from dysigma.randomness import generator
from dysigma.training import iterate
from dysigma.training.parts import build, load_split, make_parts

SHORT = make_schedule("linear", 60)
ALL = torch.arange(60)
# Squared gradient norms that differ by orders of magnitude over the timesteps.
NORMS = torch.linspace(3, -3, 60).exp()


def density(kappa=1.0, bins=12, **params):
    weighting = make_weighting(
        "dy-sigma", SHORT, "sample", variant="density", kappa=kappa, bins=bins, **params
    )
    return weighting, make_sampler("weighting", SHORT, weighting=weighting)


def settled(kappa=1.0, norms=NORMS, **params):
    """A weighting of the variant after s has come to rest at constant squared norms."""
    weighting, sampler = density(kappa, clamp=12.0, **params)
    optimizer = torch.optim.LBFGS(
        weighting.parameters(), max_iter=200, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        loss = weighting.observe_gradient_norms(norms, ALL, torch.ones(60))
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(objective)
    return weighting, sampler


@pytest.mark.parametrize("prior", ["min-snr", "const-x0", "sigmoid"])
@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_weights_are_those_of_the_prior_bit_for_bit_whatever_was_learned(
    prior, target, normalize
):
    weighting = make_weighting(
        "dy-sigma", SHORT, target, normalize, variant="density", prior=prior, bins=12
    )
    with torch.no_grad():
        weighting.coefficients.normal_()
    wanted = make_weighting(prior, SHORT, target, normalize)
    assert torch.equal(weighting.weights(), wanted.weights())
    losses = torch.rand(60)
    assert torch.equal(weighting(losses, ALL), wanted(losses, ALL))


def test_the_corrected_mean_is_that_of_uniform_sampling_and_importance_is_bounded():
    weighting, sampler = density()
    with torch.no_grad():
        weighting.coefficients.normal_(std=4.0)
    p = sampler.probabilities()
    values = torch.randn(60, dtype=torch.float64)
    torch.testing.assert_close((p * values / (60 * p)).sum(), values.mean())
    assert (1 / (60 * p)).max() <= 10 + 1e-9
    assert p.max() / p.min() > 3  # what was learned moves it


def test_before_learning_the_density_is_that_of_the_sampler_that_learns_nothing():
    weighting, sampler = density()
    baseline = make_sampler("sqrt-weight", SHORT, weighting=weighting.weights())
    torch.testing.assert_close(sampler.probabilities(), baseline.probabilities(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0, 10.0])
def test_it_rests_at_the_fixed_point_that_anchored_has(kappa):
    # With one bin for each timestep, the interpolation between bins is exact.
    weighting, _ = settled(kappa, bins=60)
    weighted = weighting.prior * NORMS
    wanted = weighting.fixed_point(weighted / weighted.mean())
    torch.testing.assert_close(weighting.log_variances().double(), wanted, atol=0.01, rtol=0)
    mass = weighting.prior.double().sqrt() * (wanted / 2).exp()
    torch.testing.assert_close(weighting.density(), mass / mass.sum(), rtol=0.01, atol=0)
    if kappa == 0:  # the density of least variance: the weight times the root of the squared norm
        best = weighting.prior.double() * NORMS.double().sqrt()
        torch.testing.assert_close(weighting.density(), best / best.sum(), rtol=0.01, atol=0)


def test_trust_without_end_draws_by_the_root_of_the_weight():
    weighting, _ = settled(kappa=1e6)
    root = weighting.weights().double().sqrt()
    torch.testing.assert_close(weighting.density(), root / root.sum(), rtol=1e-3, atol=0)


def test_learning_lowers_the_variance_of_the_corrected_mean():
    """S(p) = mean of w^2 m / (T p), by hand; uniform sampling, the root of the weight, and learned."""

    def second_moment(weighting, p):
        return float((weighting.weights().double() ** 2 * NORMS / (60**2 * p)).sum())

    weighting, sampler = settled(kappa=0.0)
    uniform = second_moment(weighting, torch.full((60,), 1 / 60))
    root = make_sampler("sqrt-weight", SHORT, weighting=weighting.weights()).probabilities()
    learned = second_moment(weighting, sampler.probabilities())
    assert learned < second_moment(weighting, root) < uniform
    without_floor = second_moment(weighting, weighting.density())
    assert learned <= min(without_floor / 0.9, uniform / 0.1)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_norms_does_not_matter(scale):
    one, _ = settled()
    other, _ = settled(norms=NORMS * scale)
    torch.testing.assert_close(one.density(), other.density(), rtol=1e-2, atol=0)


def test_what_s_minimises_touches_s_alone_and_leaves_out_what_is_not_finite():
    weighting, _ = density()
    norms = NORMS.clone().requires_grad_()
    bad = norms.clone()
    bad[5] = torch.nan
    bad[7] = torch.inf
    weighting.observe_gradient_norms(bad, ALL, torch.ones(60)).backward()
    assert norms.grad is None
    assert weighting.coefficients.grad.isfinite().all() and weighting.coefficients.grad.any()
    assert weighting.running.isfinite().all()


def test_s_learns_the_same_from_timesteps_drawn_unevenly_with_importance():
    times_drawn = 1 + ALL % 4
    often = ALL.repeat_interleave(times_drawn)
    # 1 / (T p) of timesteps drawn with p = times_drawn / len(often)
    importance = len(often) / (60 * times_drawn[often].float())

    evenly, _ = density()
    evenly.observe_gradient_norms(NORMS, ALL, torch.ones(60)).backward()
    unevenly, _ = density()
    unevenly.observe_gradient_norms(NORMS[often], often, importance).backward()
    torch.testing.assert_close(unevenly.coefficients.grad, evenly.coefficients.grad)


def test_it_can_learn_from_losses_in_the_call_itself():
    weighting, sampler = density(observes="losses")
    assert (weighting.observes, sampler.observes) == ("losses", "nothing")
    weighting(NORMS.clone().requires_grad_(), ALL).backward()
    assert weighting.coefficients.grad.any()
    with pytest.raises(ValueError, match="learns from losses"):
        weighting.observe_gradient_norms(NORMS, ALL, torch.ones(60))


def test_in_a_loop_of_your_own():
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 4)
    weighting, sampler = density()
    optimizer = torch.optim.Adam([{"params": network.parameters()}, *weighting.parameter_groups()])
    before = sampler.probabilities()
    for _ in range(20):
        timesteps, importance = sampler(torch.rand(32))
        with OutputLayerGradients(network) as output:
            x = torch.randn(32, 4) * (1 + timesteps[:, None])
            losses = (network(x) - x).square().mean(1)
            losses.retain_grad()
            weighting(losses, timesteps, importance).backward()
        norms = output.squared_norms(losses)
        weighting.observe_gradient_norms(norms, timesteps, importance).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(before, sampler.probabilities())


CONFIG = TrainConfig(
    data="gaussian-fields", model="micro", prediction="sample", weighting="dy-sigma",
    weighting_params={"variant": "density", "bins": 10}, timestep_sampler="weighting",
    images=160, batch_size=16, warmup_images=0, device="cpu", threads=1, train_images=64,
)  # fmt: skip


def test_training_learns_a_density_and_resumes_exactly():
    data = load_split(CONFIG, "train", torch.device("cpu"))
    state = build(CONFIG, data)
    start = state.sampler.probabilities()
    saved = None
    for record in iterate(state, data, CONFIG):
        if record.step == 4:
            saved = copy.deepcopy((state.step, *state.state_dict()))
    assert not torch.equal(start, state.sampler.probabilities())
    again = build(CONFIG, data)
    again.load_state_dict(*saved)
    for _ in iterate(again, data, CONFIG):
        pass
    assert torch.equal(state.sampler.probabilities(), again.sampler.probabilities())
    ended, resumed = state.state_dict()[0], again.state_dict()[0]
    assert all(torch.equal(ended[name], resumed[name]) for name in ended)


def test_a_training_step_hands_on_the_importance_of_what_was_drawn():
    data = load_split(CONFIG, "train", torch.device("cpu"))
    state = build(CONFIG, data)
    u = torch.rand(CONFIG.batch_size, generator=generator(CONFIG.seed, 0, "timesteps"))
    _, importance = state.sampler(u)
    next(iterate(state, data, CONFIG))
    assert importance.std() > 0.1  # or it would not matter
    torch.testing.assert_close(state.weighting.running[0], importance.sum())


def test_parts_of_a_batch_learn_what_the_whole_batch_learns():
    data = load_split(CONFIG, "train", torch.device("cpu"))
    found = []
    for accumulate in (1, 4):
        config = dataclasses.replace(CONFIG, accumulate=accumulate, images=64)
        state = build(config, data)
        for _ in iterate(state, data, config):
            pass
        found.append(state.sampler.probabilities())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestep_sampler": "uniform"}, "proposes the density"),
        ({"timestep_sampler": "sqrt-weight"}, "proposes the density"),
        ({"weighting": "min-snr", "weighting_params": {}}, "proposes no density"),
        (
            {"weighting_params": {"variant": "anchored", "observes": "losses"}},
            "observes is of density",
        ),
        ({"sampler_params": {"uniform": 0.0}}, "uniform"),
        ({"compile": True}, "compile"),
    ],
)
def test_refused_before_training(change, words):
    with pytest.raises(ValueError, match=words):
        make_parts(dataclasses.replace(CONFIG, **change))


def test_other_samplers_and_other_objects_are_refused_with_the_way_out():
    weighting, _ = density()
    with pytest.raises(ValueError, match="sampler 'weighting'"):
        make_sampler("uniform", SHORT, weighting=weighting)
    with pytest.raises(ValueError, match="variant='density'"):
        make_sampler("weighting", SHORT)
    with pytest.raises(KeyError, match="observes"):
        density(observes="noise")
    assert dysigma.make_weighting("min-snr", SHORT).density() is None
