"""Nothing is lost: killed runs end as whole ones; damage, a full disk and a second process change nothing."""

import dataclasses

import pytest
import torch
from faults import BASE, CASES, outcome, torment

from dysigma.training import train

SHORT = dataclasses.replace(BASE, images=80, checkpoint_every=16)


def quick(config, out, **options):
    return train(config, out, progress=False, finish=False, **options)


@pytest.mark.parametrize("weighting", CASES)
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(tmp_path, weighting):
    config = dataclasses.replace(SHORT, weighting=weighting, **CASES[weighting])
    found = torment(config, kills=3, folder=tmp_path, seed=0)
    assert found["kills"] == 3 and found["runs"] >= 1 and found["tensors"] > 300 and found["rows"] > 3
    assert found["differing_tensors"] == found["differing_rows"] == 0


def test_the_comparison_sees_one_bit(tmp_path):
    quick(SHORT, tmp_path / "a")
    tensors, rows = outcome(tmp_path / "a")
    quick(dataclasses.replace(SHORT, seed=1), tmp_path / "b")
    others, other_rows = outcome(tmp_path / "b")
    assert sum(not torch.equal(tensors[name], others[name]) for name in tensors) > 300
    assert sum(a != b for a, b in zip(rows, other_rows, strict=True)) == len(rows)
