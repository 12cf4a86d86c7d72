"""The laws catch what breaks them, and a weighting of one's own works by name without touching the package."""

import re
import sys
from functools import partial

import pytest
import torch
from torch import nn

from dysigma.cli.main import main
from dysigma.runs import load_run
from dysigma.schedule import NoiseSchedule
from dysigma.testing import LAWS, check_weighting, examine_weighting
from dysigma.weightings import DySigma, Weighting, make_weighting

LINEAR = NoiseSchedule.linear(100)

# A user's whole file: the first by formula, the second with a state that follows the losses.
OWN = """
import torch
from dysigma import Weighting

def quarter(log_snr, power=0.25):
    return power * log_snr  # log-weight on the x0 error: SNR^power

class Harder(Weighting):
    def __init__(self, setting, *, bins=20, memory=0.99):
        super().__init__(setting, bins)
        self.memory = memory
        self.register_buffer("sums", torch.ones(2, bins))
    def weights(self):
        return self.scaled((self.sums[1] / self.sums[0])[self.bin_index])
    def update(self, losses, timesteps, importance):
        new = torch.stack([importance, importance * losses])
        self.sums.mul_(self.memory).index_add_(1, self.bin_index[timesteps], new)
"""


class Own(Weighting):
    """Right: running mean losses. Each subclass below breaks one law."""

    def __init__(self, setting):
        super().__init__(setting, bins=4)
        self.register_buffer("sums", torch.ones(2, 4))

    def weights(self):
        return self.scaled((self.sums[1] / self.sums[0])[self.bin_index])

    def update(self, losses, timesteps, importance):
        self.sums.index_add_(
            1, self.bin_index[timesteps], torch.stack([importance, importance * losses])
        )


class Short(Own):
    def weights(self):
        return super().weights()[:-1]


class Double(Own):
    def weights(self):
        return super().weights().double()


class Attached(Own):
    def weights(self):
        return super().weights() * torch.ones(1, requires_grad=True)


class Infinite(Own):
    def weights(self):
        return super().weights() / (torch.arange(self.num_timesteps) > 0)


class Unscaled(Own):
    def weights(self):
        return 2 * super().weights()


class Restless(Own):
    def weights(self):
        self.sums[1] *= 1 + 0.1 * torch.arange(4)
        return super().weights()


class AlwaysLearning(Own):
    def _loss(self, losses, weights, timesteps, importance):
        value = (weights * losses * (1 if importance is None else importance)).mean()
        self.update(losses.detach(), timesteps, torch.ones_like(losses.detach()))
        return value


class Drawing(Own):
    def update(self, losses, timesteps, importance):
        super().update(losses * (1 + 1e-9 * torch.rand(1)), timesteps, importance)


class Forgetful(Own):
    def __init__(self, setting):
        super().__init__(setting)
        self.calls = 0  # should be a buffer

    def update(self, losses, timesteps, importance):
        self.calls += 1
        super().update(losses * self.calls, timesteps, importance)


class LastOneWins(Own):
    def update(self, losses, timesteps, importance):
        self.sums[1, self.bin_index[timesteps[-1]]] = losses[-1]


class Uncounted(Own):
    def update(self, losses, timesteps, importance):
        super().update(losses, timesteps, torch.ones_like(importance))


class UncountedGradient(Own):
    def __init__(self, setting):
        super().__init__(setting)
        self.s = nn.Parameter(torch.zeros(4))

    def update(self, losses, timesteps, importance):
        s = self.s[self.bin_index[timesteps]]
        return (losses * torch.exp(-s) + s).mean()


class Rounded(Own):
    def update(self, losses, timesteps, importance):
        one_hot = nn.functional.one_hot(self.bin_index[timesteps], 4).float()
        self.sums[1] += (importance * losses) @ one_hot  # autocast makes this product bfloat16


class Halved(Own):
    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)


class Shifted(Own):
    def at(self, losses, log_snr, importance=None):
        return super().at(losses, log_snr + 2, importance)


class MyRankAlone(Own):
    def forward(self, losses, timesteps, importance=None):
        value = super().forward(losses, timesteps, importance)
        if self.training:
            self.sums[1, 0] += losses.detach().sum()
        return value


class Poisoned(Own):
    def forward(self, losses, timesteps, importance=None):
        if self.training:
            self.sums[1, 0] += losses.detach().mean()
        return super().forward(losses, timesteps, importance)


