"""Bins partition the timesteps, their means agree with a loop, and interpolation reproduces what is linear."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dysigma.bins import Bins
from dysigma.schedule import SCHEDULES, make_schedule


@given(st.integers(1, 200).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t))))
def test_uniform_bins_partition_the_timesteps(size):
    num_timesteps, num_bins = size
    bins = Bins.uniform(num_timesteps, num_bins)
    index = bins.index(torch.arange(num_timesteps))
    assert bins.num_bins == num_bins and bins.counts.max() - bins.counts.min() <= 1
    assert torch.equal(torch.bincount(index, minlength=num_bins), bins.counts)
    assert (index.diff() >= 0).all() and bins.counts.sum() == num_timesteps


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_interpolation_is_a_partition_of_unity_that_reproduces_lines(widths):
    bins = Bins([0, *torch.tensor(widths).cumsum(0).tolist()])
    weights = bins.interpolation()
    torch.testing.assert_close(weights.sum(1), torch.ones(sum(widths)))
    assert (weights >= 0).all()
    line = weights.double() @ (3 + 2 * bins.centers)
    t = torch.arange(sum(widths)).clamp(bins.centers[0], bins.centers[-1])
    torch.testing.assert_close(line, 3 + 2 * t.double(), rtol=1e-6, atol=1e-6)


@given(st.lists(st.floats(0.001, 1000), min_size=4, max_size=30), st.integers(1, 4))
def test_equal_mass_bins_are_never_empty(values, num_bins):
    bins = Bins.equal_mass(torch.tensor(values), num_bins)
    assert bins.num_bins == num_bins and bins.counts.min() >= 1 and bins.edges[-1] == len(values)


def test_one_bin_per_timestep_interpolates_nothing():
    torch.testing.assert_close(Bins.uniform(7, 7).interpolation(), torch.eye(7))


def test_means_agree_with_a_loop_and_an_empty_bin_is_nan():
    bins = Bins([0, 2, 5, 9])
    timesteps, values = torch.tensor([0, 1, 1, 8]), torch.tensor([1.0, 2.0, 6.0, 5.0])
    means, counts = bins.mean(values, timesteps)
    torch.testing.assert_close(means, torch.tensor([3.0, torch.nan, 5.0]), equal_nan=True)
    assert counts.tolist() == [3, 0, 1]


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_bins_are_equally_wide_in_log_snr(name, zero_terminal_snr):
    log_snr = make_schedule(name, zero_terminal_snr=zero_terminal_snr).log_snr
    finite = log_snr[torch.isfinite(log_snr)]
    bins = Bins.equal_log_snr(log_snr, 5)
    # Each timestep stands for the stretch of log SNR between the midpoints to its neighbours.
    middle = (finite[1:] + finite[:-1]) / 2
    middle = torch.cat(
        [1.5 * finite[:1] - finite[1:2] / 2, middle, 1.5 * finite[-1:] - finite[-2:-1] / 2]
    )
    edges = bins.edges.clamp(max=len(finite))
    widths, stretches = -middle[edges].diff(), -middle.diff()
    rounding = torch.stack([stretches[max(0, e - 1) : e + 1].max() for e in edges]) / 2
    assert ((widths - widths.mean()).abs() <= rounding[1:] + rounding[:-1]).all()


def test_equal_mass_bins_hold_equal_mass():
    values = torch.rand(500, generator=torch.Generator().manual_seed(0)) + 0.1
    mass = torch.zeros(10).index_add(
        0, Bins.equal_mass(values, 10).index(torch.arange(500)), values
    )
    torch.testing.assert_close(
        mass, torch.full((10,), values.sum().item() / 10), rtol=0, atol=values.max().item()
    )
    assert torch.equal(Bins.equal_mass(torch.ones(20), 5).edges, Bins.uniform(20, 5).edges)


@pytest.mark.parametrize("edges", [[0, 3, 3, 5], [1, 3], [0], [0.0, 2.0], [0, 4, 2], [[0, 1]]])
def test_edges_that_leave_a_bin_empty_or_are_no_edges_are_refused(edges):
    with pytest.raises(ValueError, match="edges must"):
        Bins(edges)


def test_more_bins_than_timesteps_and_bad_masses_are_refused():
    with pytest.raises(ValueError, match=r"bins.*\[1, 4\]"):
        Bins.uniform(4, 5)
    with pytest.raises(ValueError, match="bins must be"):
        Bins.equal_mass(torch.ones(4), 5)
    for integer in (np.int64(2), torch.tensor(2)):
        assert torch.equal(Bins.uniform(4, integer).edges, Bins.uniform(4, 2).edges)
    for number in (2.0, True, "2", 0):
        with pytest.raises(ValueError, match="bins must be"):
            Bins.uniform(4, number)
    for values in (torch.zeros(4), torch.tensor([1.0, -1.0]), torch.tensor([torch.nan, 1.0])):
        with pytest.raises(ValueError, match="values must"):
            Bins.equal_mass(values, 2)


def test_bins_move_with_their_module_and_keep_their_integers():
    assert Bins.uniform(10, 5).half().edges.dtype == torch.int64
    assert Bins.uniform(10, 5).to("meta").edges.device.type == "meta"
