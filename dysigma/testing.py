"""Laws that every weighting keeps, to run on one of your own:
``print(check_weighting("my_module:my_weighting"))``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .schedule import NoiseSchedule
from .weightings import base
from .weightings.base import Weighting
from .weightings.registry import make_weighting

NUM_TIMESTEPS = 40
BATCH = 24

Batch = tuple[Tensor, Tensor, Tensor]  # losses, timesteps, importance: (B,) each
Call = Callable[[Weighting, Tensor, Tensor, Tensor], Tensor]
Law = Callable[[Weighting, Weighting], None]
Make = Callable[[NoiseSchedule, str], Weighting]

_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


# ---------------------------------------------------------------- what the laws are tried on


def _batches(seed: int, count: int) -> Iterator[Batch]:
    """Batches whose numbers are bfloat16, so that rounding to it changes nothing."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        timesteps = torch.randint(NUM_TIMESTEPS, (BATCH,), generator=draw)
        losses, importance = (0.5 + torch.rand(2, BATCH, generator=draw)).bfloat16().float()
        yield (losses * 2.0 ** (timesteps // 10 - 4)).requires_grad_(), timesteps, importance


def _batch(seed: int) -> Batch:
    return next(_batches(seed, 1))


def _trained(weighting: Weighting, seed: int, steps: int) -> Weighting:
    """The weighting after some steps, so that its state is nothing special."""
    # The zero is there because an optimizer refuses to have nothing to do.
    optimizer = torch.optim.SGD([*weighting.parameters(), torch.zeros(1)], lr=0.1)
    for batch in _batches(seed, steps):
        if weighting.needs_gramian:
            diagonal = torch.arange(1.0, 1 + weighting.bins.num_bins)
            weighting.observe_gramian(diagonal.diag())
        weighting(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weighting


def _state(weighting: Weighting) -> dict[str, Tensor]:
    """Weights, gradients of the parameters, parameters and buffers."""
    state = {"weights()": weighting.weights()}
    for name, parameter in weighting.named_parameters():
        if parameter.grad is not None:
            state[f"gradient of {name}"] = parameter.grad
    for name, value in weighting.state_dict().items():
        state[name] = value.clone()
    return state


def _descend(weighting: Weighting, losses: Tensor, timesteps: Tensor, importance: Tensor) -> None:
    weighting(losses.requires_grad_(), timesteps, importance).backward()


def _finite(weighting: Weighting, when: str) -> None:
    for name, value in _state(weighting).items():
        assert bool(value.isfinite().all()), f"{name} must be finite {when}; got {value}"


# ---------------------------------------------------------------- the laws


def _table(weighting: Weighting, fresh: Weighting) -> None:
    w = weighting.weights()
    wanted = f"must be {NUM_TIMESTEPS} float32; got {w}"
    assert w.shape == (NUM_TIMESTEPS,) and w.dtype == torch.float32, wanted
    is_plain = not w.requires_grad and bool(w.isfinite().all())
    assert is_plain, f"must be finite and detached; got {w}"
    assert abs(float(w.mean()) - 1) < 1e-4, f"must have mean 1 when normalize; got {w.mean()}"


def _gradient(weighting: Weighting, fresh: Weighting) -> None:
    for losses, timesteps, importance in _batches(1, 2):
        each = weighting.weights()[timesteps] * importance
        value = weighting(losses, timesteps, importance)
        value.backward()
        _close(losses.grad, each / BATCH)
        _close(value.detach(), (each * losses.detach()).mean())


def _eval_mode(weighting: Weighting, fresh: Weighting) -> None:
    losses, timesteps, _ = _batch(2)
    before = _state(weighting)
    random = torch.random.get_rng_state()
    value = weighting.eval()(losses, timesteps)
    _equal(_state(weighting), before)
    _close(weighting.train()(losses, timesteps), value)
    _equal(torch.random.get_rng_state(), random, msg="the global random state must stay as it is")


def _state_dict(weighting: Weighting, fresh: Weighting) -> None:
    fresh = copy.deepcopy(fresh)
    fresh.load_state_dict(weighting.state_dict())
    _equal(_state(fresh), _state(weighting))
    _equal(_state(_trained(fresh, 3, 2)), _state(_trained(weighting, 3, 2)))


def _same(weighting: Weighting, fresh: Weighting, call: Call) -> None:
    """A call must give the same value and leave the same state as the plain one."""
    losses, timesteps, importance = _batch(4)
    importance[-1] = 0  # the first can take its place
    other = copy.deepcopy(weighting)
    changed = call(other, losses, timesteps, importance)
    value = weighting(losses, timesteps, importance)
    (changed + value).backward()
    _close(changed, value)
    _close(_state(other), _state(weighting))


def _reversed(weighting: Weighting, *batch: Tensor) -> Tensor:
    value: Tensor = weighting(*(column.flip(0) for column in batch))
    return value


def _twice(weighting: Weighting, losses: Tensor, timesteps: Tensor, importance: Tensor) -> Tensor:
    """The first sample also in the place of the last, which counts nothing, with half the
    importance each."""
    half = importance[:1] / 2
    value: Tensor = weighting(
        torch.cat([losses[:-1], losses[:1]]),
        torch.cat([timesteps[:-1], timesteps[:1]]),
        torch.cat([half, importance[1:-1], half]),
    )
    return value


def _in_low_precision(
    weighting: Weighting, losses: Tensor, timesteps: Tensor, importance: Tensor
) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        value: Tensor = weighting.half()(losses.bfloat16(), timesteps, importance)
    return value


def _at_levels(
    weighting: Weighting, losses: Tensor, timesteps: Tensor, importance: Tensor
) -> Tensor:
    return weighting.at(losses, weighting.log_snr[timesteps], importance)


def _ranks(weighting: Weighting, fresh: Weighting) -> None:
    """Two ranks, played one after the other: samples of the other half come through over_ranks
    alone."""
    whole = _batch(5)
    gathered = tuple(column.detach().float() for column in whole)
    ranks = [copy.deepcopy(weighting) for _ in range(2)]
    value = weighting(*whole)
    value.backward()
    values = []
    with mock.patch.object(base, "over_ranks", lambda *columns: gathered[: len(columns)]):
        for rank, part in zip(ranks, (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)), strict=True):
            values.append(rank(*(column[part] for column in whole)))
            values[-1].backward()
    _close((values[0] + values[1]) / 2, value)
    for rank in ranks:
        _close(_state(rank), _state(weighting))


def _not_finite(weighting: Weighting, fresh: Weighting) -> None:
    """A step that a guard skips: the state is as if the bad samples had had the importance 0."""
    losses, timesteps, importance = _batch(6)
    where = torch.tensor([2])
    without = copy.deepcopy(weighting)
    without(losses, timesteps, importance.index_fill(0, where, 0.0))
    wanted = _state(without)
    # One at a time: together, inf - inf would wake a guard that looks for NaN alone.
    for bad in (torch.nan, torch.inf, -torch.inf, 1e30):
        other = copy.deepcopy(weighting)
        other(losses.detach().index_fill(0, where, bad), timesteps, importance)
        _close(_state(other), wanted)
    nothing = torch.full((BATCH,), torch.nan)
    weighting(nothing, timesteps)
    _finite(weighting, "after a batch of NaN")
    _trained(weighting, 7, 2)
    _finite(weighting, "two steps after a batch of NaN")


def _zero(weighting: Weighting, fresh: Weighting) -> None:
    """Samples with a loss of exactly 0, as a mask leaves them: some, a whole bin, a whole batch."""
    fresh = copy.deepcopy(fresh)
    losses, timesteps, importance = _batch(8)
    for mask in (timesteps % 3 > 0, timesteps < NUM_TIMESTEPS // 2, torch.zeros_like(timesteps)):
        weighting.zero_grad()
        _descend(weighting, (losses * mask).detach(), timesteps, importance)
        _finite(weighting, "after losses of 0")
    _descend(fresh, torch.zeros(BATCH), timesteps, torch.zeros(BATCH))
    _finite(fresh, "when the first batch has no importance")
    _trained(weighting, 9, 2)
    _finite(weighting, "two steps after losses of 0")


def _between(weighting: Weighting, fresh: Weighting) -> None:
    """At levels between timesteps a weight is finite, whatever else is in the batch, and the
    nearest timestep learns."""
    losses, timesteps, importance = _batch(10)
    timesteps = timesteps.clamp(max=NUM_TIMESTEPS - 3)
    gaps = weighting.log_snr[timesteps + 1] - weighting.log_snr[timesteps]
    levels = weighting.log_snr[timesteps] + 0.3 * gaps
    alone = copy.deepcopy(weighting).eval()
    nearest = copy.deepcopy(weighting)
    torch.autograd.backward(weighting.at(losses, levels, importance))
    _descend(nearest, losses.detach(), timesteps, importance)
    _close(_state(weighting), _state(nearest))
    gradient = losses.grad
    assert gradient is not None and bool(gradient.isfinite().all()), f"must be finite: {gradient}"
    for i in range(0, BATCH, 6):
        one = losses.detach()[i : i + 1].requires_grad_()
        torch.autograd.backward(alone.at(one, levels[i : i + 1], importance[i : i + 1]))
        _close(one.grad, BATCH * gradient[i : i + 1], msg="a weight must not depend on its batch")


def _device(weighting: Weighting, fresh: Weighting) -> None:
    # A meta tensor has no numbers: reading one, for which a GPU would be waited for, raises.
    weighting.to("meta")(*(column.detach().to("meta") for column in _batch(7)))


# Of a weighting, which is the law's own, and a fresh one of its kind, which must stay as it is.
LAWS: dict[str, Law] = {
    "weights() is a table of mean 1": _table,
    "the gradient of a loss is its weight over the batch size": _gradient,
    "state moves in train() mode alone": _eval_mode,
    "state_dict() is the whole state": _state_dict,
    "the order of samples does not matter": partial(_same, call=_reversed),
    "a sample that comes twice with half the importance counts once": partial(_same, call=_twice),
    "two ranks learn what one learns from the whole batch": _ranks,
    "low precision changes nothing": partial(_same, call=_in_low_precision),
    "a loss that is not finite teaches nothing": _not_finite,
    "losses of 0 do no harm": _zero,
    "levels of timesteps are those timesteps": partial(_same, call=_at_levels),
    "levels between timesteps have weights of their own": _between,
    "nothing waits for the device": _device,
}
# A law without numbers, for which what is trained is no other case than what is not.
NUMBERLESS = "nothing waits for the device"
# Laws that see what a first step does. They are tried untrained with every target, the others with two.
OF_A_FIRST_STEP = (
    "weights() is a table of mean 1",
    "the gradient of a loss is its weight over the batch size",
    NUMBERLESS,
)


# ---------------------------------------------------------------- the report


@dataclass(frozen=True)
class Verdict:
    """How one law fared: the first case in which it broke and why, or reason None."""

    law: str
    reason: str | None = None
    case: str = ""  # the target, and whether the weighting was trained

    @property
    def passed(self) -> bool:
        """Whether the law held in every case."""
        return self.reason is None


@dataclass(frozen=True)
class Report:
    """What check_weighting found, one verdict for each of LAWS; str() is for reading."""

    weighting: str
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether every law held."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def broken(self) -> tuple[Verdict, ...]:
        """The laws that did not hold."""
        return tuple(verdict for verdict in self.verdicts if not verdict.passed)

    def __str__(self) -> str:
        held = len(self.verdicts) - len(self.broken)
        lines = [f"{self.weighting} keeps {held} of {len(self.verdicts)} laws"]
        for verdict in self.verdicts:
            if verdict.passed:
                lines.append(f"  kept    {verdict.law}")
            else:
                lines.append(
                    f"  BROKEN  {self.weighting} with {verdict.case} breaks the law '{verdict.law}': {verdict.reason}"
                )
        return "\n".join(lines)


class _Case:
    """A weighting for one schedule and target, after so many steps; every law gets a copy of it."""

    def __init__(self, fresh: Weighting, steps: int, is_first_or_last: bool = False) -> None:
        self.fresh = fresh
        self.steps = steps
        self.is_first_or_last = is_first_or_last
        self.name = f"{fresh.prediction_type}, {'trained' if steps else 'untrained'},"

    @functools.cached_property
    def trained(self) -> Weighting:
        return _trained(copy.deepcopy(self.fresh), 0, self.steps)

    def is_worth(self, law: str) -> bool:
        """Whether this case could break the law where no other does."""
        if self.steps > 0:
            return law != NUMBERLESS
        return self.is_first_or_last or law in OF_A_FIRST_STEP

    def try_law(self, law: Law) -> None:
        law(copy.deepcopy(self.trained), self.fresh)


def _cases(make: Make) -> list[_Case]:
    """All targets, and a flow that ends at SNR = 0, unless the weighting refuses that; untrained
    and trained."""
    alphas_cumprod = torch.linspace(6, -6, NUM_TIMESTEPS, dtype=torch.float64).sigmoid()
    usual = NoiseSchedule(alphas_cumprod)
    made = [make(usual, kind) for kind in ("epsilon", "sample", "v_prediction")]
    made.append(make(NoiseSchedule(alphas_cumprod, is_flow=True), "flow_prediction"))
    with suppress(ValueError):  # the weighting has no value at SNR = 0
        made.append(make(NoiseSchedule.flow(NUM_TIMESTEPS), "flow_prediction"))
    ends = (made[0], made[-1])
    untrained = [_Case(weighting, 0, weighting in ends) for weighting in made]
    return untrained + [_Case(weighting, 4) for weighting in made]


def _try(law: str, cases: list[_Case]) -> Verdict:
    """The law in every case, up to the first that breaks it."""
    for case in cases:
        if not case.is_worth(law):
            continue
        try:
            case.try_law(LAWS[law])
        except Exception as error:  # of any kind: the code under test is someone else's
            words = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, AssertionError):
                words = f"{type(error).__name__}: {words}"
            return Verdict(law, words[:500], case.name)
    return Verdict(law)


def examine_weighting(weighting: str | Callable[..., Any], **params: Any) -> Report:
    """Run LAWS on a weighting, trained with every target and untrained: a second or two.

    weighting, params: as in make_weighting, which may raise. Broken laws are in the report and
    raise nothing.

    >>> report = examine_weighting("min-snr", gamma=3.0)
    >>> report.passed, len(report.broken)
    (True, 0)
    """

    def make(schedule: NoiseSchedule, kind: str) -> Weighting:
        return make_weighting(weighting, schedule, kind, **params)

    cases = _cases(make)
    name = getattr(weighting, "__name__", str(weighting))
    return Report(name, tuple(_try(law, cases) for law in LAWS))


def check_weighting(weighting: str | Callable[..., Any], **params: Any) -> Report:
    """The report of examine_weighting; raises AssertionError with the whole report if a law is
    broken.

    weighting, params: as in make_weighting, which may raise.
    """
    report = examine_weighting(weighting, **params)
    if not report.passed:
        raise AssertionError(str(report))
    return report
