"""The audit: the census of trainers, laws of the comparison, the density as a weight, bad input, the two commands."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

import dysigma
from dysigma import NoiseSchedule, Weighting, make_sampler, make_weighting
from dysigma.auditing import mistakes, preview, tables
from dysigma.cli import main
from dysigma.schedule import PREDICTION_TYPES
from dysigma.weightings import PREDEFINED, WEIGHTINGS, log_weight

SCHEDULE = NoiseSchedule.scaled_linear()
SHORT = NoiseSchedule.scaled_linear(100)


# What trainers weigh v-prediction with, on the schedule of Stable Diffusion: weight, claim, share off, total variation,
# the plain ratio to the claim at t = 999, and a word of the diagnosis.
CENSUS = {
    "1 added to min-snr": (lambda s: s.clamp(max=5) / s + 1, "min-snr", 0.95, 0.389, 429, "1 is"),
    "snr + 1 in min-snr": (
        lambda s: (s + 1).clamp(max=5) / (s + 1), "min-snr", 0.96, 0.409, 215, "SNR + 1"
    ),
    "min-snr of epsilon": (lambda s: s.clamp(max=5) / s, "min-snr", 0.96, 0.403, 215, "epsilon"),
    "snr + 1 in p2": (lambda s: 1 / (2 + s), "p2", 0.95, 0.398, 108, "SNR + 1"),
    "snr + 1 in debiased": (lambda s: (1 + s) ** -0.5, "debiased", 0.92, 0.274, 15, "SNR + 1"),
    "const-x0 for debiased": (lambda s: 1 / (1 + s), "debiased", 0.94, 0.362, 15, "const-x0"),
}  # fmt: skip


@pytest.mark.parametrize("row", CENSUS)
def test_the_census_of_trainers_comes_out_again(row):
    function, claims, off, variation, ratio, word = CENSUS[row]
    found = dysigma.audit(function, SCHEDULE, "v_prediction", claims=claims)
    assert not found.agrees
    assert found.off == pytest.approx(off, abs=0.01)
    assert found.total_variation == pytest.approx(variation, abs=0.02)
    # The census has the plain ratio, with the factor between the two formulas in it.
    assert found.ratio_at_noisiest * found.factor == pytest.approx(ratio, rel=0.03)
    assert word in found.diagnosis


RIGHT = {
    "the lesser of snr and gamma": lambda s: torch.minimum(s, torch.full_like(s, 5)) / (s + 1),
    "stacked": lambda s: torch.stack([s, 5 * torch.ones_like(s)], 1).min(1).values / (1 + s),
    "in two steps": lambda s: (s.clamp(max=5) / s) * (s / (s + 1)),
    "single precision": lambda s: s.float().clamp(max=5) / (s.float() + 1),
}


@pytest.mark.parametrize("label", RIGHT)
def test_four_right_implementations_raise_no_alarm(label):
    found = dysigma.audit(RIGHT[label], SCHEDULE, "v_prediction", claims="min-snr")
    assert found.agrees and found.off == 0 and found.total_variation < 1e-6
    assert found.nearest["name"] == "min-snr" and found.nearest["target"] == "v_prediction"


def test_what_diffusers_computes_for_epsilon_is_min_snr():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)

    def weight(timesteps):
        snr = compute_snr(scheduler, timesteps)
        return torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr

    schedule = NoiseSchedule.from_diffusers(scheduler)
    found = dysigma.audit(weight, schedule, "epsilon", "min-snr", {"gamma": 5}, as_="timesteps")
    assert found.agrees and found.nearest_off == 0


# Split has two numbers that many other weights can be taken for; the rest is recognised as what it is.
@pytest.mark.parametrize("name", sorted(set(PREDEFINED) - {"split"}))
@pytest.mark.parametrize(
    ("schedule", "target"),
    [
        (SHORT, "v_prediction"),
        (NoiseSchedule.flow(100), "flow_prediction"),
        (NoiseSchedule.flow(100, shift=3.0), "v_prediction"),
    ],
    ids=["vp", "flow", "v on a flow"],
)
def test_every_named_weighting_agrees_with_itself_and_is_recognised(name, schedule, target):
    weights = log_weight(name, schedule, target).exp()

    found = dysigma.audit(lambda t: 3 * weights[t], schedule, target, claims=name, as_="timesteps")
    assert found.agrees and found.total_variation < 1e-12 and found.nearest_off == 0
    unnamed = dysigma.audit(lambda t: weights[t], schedule, target, as_="timesteps")
    assert unnamed.agrees and unnamed.nearest_off == 0


def test_v_on_a_flow_has_a_division_of_its_own():
    # v = alpha noise - sigma x0 with alpha + sigma = 1: its error is (1 + S)^2 / (1 + sqrt(S))^2 that of x0.
    schedule = NoiseSchedule.flow(100)
    claim = {"target": "v_prediction", "claims": "min-snr"}
    division = eval(f"lambda snr: {mistakes.FLOW_V_CODE}", {"sqrt": torch.sqrt})
    right = dysigma.audit(lambda s: s.clamp(max=5) / division(s), schedule, **claim)
    assert right.agrees and mistakes.FLOW_V_CODE in right.right_formula
    copied = dysigma.audit(lambda s: s.clamp(max=5) / (s + 1), schedule, **claim)
    assert not copied.agrees and "variance-preserving" in copied.diagnosis
    plain = dysigma.audit(torch.ones_like, schedule, "v_prediction", "const-v")
    assert not plain.agrees


def test_the_numbers_are_those_of_a_calculation_by_hand():
    schedule = NoiseSchedule(torch.tensor([0.9, 0.8, 0.5, 0.2]))
    weights = torch.tensor([1.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    found = dysigma.audit(
        lambda t: weights[t], schedule, "sample", claims="const-x0", as_="timesteps"
    )
    assert found.off == 0.25 and found.ratio_at_noisiest == pytest.approx(3)
    # Shares 1/6, 1/6, 1/6, 1/2 against four quarters.
    assert found.total_variation == pytest.approx(0.25)
    assert found.effective_sample_size == pytest.approx(36 / (4 * 12))


def test_noise_networks_on_a_flow_are_audited_without_the_level_of_pure_noise():
    # s = 1/4, 1/2, 3/4 and 1: SNR 9, 1, 1/9 and 0, where min(S, 5) / S is 0 / 0.
    flow = NoiseSchedule.flow(4)
    by_hand = torch.tensor([5 / 9, 1, 1], dtype=torch.float64)
    for function in (lambda snr: snr.clamp(max=5) / snr, "min-snr"):
        found = dysigma.audit(function, flow, "epsilon", claims="min-snr")
        assert found.agrees and found.nearest["name"] == "min-snr"
        torch.testing.assert_close(found.weights, by_hand / by_hand.mean())
        torch.testing.assert_close(found.reference, by_hand / by_hand.mean())
        assert len(found.log_snr) == 3
    plain = dysigma.audit(torch.ones_like, flow, "epsilon", claims="min-snr")
    assert not plain.agrees and plain.nearest["name"] == "const-eps"
    assert plain.off == pytest.approx(1 / 3)


def test_a_flow_that_ends_before_pure_noise_is_audited_to_its_last_level():
    flow = NoiseSchedule(torch.linspace(6, -6, 40, dtype=torch.float64).sigmoid(), is_flow=True)
    last = flow.log_snr[-1].exp() * 1.001

    def wrong_at_the_end(snr):
        return snr.clamp(max=5) / snr * torch.where(snr <= last, 100.0, 1.0)

    found = dysigma.audit(wrong_at_the_end, flow, "epsilon", claims="min-snr")
    assert not found.agrees and found.off == pytest.approx(1 / 40)
    assert found.ratio_at_noisiest == pytest.approx(100)
    with pytest.raises(ValueError, match="3 or more"):
        dysigma.audit("min-snr", NoiseSchedule.flow(2), "epsilon")


def test_noise_networks_on_a_flow_are_audited_with_a_density():
    flow = NoiseSchedule.flow(100)
    sampler = make_sampler("logit-normal", flow)
    found = dysigma.audit(torch.ones_like, flow, "epsilon", claims="const-eps", sampler=sampler)
    wanted = sampler.probabilities()[:-1]
    torch.testing.assert_close(found.weights, wanted / wanted.mean())


def test_a_weight_where_the_claim_has_none_is_seen():
    schedule = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
    found = dysigma.audit(
        lambda s: torch.where(s == 0, 1.0, s.clamp(max=5)), schedule, "sample", claims="min-snr"
    )
    assert found.off == 1 / 1000 and math.isinf(found.ratio_at_noisiest)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["ratio_at_noisiest"] is None


@pytest.mark.parametrize(
    ("function", "at_zero", "at_infinity"),
    [
        (lambda s: s.clamp(max=5) / (s + 1), "SNR^1", "SNR^-1"),
        (lambda s: 1 + 0 * s, "constant", "constant"),
        (lambda s: s.rsqrt(), "grows like SNR^-0.5", "goes to 0 like SNR^-0.5"),
    ],
)
def test_the_limits_are_those_of_the_formula(function, at_zero, at_infinity):
    found = dysigma.audit(function, SHORT, "v_prediction", claims="min-snr")
    assert at_zero in found.at_zero_snr and at_infinity in found.at_infinite_snr


@pytest.mark.parametrize("as_", ["snr", "log_snr", "sigma", "timesteps"])
@pytest.mark.parametrize("schedule", [SHORT, NoiseSchedule.flow(100)], ids=["vp", "flow"])
def test_the_unit_of_the_level_changes_nothing(as_, schedule):
    to_snr = {
        "snr": lambda snr: snr,
        "log_snr": torch.exp,
        "sigma": lambda s: ((1 - s) / s) ** 2 if schedule.is_flow else s**-2.0,
        "timesteps": lambda t: schedule.log_snr[t].exp(),
    }[as_]
    found = dysigma.audit(
        lambda level: to_snr(level).clamp(max=5), schedule, "sample", "min-snr", as_=as_
    )
    assert found.agrees


@pytest.mark.parametrize("name", mistakes.X0_CODE)
@pytest.mark.parametrize("target", PREDICTION_TYPES)
def test_the_formula_as_code_gives_the_weight(name, target):
    schedule = NoiseSchedule.flow(50) if target == "flow_prediction" else SHORT
    snr = schedule.log_snr.exp()[:49]
    code = mistakes.code_of(name, target, {})
    known = {"sqrt": math.sqrt, "log": math.log, "sigmoid": lambda x: 1 / (1 + math.exp(-x))}
    values = [eval(code, {**known, "snr": float(level)}) for level in snr]
    log_values = torch.tensor(values, dtype=torch.float64).log()
    table = tables.log_x0_weight(name, schedule, {})[:49]
    expected = table - tables.log_error_ratio(
        schedule.log_snr[:49], target, target, schedule.is_flow
    )
    assert float(tables.log_ratio(log_values, expected).abs().max()) < 1e-9


def test_only_formulas_are_written_as_code():
    assert set(mistakes.X0_CODE) <= set(PREDEFINED)


def test_a_new_weighting_is_found_with_no_edit(monkeypatch):
    class CubeRoot(Weighting):
        learns = False

        def weights(self):
            return self.from_log(self.log_snr / 3 + self.log_conversion).float()

    monkeypatch.setitem(WEIGHTINGS, "cube-root", CubeRoot)
    found = dysigma.audit(lambda s: s ** (1 / 3) / (s + 1), SHORT, "v_prediction")
    assert found.nearest == {"name": "cube-root", "target": "v_prediction", "params": {}}
    assert found.agrees and "cube-root" in found.right_formula


@pytest.mark.parametrize(
    ("name", "params"), [("logit-normal", {}), ("logit-normal", {"mean": 0.5, "std": 0.7})]
)
def test_a_density_is_a_weight(name, params):
    schedule = NoiseSchedule.flow(400)
    sampler = make_sampler(name, schedule, **params)
    mean, std = params.get("mean", 0.0), params.get("std", 1.0)

    def density(t):
        s = (t.double() + 0.5) / 400
        return torch.exp(-((s.logit() - mean) ** 2) / (2 * std**2)) / (s * (1 - s))

    of_density = dysigma.audit("const-flow", schedule, "flow_prediction", sampler=sampler)
    of_weight = dysigma.audit(density, schedule, "flow_prediction", as_="timesteps")
    # The mass of a timestep is not quite the density in its middle.
    assert tables.total_variation(of_density.weights.log(), of_weight.weights.log()) < 1e-3


def test_a_sampler_that_is_corrected_changes_no_objective():
    sampler = make_sampler("loss-second-moment", SHORT)
    found = dysigma.audit("min-snr", SHORT, "epsilon", claims="min-snr", sampler=sampler)
    assert sampler.corrected and found.agrees


def test_a_preview_multiplies_density_and_weight():
    weighting = make_weighting("min-snr", SHORT, "v_prediction", gamma=3)
    sampler = make_sampler("logit-normal", SHORT)
    shown = preview(weighting, sampler, SHORT)
    product = sampler.probabilities() * weighting.weights().double()
    torch.testing.assert_close(shown.objective, 100 * product / product.sum())
    low, high = shown.middle_half()
    assert float(shown.objective[low : high + 1].mean()) * (high + 1 - low) == pytest.approx(
        50, abs=4
    )
    assert len(shown.table(10).splitlines()) == 11


BAD = {
    "another shape": (lambda s: torch.ones(3), "shape|one weight"),
    "no tensor": (lambda s: "weights", "tensor"),
    "complex": (lambda s: s * 1j, "complex"),
    "nan": (lambda s: s * math.nan, "finite"),
    "infinite": (lambda s: torch.where(s > 100, math.inf, s), "finite"),
    "negative": (lambda s: 1 - s, "negative"),
    "nothing": (lambda s: 0 * s, "0 for every"),
    "over the batch": (lambda s: s / s.mean(), "own level"),
    "by place": (lambda s: torch.arange(1.0, 1 + len(s)), "own level"),
    "by chance": (lambda s: torch.rand(len(s)), "a second time"),
    "raises": (lambda s: s[5000], "IndexError"),
}


@pytest.mark.parametrize("label", BAD)
def test_a_function_that_gives_no_weights_is_refused_in_one_line(label):
    function, words = BAD[label]
    with pytest.raises(ValueError, match=words) as error:
        dysigma.audit(function, SHORT, "v_prediction", claims="min-snr")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"target": "noise"}, ValueError, "prediction type"),
        ({"target": "flow_prediction"}, ValueError, "variance-preserving"),
        ({"claims": "minsnr"}, KeyError, "min-snr"),
        ({"params": {"gama": 3}}, ValueError, "gama"),
        ({"params": {"gamma": -3}}, ValueError, "gamma"),
        ({"params": {"gamma": "five"}}, ValueError, "gamma = 'five'"),
        ({"schedule": "scaled_linear"}, TypeError, "make_schedule"),
        ({"schedule": DDPMScheduler()}, TypeError, "from_diffusers"),
        ({"claims": None, "params": {"gamma": 3}}, ValueError, "without a claim"),
        ({"as_": "lambda"}, ValueError, "unit"),
    ],
)
def test_bad_arguments_are_refused(changes, error, words):
    good = {"schedule": SHORT, "target": "v_prediction", "claims": "min-snr"}
    with pytest.raises(error, match=words):
        dysigma.audit(lambda s: s.clamp(max=5) / (s + 1), **{**good, **changes})


def test_numpy_and_torch_numbers_are_numbers():
    claim = {"claims": "min-snr", "params": {"gamma": torch.tensor(5)}}
    assert dysigma.audit(lambda s: s.numpy().clip(max=5), SHORT, "sample", **claim).agrees


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A working folder with a module of weight functions."""
    functions = (
        "def right(snr): return snr.clamp(max=5) / (snr + 1)\n"
        "def wrong(snr): return snr.clamp(max=5) / snr\n"
        "def bad(snr): return -snr\n"
    )
    name = f"trainer_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(functions)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return SimpleNamespace(name=name, path=tmp_path)


