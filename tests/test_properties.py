"""Laws that hold for any input: hypothesis draws it, brute force or algebra says what is right."""

from __future__ import annotations

import json
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dysigma import pareto
from dysigma.bins import Bins
from dysigma.models import PRESETS
from dysigma.runs import differences
from dysigma.runs.checkpoints import MAY_DIFFER
from dysigma.samplers import DENSITIES, make_sampler
from dysigma.schedule import SCHEDULES, NoiseSchedule, make_schedule
from dysigma.training import TrainConfig
from dysigma.weightings import (
    PREDEFINED,
    DySigma,
    Setting,
    effective_sample_size,
    fluctuation,
    make_weighting,
    share_changed,
)

# Those of the variance-preserving path.
SCHEDULES = {name: make for name, make in SCHEDULES.items() if name != "flow"}

few = settings(max_examples=40)


# --- schedules --------------------------------------------------------------------------------------------------------


@st.composite
def schedules(draw: Any, last_zero: bool = False) -> NoiseSchedule:
    """Any strictly falling table in (0, 1), perhaps with 0 at the end."""
    steps = draw(st.lists(st.floats(1e-3, 5), min_size=2, max_size=40))
    start = draw(st.floats(-12, 12))
    bar = torch.sigmoid(start - torch.tensor(steps, dtype=torch.float64).cumsum(0))
    if last_zero:
        bar = torch.cat([bar, bar.new_zeros(1)])
    assume(bool((bar.diff() < 0).all()) and bar[0] < 1)
    return NoiseSchedule(bar)