class GuardsAgainstNaN(Own):
    """Leaves bad losses out only where their sum is NaN: of infinite ones it is not."""

    def forward(self, losses, timesteps, importance=None):
        if self.training:
            poison = torch.where(losses.sum().isnan(), 0.0, losses.detach().mean())
            self.sums[1, 0] += torch.where(losses.isfinite().all(), 0.0, poison)
        return super().forward(losses, timesteps, importance)


class DoubleAtFirst(Own):
    """Of mean 2 before its first step, for networks that predict the image."""

    def weights(self):
        is_first = self.prediction_type == "sample" and bool((self.sums == 1).all())
        return super().weights() * (2 if is_first else 1)


class WaitsForV(Own):
    def update(self, losses, timesteps, importance):
        factor = (
            float(losses.mean()) / float(losses.mean()) if self.prediction_type[0] == "v" else 1
        )
        super().update(losses * factor, timesteps, importance)


class DividesByTheLoss(Own):
    def weights(self):
        return self.scaled((self.sums[0] / self.sums[1])[self.bin_index])

    def update(self, losses, timesteps, importance):
        self.sums *= 0
        super().update(losses, timesteps, importance)


class Centred(Own):
    def at(self, losses, log_snr, importance=None):
        is_timestep = (log_snr[:, None] == self.log_snr).any(1).all()
        shift = 0 if is_timestep else log_snr.mean() / 10
        return super().at(losses, log_snr + shift, importance)


class Waiting(Own):
    def update(self, losses, timesteps, importance):
        super().update(losses / float((importance * losses).mean()), timesteps, importance)


BROKEN = {
    Short: "weights\\(\\) is a table of mean 1': must be 40",
    Double: "weights\\(\\) is a table of mean 1': must be 40 float32",
    Attached: "weights\\(\\) is a table of mean 1': must be finite and detached",
    Infinite: "weights\\(\\) is a table of mean 1': must be finite",
    Unscaled: "weights\\(\\) is a table of mean 1': must have mean 1",
    Restless: "the gradient of a loss is its weight",
    AlwaysLearning: "state moves in train\\(\\) mode alone",
    Drawing: "state moves in train\\(\\) mode alone': the global random state",
    Forgetful: "state_dict\\(\\) is the whole state",
    LastOneWins: "the order of samples does not matter",
    Uncounted: "a sample that comes twice",
    UncountedGradient: "a sample that comes twice",
    Rounded: "low precision changes nothing",
    Halved: "low precision changes nothing",
    Shifted: "levels of timesteps are those timesteps",
    MyRankAlone: "two ranks learn what one learns",
    Poisoned: "a loss that is not finite teaches nothing",
    GuardsAgainstNaN: "a loss that is not finite teaches nothing",
    DoubleAtFirst: "weights\\(\\) is a table of mean 1': must have mean 1",
    WaitsForV: "nothing waits for the device",
    DividesByTheLoss: "losses of 0 do no harm': .*must be finite",
    Centred: "levels between timesteps have weights of their own",
    Waiting: "nothing waits for the device",
}


def test_the_right_one_passes():
    report = check_weighting(Own)
    assert report.passed and not report.broken and len(report.verdicts) == len(LAWS)
    assert str(report).count("kept") == len(LAWS)


def test_the_report_lists_every_law_and_why_it_broke():
    report = examine_weighting(Unscaled)
    assert not report.passed and len(report.verdicts) == len(LAWS)
    assert [verdict.law for verdict in report.broken] == ["weights() is a table of mean 1"]
    assert "mean 1" in report.broken[0].reason and "epsilon, untrained" in report.broken[0].case
    with pytest.raises(AssertionError) as raised:
        check_weighting(Unscaled)
    # Not the whole text: where pytest rewrites the package's asserts, they print addresses.
    for words in (*LAWS, str(report).splitlines()[0], "mean 1 when normalize"):
        assert words in str(report) and words in str(raised.value)


def test_a_formula_that_needs_a_signal_is_checked_where_it_has_one():
    def spacing(log_snr):  # infinite next to SNR = 0
        return torch.gradient(log_snr)[0].abs().log()

    with pytest.raises(ValueError, match="below inf"):
        make_weighting(spacing, NoiseSchedule.flow(40), "flow_prediction")
    check_weighting(spacing)


def test_every_law_has_a_weighting_that_breaks_it():
    broken = [pattern.split("'")[0] for pattern in BROKEN.values()]
    assert all(any(re.match(pattern, law) for pattern in broken) for law in LAWS)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda case: case.__name__)
