"""Laws that every weighting keeps, to run on one of your own: ``check_weighting("my_module:my_weighting")``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .schedule import PREDICTION_TYPES, NoiseSchedule
from .weightings.base import Weighting
from .weightings.registry import make_weighting

NUM_TIMESTEPS, BATCH = 40, 24

_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)

_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def _batches(seed: int, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Losses, timesteps and importance, (B,) each; the numbers are bfloat16, so that rounding to it changes nothing."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        timesteps = torch.randint(NUM_TIMESTEPS, (BATCH,), generator=draw)
        losses, importance = (0.5 + torch.rand(2, BATCH, generator=draw)).bfloat16().float()
        yield (losses * 2.0 ** (timesteps // 10 - 4)).requires_grad_(), timesteps, importance


def _trained(weighting: Weighting, seed: int, steps: int) -> Weighting:
    """The weighting after some steps, so that its state is nothing special."""
    optimizer = torch.optim.SGD(
        [*weighting.parameters(), torch.zeros(1)], lr=0.1
    )  # refuses to have nothing to do
    for batch in _batches(seed, steps):
        if weighting.needs_gramian:
            weighting.observe_gramian(torch.arange(1.0, 1 + weighting.bins.num_bins).diag())
        weighting(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weighting


def _state(weighting: Weighting) -> dict[str, Tensor]:
    gradients = {
        f"gradient of {k}": p.grad for k, p in weighting.named_parameters() if p.grad is not None
    }
    return {"weights()": weighting.weights(), **gradients} | {
        k: v.clone() for k, v in weighting.state_dict().items()
    }


def _table(weighting: Weighting, fresh: Weighting) -> None:
    w = weighting.weights()
    assert w.shape == (NUM_TIMESTEPS,) and w.dtype == torch.float32, (
        f"must be {NUM_TIMESTEPS} float32; got {w}"
    )
    assert not w.requires_grad and bool(w.isfinite().all()), f"must be finite and detached; got {w}"
    assert abs(float(w.mean()) - 1) < 1e-4, f"must have mean 1 when normalize; got {w.mean()}"


def _gradient(weighting: Weighting, fresh: Weighting) -> None:
    for losses, timesteps, importance in _batches(1, 2):
        each = weighting.weights()[timesteps] * importance
        value = weighting(losses, timesteps, importance)
        value.backward()
        _close((losses.grad, value.detach()), (each / BATCH, (each * losses.detach()).mean()))


def _eval_mode(weighting: Weighting, fresh: Weighting) -> None:
    losses, timesteps, _ = next(_batches(2, 1))
    before, random = _state(weighting), torch.random.get_rng_state()
    value = weighting.eval()(losses, timesteps)
    _equal(_state(weighting), before)
    _close(weighting.train()(losses, timesteps), value)
    _equal(torch.random.get_rng_state(), random, msg="the global random state must stay as it is")


def _state_dict(weighting: Weighting, fresh: Weighting) -> None:
    fresh.load_state_dict(weighting.state_dict())
    _equal(_state(fresh), _state(weighting))
    _equal(_state(_trained(fresh, 3, 4)), _state(_trained(weighting, 3, 4)))


def _same(weighting: Weighting, fresh: Weighting, call: Callable[..., Tensor]) -> None:
    (losses, timesteps, importance), other = next(_batches(4, 1)), copy.deepcopy(weighting)
    importance[-1] = 0  # the first can take its place
    changed, value = (
        call(other, losses, timesteps, importance),
        weighting(losses, timesteps, importance),
    )
    (changed + value).backward()
    _close(changed, value)
    _close(_state(other), _state(weighting))


def _twice(weighting: Weighting, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor:
    half = importance[:1] / 2
    twice = (torch.cat([column[:-1], column[:1]]) for column in (losses, timesteps))
    return weighting(*twice, torch.cat([half, importance[1:-1], half]))


def _in_low_precision(
    weighting: Weighting, losses: Tensor, timesteps: Tensor, importance: Tensor
) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return weighting.half()(losses.bfloat16(), timesteps, importance)


def _device(weighting: Weighting, fresh: Weighting) -> None:
    # A meta tensor has no numbers: reading one, for which a GPU would be waited for, raises.
    weighting.to("meta")(*(column.detach().to("meta") for column in next(_batches(7, 1))))


# Of a weighting and a fresh one of its kind. Under DDP the samples of all ranks come in one batch, rank after rank.
LAWS: dict[str, Callable[[Weighting, Weighting], None]] = {
    "weights() is a table of mean 1": _table,
    "the gradient of a loss is its weight over the batch size": _gradient,
    "state moves in train() mode alone": _eval_mode,
    "state_dict() is the whole state": _state_dict,
    "the order of samples does not matter": partial(
        _same, call=lambda w, *batch: w(*(x.flip(0) for x in batch))
    ),
    "a sample that comes twice with half the importance counts once": partial(_same, call=_twice),
    "low precision changes nothing": partial(_same, call=_in_low_precision),
    "levels of timesteps are those timesteps": partial(
        _same, call=lambda w, x, t, i: w.at(x, w.log_snr[t], i)
    ),
    "nothing waits for the device": _device,
}


def check_weighting(weighting: str | Callable[..., Any], **params: Any) -> None:
    """Run LAWS on a weighting, untrained and trained, with every target: a second or so.

    weighting, params: as in make_weighting. Raises AssertionError that names the broken law, or what make_weighting
    raises.
    """
    usual = NoiseSchedule(torch.linspace(6, -6, NUM_TIMESTEPS, dtype=torch.float64).sigmoid())
    cases = [(usual, kind) for kind in PREDICTION_TYPES[:3]] + [
        (NoiseSchedule.flow(NUM_TIMESTEPS), "flow_prediction")
    ]
    for (schedule, kind), law, steps in product(cases, LAWS, (0, 4)):
        one, fresh = (make_weighting(weighting, schedule, kind, **params) for _ in range(2))
        try:
            LAWS[law](_trained(one, 0, steps), fresh)
        except Exception as error:
            raise AssertionError(
                f"{weighting} with {kind} breaks the law '{law}': {error}"
            ) from error
