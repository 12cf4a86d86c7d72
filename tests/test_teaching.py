"""Helpers of the notebooks: a check says what is wrong, an untouched stub passes in silence, predictions are kept."""

import re

import pytest
import torch

from dysigma.course import answers
from dysigma.course.lesson import Lesson

WANT = torch.tensor([1.0, 2.0, 4.0])


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(answers, "_exercises", {})
    monkeypatch.setattr(answers, "_predictions", {})
    answers.exercise("3.1", WANT, mistakes={"You took the square.": WANT**2, "Constant.": 7.0})


def said(capsys, *answer):
    answers.check("3.1", *answer)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "answer", [WANT, WANT.numpy(), WANT.tolist(), WANT.double() * (1 + 1e-6), WANT.requires_grad_()]
)
def test_the_right_answer_passes_in_any_container(capsys, answer):
    assert said(capsys, answer) == "Exercise 3.1: correct.\n"


@pytest.mark.parametrize("stub", [..., None])
def test_an_untouched_stub_is_skipped_politely(capsys, stub):
    assert "not attempted yet" in said(capsys, stub)


@pytest.mark.parametrize(
    ("answer", "diagnosis"),
    [
        (WANT**2, "You took the square."),
        (torch.full((3,), 7.0), "Constant."),
        (2.5 * WANT, "2.5 times the right answer everywhere"),
        (-WANT, "-1 times"),
        (WANT[:2], r"shape is (2,); expected (3,)"),
        ([1.0, float("nan"), 4.0], "nan at 1 of 3 places"),
        ([1.0, 2.0, 9.0], "index 2: 9 is too large"),
        ([1.0, 1.9, 4.0], "index 1: 1.9 is too small"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(capsys, answer, diagnosis):
    out = said(capsys, answer)
    assert "not yet" in out and diagnosis in out


def test_words_are_checked_too(capsys):
    answers.exercise("3.2", "epsilon", mistakes={"That net never sees the noise.": "sample"})
    for answer, reply in (
        ("epsilon", "correct"),
        ("sample", "never sees the noise"),
        ("v", "Wrong."),
    ):
        answers.check("3.2", answer)
        assert reply in capsys.readouterr().out


def test_a_misspelled_exercise_shows_the_choices():
    with pytest.raises(KeyError, match=r"3\.9.*3\.1"):
        answers.check("3.9", 1)


@pytest.mark.parametrize(
    ("guess", "measured", "verdict"),
    [
        (0.5, 0.13, "too high by a factor of 3.8"),
        (1, 5, "too low by a factor of 5"),
        (1.0, 1.05, "close"),
        (1, -1, "the other way"),
        (-4, -2, "too low by a factor of 2"),
        (0, 0, "exactly"),
        (0, 0.5, "too low by 0.5"),
        (..., 3, "No guess"),
        (None, -3.0, "No guess"),
        ("yes", "no", "a surprise"),
        ("yes", "yes", "as predicted"),
    ],
)
def test_predictions_are_compared(capsys, guess, measured, verdict):
    answers.predict("How much?", guess)
    asked = capsys.readouterr().out
    assert ("No guess was given" in asked) == (guess in (None, ...))
    answers.reveal("How much?", measured)
    assert verdict in capsys.readouterr().out


def test_a_result_without_a_prediction_is_refused():
    with pytest.raises(KeyError, match="never asked"):
        answers.reveal("never asked", 1.0)


def test_fast_chooses_the_size(monkeypatch):
    lesson = Lesson("03_snr_weightings")
    monkeypatch.delenv("DYSIGMA_FAST", raising=False)
    assert lesson.fast(100, 3) == 100
    monkeypatch.setenv("DYSIGMA_FAST", "1")
    assert lesson.fast(100, 3) == 3


def test_banner_and_watermark_name_the_versions(capsys, monkeypatch):
    monkeypatch.setenv("DYSIGMA_FAST", "1")
    Lesson("03_snr_weightings").end()
    out = capsys.readouterr().out
    assert "03_snr_weightings" in out and "short run" in out
    assert out.count(torch.__version__) == 2


def test_the_banner_names_the_device_that_trains(capsys):
    lesson = Lesson("03_snr_weightings")
    assert "trains no network" in capsys.readouterr().out and lesson.device.type == "cpu"
    Lesson("07_train", "cpu")
    assert "trains on the CPU" in capsys.readouterr().out


def test_a_page_trains_on_a_gpu_where_there_is_one(capsys, monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("dysigma.course.lesson.resolve_device", lambda name: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.delenv("DYSIGMA_FAST", raising=False)
    lesson = Lesson("07_train", "auto")
    assert lesson.device == gpu and "trains on a card" in capsys.readouterr().out
    assert not lesson.as_published


def test_tables_of_one_page_do_not_share_their_marks(monkeypatch):
    import pandas

    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    lesson = Lesson("03_snr_weightings")
    for mark in ("a", None):
        lesson.table(pandas.DataFrame({"x": [1, 2]}, index=["a", "b"]), mark=mark, caption="")
    marked, plain = (styler.to_html() for styler in shown)
    (name,) = set(re.findall(r'<table id="(\w+)"', marked))
    assert "bold" in marked and name not in plain