def test_each_law_catches_what_breaks_it(broken):
    with pytest.raises(
        AssertionError, match=rf"{broken.__name__}.*breaks the law '{BROKEN[broken]}"
    ):
        check_weighting(broken)


# ---------------------------------------------------------------- your own, by name


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_weightings.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_weightings"
    sys.modules.pop("my_weightings", None)


@pytest.mark.slow
def test_own_weightings_are_short_and_keep_the_laws(own_module):
    formula, learnable = OWN.strip().split("\n\n")[1:]
    assert (
        len(formula.splitlines()) + 2 <= 15 and len(learnable.splitlines()) + 2 <= 15
    )  # with the imports
    check_weighting(f"{own_module}:quarter")
    check_weighting(f"{own_module}:quarter", power=0.5)
    check_weighting(f"{own_module}:Harder", bins=8)
    check_weighting("dy-sigma", prior=f"{own_module}:quarter")


def test_an_own_formula_is_a_log_weight_on_the_x0_error(own_module):
    snr = LINEAR.log_snr.exp()
    for kind, ratio in {"sample": 1.0, "epsilon": snr, "v_prediction": 1 + snr}.items():
        weights = make_weighting(
            f"{own_module}:quarter", LINEAR, kind, normalize=False, power=0.75
        ).weights()
        torch.testing.assert_close(weights.double(), snr**0.75 / ratio, rtol=1e-5, atol=0)
    by_object = make_weighting(sys.modules[own_module].quarter, LINEAR, power=0.5).weights()
    torch.testing.assert_close(by_object, make_weighting("debiased", LINEAR).weights())
    prior = make_weighting(
        "dy-sigma", LINEAR, prior=f"{own_module}:quarter", prior_params={"power": 0.5}
    )
    torch.testing.assert_close(prior.weights(), by_object)


@pytest.mark.slow
def test_dysigma_train_takes_it_by_name_and_resumes(own_module, tmp_path, capsys):
    options = [
        "--model",
        "micro",
        "--train-images",
        "64",
        "--image-size",
        "8",
        "--batch-size",
        "16",
        "--quiet",
    ]
    options += ["--validation-images", "4", "--validation-timesteps", "5", "--device", "cpu"]
    out, weighting = tmp_path / "run", ["--weighting", f"{own_module}:Harder"]
    options += [
        *weighting,
        "--weighting-params",
        "bins=5",
        "memory=0.9",
        "--num-timesteps",
        "50",
        "--images",
        "64",
    ]
    assert main(["train", *options, "--out", str(out)]) == 0, capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(out), "--quiet"]) == 0
    assert load_run(out).config["weighting"] == f"{own_module}:Harder"
    bins = load_run(out).metrics.bin_weights.dropna().iloc[-1]
    assert max(bins) > 1.01 * min(bins)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no_such_module:thing", ImportError, "weighting 'no_such_module:thing'.*working folder"),
        ("my_weightings:thing", KeyError, "my_weightings has no function or class thing"),
        ("my_weightings:torch", KeyError, "has no function or class torch"),
        ("my_weightings.quarter", KeyError, "'module:function'"),
        ("my_weightings:quarter()", KeyError, "unknown weighting"),
        ("my_weightings:a:b", KeyError, "unknown weighting"),
        ("../my_weightings:quarter", KeyError, "unknown weighting"),
        ("", KeyError, "unknown weighting"),
    ],
)
def test_only_module_and_function_are_looked_up(own_module, name, error, message):
    with pytest.raises(error, match=message):
        make_weighting(name, LINEAR)
    assert (own_module in sys.modules) == name.startswith("my_weightings:t")  # nothing else was run


def test_bad_parameters_and_formulas_are_refused(own_module):
    with pytest.raises(ValueError, match=r"quarter.*'gamma'.*'power'"):
        make_weighting(f"{own_module}:quarter", LINEAR, gamma=2.0)
    with pytest.raises(ValueError, match="Harder has no parameter"):
        make_weighting(f"{own_module}:Harder", LINEAR, gamma=2.0)
    for formula in (lambda log_snr: 1.0, lambda log_snr: log_snr[:3], lambda log_snr: log_snr / 0):
        with pytest.raises(ValueError, match=r"log-weight below inf.*100"):
            make_weighting(formula, LINEAR)


@pytest.mark.slow
def test_a_partial_of_a_weighting_is_a_weighting():
    check_weighting(partial(DySigma, variant="inside", bins=10))