@pytest.mark.parametrize(("function", "code"), [("right", 0), ("wrong", 1), ("bad", 2)])
def test_the_command_answers_by_its_exit_code(trainer, function, code, capsys):
    words = ["audit", f"{trainer.name}:{function}", "--target", "v_prediction"]
    assert main([*words, "--claims", "min-snr", "--params", "gamma=5"]) == code
    printed = capsys.readouterr()
    if code == 2:
        assert printed.err.count("\n") == 1 and not printed.out
    else:
        assert "right formula" in printed.out


def test_the_command_prints_json_and_draws(trainer, capsys):
    words = ["audit", f"{trainer.name}:wrong", "--target", "v_prediction", "--claims", "min-snr"]
    assert main([*words, "--json", "--figure", "figures/wrong.png"]) == 1
    answer = json.loads(capsys.readouterr().out)
    keys = {"agrees", "off", "total_variation", "ratio_at_noisiest", "nearest", "diagnosis"}
    assert keys <= set(answer)
    assert answer["nearest"] == {"name": "min-snr", "target": "epsilon", "params": {"gamma": 5.0}}
    assert (trainer.path / "figures" / "wrong.png").stat().st_size > 5000


@pytest.mark.parametrize("place", ["a.doc", "trainer", "a.png/b.png", "loop/b.png", "gone/b.png"])
@pytest.mark.parametrize("command", ["audit", "show"])
def test_a_figure_that_cannot_be_written_is_told_before_anything_else(
    trainer, place, command, capsys
):
    (trainer.path / "trainer").mkdir()
    (trainer.path / "a.png").write_text("")
    (trainer.path / "loop").symlink_to("loop")
    (trainer.path / "gone").symlink_to("nowhere")
    words = {"audit": ["audit", "min-snr", "--target", "v", "--figure"], "show": ["show", "--out"]}
    assert main([*words[command], place]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1 and place.split("/")[0] in printed.err


@pytest.mark.parametrize("sampler", ["weight", "sqrt-weight"])
@pytest.mark.parametrize("function", ["right", "min-snr"])
def test_the_command_takes_samplers_that_draw_by_the_weight(trainer, sampler, function):
    name = function if function == "min-snr" else f"{trainer.name}:{function}"
    words = ["audit", name, "--target", "v_prediction", "--claims", "min-snr"]
    assert main([*words, "--params", "gamma=5", "--timestep-sampler", sampler]) == 0


@pytest.mark.parametrize("place", ["", "scheduler_config.json"])
def test_the_command_reads_a_scheduler_of_diffusers(trainer, place):
    DDPMScheduler(num_train_timesteps=100).save_pretrained(trainer.path / "scheduler")
    words = ["audit", f"{trainer.name}:right", "--target", "v_prediction", "--claims", "min-snr"]
    path = trainer.path / "scheduler" / place
    assert main([*words, "--scheduler", str(path)]) == 0
    assert main([*words, "--scheduler", str(trainer.path)]) == 0


@pytest.mark.parametrize(
    "content", ["", "no json", "[]", "{}", '{"_class_name": "UNet2DModel2"}', '{"_class_name": 3}']
)
def test_what_is_no_scheduler_is_refused(trainer, content, capsys):
    file = trainer.path / "scheduler.json"
    if content:
        file.write_text(content)
    assert main(["show", "--scheduler", str(file)]) == 2
    assert "scheduler" in capsys.readouterr().err


def test_show_previews_a_flow_scheduler(trainer, capsys):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(trainer.path / "scheduler")
    words = ["show", "--weighting", "const-flow", "--prediction", "flow_prediction"]
    more = ["--timestep-sampler", "logit-normal", "--scheduler", "scheduler", "--out", "shown.png"]
    assert main([*words, *more]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split()[0] == "timestep" and rows[10].split()[0] == "999"
    assert (trainer.path / "shown.png").stat().st_size > 5000


def test_show_says_that_a_learned_weighting_is_shown_as_it_starts(capsys):
    assert main(["show", "--weighting", "dy-sigma", "--schedule-params", "num_timesteps=50"]) == 0
    assert "learns" in capsys.readouterr().out