@few
@given(schedules(), st.sampled_from(["epsilon", "sample", "v_prediction"]), st.integers(0, 2**31))
def test_noising_and_targets_are_undone_by_algebra(
    schedule: NoiseSchedule, kind: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(schedule.num_timesteps, (5,), generator=generator)
    x0, noise = torch.randn(2, 5, 2, 3, 3, generator=generator, dtype=torch.float64)
    x_t, target = (
        schedule.add_noise(x0, noise, timesteps),
        schedule.target(x0, noise, timesteps, kind),
    )
    bar = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    torch.testing.assert_close(x_t, alpha * x0 + sigma * noise, rtol=1e-6, atol=1e-6)
    scaled_x0 = {
        "epsilon": x_t - sigma * target,
        "sample": alpha * target,
        "v_prediction": alpha * (alpha * x_t - sigma * target),
    }
    torch.testing.assert_close(scaled_x0[kind], alpha * x0, rtol=1e-4, atol=1e-5)


@few
@given(st.sampled_from([*SCHEDULES]), st.integers(2, 300), st.booleans())
def test_every_named_schedule_falls_and_survives_diffusers(
    name: str, num_timesteps: int, zero: bool
) -> None:
    schedule = make_schedule(name, num_timesteps, zero_terminal_snr=zero)
    assert (schedule.log_snr.diff() < 0).all() and schedule.log_snr[:-1].isfinite().all()
    assert schedule.log_snr[-1].isneginf() == zero
    back = NoiseSchedule.from_diffusers(schedule.to_diffusers())
    torch.testing.assert_close(back.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-4, atol=1e-6)


# --- bins -------------------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 60).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t))), st.data())
def test_bin_means_are_those_of_a_loop(sizes: tuple[int, int], data: Any) -> None:
    num_timesteps, num_bins = sizes
    bins = Bins.uniform(num_timesteps, num_bins)
    timesteps = data.draw(st.lists(st.integers(0, num_timesteps - 1), max_size=30))
    values = data.draw(
        st.lists(st.floats(-1e3, 1e3), min_size=len(timesteps), max_size=len(timesteps))
    )
    means, counts = bins.mean(
        torch.tensor(values, dtype=torch.float64), torch.tensor(timesteps, dtype=torch.int64)
    )
    edges = bins.edges.tolist()
    for k in range(num_bins):
        inside = [v for v, t in zip(values, timesteps, strict=True) if edges[k] <= t < edges[k + 1]]
        assert counts[k] == len(inside)
        assert (
            math.isnan(means[k])
            if not inside
            else math.isclose(means[k], np.mean(inside), abs_tol=1e-9)
        )
    spread = bins.interpolation()
    torch.testing.assert_close(spread.sum(1), torch.ones(num_timesteps))
    assert (spread >= 0).all()


# --- weightings -------------------------------------------------------------------------------------------------------

KINDS = st.sampled_from(["epsilon", "sample", "v_prediction"])
LEARNING = {
    name: {"bins": 2}
    for name in ("uncertainty", "dy-sigma", "loss-balance", "variance-aware", "ugd")
}


@few
@given(schedules(), st.sampled_from([*PREDEFINED]), KINDS)
def test_a_predefined_weight_is_one_function_on_three_scales(
    schedule: NoiseSchedule, name: str, kind: str
) -> None:
    own = make_weighting(name, schedule, kind, normalize=False).weights().double()
    x0 = make_weighting(name, schedule, "sample", normalize=False).weights().double()
    snr = schedule.log_snr.exp()
    factor = {"epsilon": 1 / snr, "sample": torch.ones_like(snr), "v_prediction": 1 / (1 + snr)}[
        kind
    ]
    torch.testing.assert_close(own, x0 * factor, rtol=1e-4, atol=1e-30)
    assert (own >= 0).all()
    normal = make_weighting(name, schedule, kind).weights().double()
    torch.testing.assert_close(normal, own / own.mean(), rtol=1e-4, atol=1e-30)


@few
@given(schedules(last_zero=True), st.sampled_from([*PREDEFINED, *LEARNING]), KINDS)
def test_pure_noise_has_a_weight_or_a_refusal(
    schedule: NoiseSchedule, name: str, kind: str
) -> None:
    params = LEARNING.get(name, {})
    if kind == "epsilon":
        with pytest.raises(ValueError, match="SNR = 0"):
            make_weighting(name, schedule, kind, **params)
    else:
        assert make_weighting(name, schedule, kind, **params).weights().isfinite().all()


BATCH = st.lists(
    st.tuples(st.floats(0, 1e4, width=32), st.integers(0, 19)), min_size=1, max_size=12
)


@few
@given(BATCH, st.sampled_from([*PREDEFINED, *LEARNING]), st.randoms(use_true_random=False))
def test_a_batch_is_a_set_and_its_loss_a_weighted_mean(
    batch: list[tuple[float, int]], name: str, random: Any
) -> None:
    outcomes = []
    for samples in (batch, random.sample(batch, len(batch))):
        weighting = make_weighting(name, NoiseSchedule.linear(20), **LEARNING.get(name, {}))
        losses = torch.tensor([loss for loss, _ in samples], requires_grad=True)
        timesteps = torch.tensor([t for _, t in samples])
        before = weighting.weights()[timesteps]
        loss = weighting(losses, timesteps)
        loss.backward()
        torch.testing.assert_close(
            loss.detach(), (before * losses.detach()).mean(), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(losses.grad, before / len(samples), rtol=1e-5, atol=1e-7)
        outcomes.append(
            (loss.detach(), weighting.weights(), *(p.grad for p in weighting.parameters()))
        )
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@few
@given(
    st.floats(1e-6, 1e6), st.floats(1e-3, 1e3), st.sampled_from(["anchored", "excess", "conflict"])
)
def test_an_anchored_log_variance_rests_where_its_slope_is_zero(
    z: float, kappa: float, variant: str
) -> None:
    weighting = DySigma(
        Setting(NoiseSchedule.linear(20)), variant=variant, kappa=kappa, bins=4, clamp=80.0
    )
    s = float(weighting.fixed_point(torch.tensor([z]))[0])
    assert abs(1 + kappa * s - z * math.exp(-s)) < 1e-5 * (1 + kappa * abs(s))
    assert s >= -1 / kappa  # so no weight grows by more than e^(1 / kappa)


@few
@given(hnp.arrays(float, st.integers(2, 12), elements=st.floats(1e-3, 1e3)), st.floats(1e-2, 1e2))
def test_statistics_of_weights_do_not_see_a_common_factor(
    weights: np.ndarray, factor: float
) -> None:
    w = torch.from_numpy(weights)
    size, scaled = (float(effective_sample_size(x)) for x in (w, factor * w))
    assert 1 / len(w) - 1e-9 <= size <= 1 + 1e-9 and math.isclose(size, scaled, rel_tol=1e-9)
    assert share_changed(factor * w, w) == 0
    steps = torch.stack([w, 2 * w, 3 * w])
    torch.testing.assert_close(fluctuation(steps), fluctuation(factor * steps))
    torch.testing.assert_close(
        fluctuation(steps), torch.full_like(w, 0.5)
    )  # of 1, 2, 3: standard deviation 1, mean 2


@few
@given(
    st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=20),
    st.sampled_from([*DENSITIES]),
)
def test_a_sampler_inverts_its_own_distribution(u: list[float], name: str) -> None:
    sampler = make_sampler(name, NoiseSchedule.linear(30))
    timesteps, importance = sampler(torch.tensor(u))
    p = sampler.probabilities()
    below = p.cumsum(0) - p
    for x, t, w in zip(u, timesteps.tolist(), importance.tolist(), strict=True):
        assert below[t] - 1e-6 <= x <= below[t] + p[t] + 1e-6
        assert math.isclose(w, 1 / (30 * p[t]), rel_tol=1e-5)


# --- pareto -----------------------------------------------------------------------------------------------------------

GRADIENTS = hnp.arrays(
    float, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.integers(-4, 4).map(float)
)
CORNERS = st.integers(2, 3).flatmap(
    lambda m: hnp.arrays(
        np.int64, st.tuples(st.integers(1, 5), st.just(m)), elements=st.integers(0, 5)
    )
)


@few
@given(GRADIENTS)
def test_the_min_norm_point_is_below_no_gradient(gradients: np.ndarray) -> None:
    gramian = gradients @ gradients.T
    w = pareto.min_norm_weights(gramian)
    assert (w >= 0).all() and math.isclose(w.sum(), 1)
    square = w @ gramian @ w
    # The first-order condition, enough because the problem is convex.
    assert (gramian @ w >= square - 1e-8 * (1 + gramian.max())).all()
    assert math.isclose(pareto.stationarity(gramian) ** 2, square, abs_tol=1e-9)
    longer = np.arange(1, len(gramian) + 1)[:, None] * gradients
    # Whether gradients cancel does not depend on their lengths.
    assert (pareto.stationarity(longer @ longer.T) < 1e-6) == (pareto.stationarity(gramian) < 1e-6)


@few
@given(hnp.arrays(float, st.integers(1, 6).map(lambda k: (k, k)), elements=st.floats(-10, 10)))
def test_the_projection_is_semi_definite_and_nearest(matrix: np.ndarray) -> None:
    symmetric = (matrix + matrix.T) / 2
    nearest = pareto.project_psd(symmetric)
    assert np.linalg.eigvalsh(nearest)[0] > -1e-8
    # The projection on a convex cone: what is left is orthogonal to it and at no acute angle to the cone.
    left = symmetric - nearest
    assert abs((left * nearest).sum()) < 1e-6 and np.linalg.eigvalsh(left)[-1] < 1e-8
    np.testing.assert_allclose(pareto.project_psd(nearest), nearest, atol=1e-8)


@few
@given(CORNERS)
def test_dominance_and_volume_are_those_of_counting_cells(points: np.ndarray) -> None:
    kept = pareto.non_dominated(points)
    for i, p in enumerate(points):
        assert kept[i] == (not any((q <= p).all() and (q < p).any() for q in points))
    cells = product(range(6), repeat=points.shape[1])
    covered = sum(any((p <= cell).all() for p in points) for cell in map(np.array, cells))
    assert math.isclose(pareto.hypervolume(points, np.full(points.shape[1], 6)), covered)


# --- configurations ---------------------------------------------------------------------------------------------------

ANY = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**20)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([[], {}])
)
FIELDS = TrainConfig().to_dict()
VALID = st.fixed_dictionaries(
    {},
    optional={
        "images": st.integers(10**4, 10**12), "batch_size": st.sampled_from([8, 64]),
        "accumulate": st.sampled_from([1, 8]), "seed": st.integers(0, 2**63 - 1), "lr": st.floats(1e-12, 1e12),
        "weighting_lr": st.none() | st.floats(1e-9, 9), "model": st.sampled_from([*PRESETS]), "prediction": KINDS,
        "schedule": st.sampled_from([*SCHEDULES]), "flip": st.booleans(),
        "weighting_params": st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False)),
    },
)  # fmt: skip


@pytest.mark.slow
@few
@given(VALID)
def test_a_configuration_survives_json(values: dict[str, Any]) -> None:
    config = TrainConfig(**values)
    back = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config and not differences(config.to_dict(), back.to_dict())
    assert {key: getattr(back, key) for key in values} == values


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from([*FIELDS, "nonsense"]), ANY, max_size=3))
def test_any_configuration_is_taken_whole_or_refused_by_name(values: dict[str, Any]) -> None:
    try:
        config = TrainConfig.from_dict(values)
    except (KeyError, ValueError) as error:
        assert any(name.split("_")[0] in str(error) for name in values), str(error)
    else:
        assert all(getattr(config, name) == value for name, value in values.items())
        assert all(not isinstance(v, float) or math.isfinite(v) for v in config.to_dict().values())


@few
@given(VALID, st.sampled_from([*FIELDS]))
def test_differences_name_what_differs(values: dict[str, Any], name: str) -> None:
    saved = TrainConfig(**values).to_dict()
    for given_name, expected in (
        (name, "" if name in MAY_DIFFER else name),
        ("new field", ""),
    ):
        text = differences(saved, saved | {given_name: "other"})
        assert text.startswith(expected) and (bool(text) == bool(expected))
