"""Figures: equal bytes for equal data, texts required and kept, series told apart without colour."""

import hashlib
import json
import types

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt

from dysigma import plots
from dysigma.gradients import NegativeTransfer

TEXTS = {
    "title": "A title",
    "caption": "A conclusion.",
    "alt": "A rising line.",
    "notebook": "03_snr_weightings",
}


@pytest.fixture
def ax():
    with matplotlib.rc_context():
        plots.use_style()
        fig, ax = plt.subplots()
        yield ax
        plt.close(fig)


def test_equal_data_give_equal_bytes_and_the_manifest_says_so(tmp_path):
    plots.use_style()
    for folder in ("a", "b"):
        fig, ax = plt.subplots()
        plots.trajectories(ax, np.arange(9), {"one": np.arange(9.0), "two": np.arange(9.0)[::-1]})
        plots.save_figure(fig, "03_lines", **TEXTS, folder=tmp_path / folder)
        plt.close(fig)
    for kind in ("svg", "png"):
        first, second = (
            (tmp_path / folder / f"03_lines.{kind}").read_bytes() for folder in ("a", "b")
        )
        assert first == second
        manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
        assert manifest["03_lines"]["sha256"][kind] == hashlib.sha256(first).hexdigest()
    assert {key: manifest["03_lines"][key] for key in TEXTS} == TEXTS
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "03_lines.png",
        "03_lines.svg",
        "manifest.json",
    ]


def test_the_files_carry_their_texts(tmp_path, ax):
    from PIL import Image

    path = plots.save_figure(ax.figure, "03_texts", **TEXTS, folder=tmp_path)
    with Image.open(path) as image:
        assert image.info["Title"] == TEXTS["title"]
        assert TEXTS["alt"] in image.info["Description"]
        assert image.info["Source"] == TEXTS["notebook"]
    svg = path.with_suffix(".svg").read_text()
    assert f"<title>{TEXTS['title']}</title>" in svg
    assert TEXTS["caption"] in svg


def test_a_second_figure_joins_the_manifest(tmp_path, ax):
    for name in ("03_second", "03_first"):
        plots.save_figure(ax.figure, name, **TEXTS, folder=tmp_path)
    assert list(json.loads((tmp_path / "manifest.json").read_text())) == ["03_first", "03_second"]


@pytest.mark.parametrize("missing", ["title", "caption", "alt"])
def test_every_text_is_required(tmp_path, ax, missing):
    with pytest.raises(ValueError, match=missing):
        plots.save_figure(ax.figure, "03_x", **{**TEXTS, missing: " "}, folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["lines", "04_lines", "03_Lines", "03_../x"])
def test_a_name_that_does_not_belong_to_its_notebook_is_refused(tmp_path, ax, name):
    with pytest.raises(ValueError, match="NN_words"):
        plots.save_figure(ax.figure, name, **TEXTS, folder=tmp_path)


def test_a_shortened_run_does_not_write_to_the_published_figures(monkeypatch, tmp_path):
    monkeypatch.delenv("DYSIGMA_FIGURES", raising=False)
    monkeypatch.setenv("DYSIGMA_FAST", "1")
    assert plots.figures_folder().name != "figures"
    monkeypatch.delenv("DYSIGMA_FAST")
    (tmp_path / "dysigma").mkdir()
    (tmp_path / "dysigma" / "plots.py").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert plots.figures_folder() == tmp_path / "figures"
    monkeypatch.setenv("DYSIGMA_FIGURES", "elsewhere")
    assert plots.figures_folder().name == "elsewhere"


def test_show_gives_the_reader_alt_text_and_caption(monkeypatch, tmp_path, ax):
    shown = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("IPython.display.display", lambda *things, **kw: shown.append((things, kw)))
    plots.show(ax.figure, "03_shown", **TEXTS)
    assert (tmp_path / "figures" / "03_shown.svg").exists()
    assert shown[0][1]["metadata"] == {"image/png": {"alt": TEXTS["alt"]}}
    assert shown[0][0][0]["text/plain"] == TEXTS["alt"]
    assert TEXTS["caption"] in shown[1][0][0].data
    assert not plt.fignum_exists(ax.figure.number), "left open, the notebook would show it twice"


def test_series_differ_without_colour(ax):
    plots.trajectories(ax, np.arange(20), {str(i): np.arange(20.0) + i for i in range(10)})
    assert len({line.get_marker() for line in ax.lines}) == 10
    assert sum(line.get_linestyle() == "-" for line in ax.lines) == 2, (
        "five dashes, then again from the first"
    )


def test_the_band_is_the_t_interval_of_the_mean(ax):
    plots.trajectories(ax, [0, 1], {"a": [[1.0, 4.0], [3.0, 6.0], [2.0, 8.0]]})
    band = ax.collections[0].get_paths()[0].vertices
    at_zero = band[band[:, 0] == 0][:, 1]
    # By hand: mean 2, standard deviation 1, three seeds, t quantile 4.3027 with 2 degrees of freedom.
    assert (at_zero.min(), at_zero.max()) == pytest.approx(
        (2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4
    )
    assert ax.lines[0].get_ydata() == pytest.approx([2, 6])


def test_interval_by_hand():
    mean, half = plots.t_interval([[1.0, 4.0], [3.0, 4.0], [2.0, 4.0]])
    assert mean == pytest.approx([2, 4]) and half == pytest.approx([4.3027 / 3**0.5, 0], abs=1e-4)
    assert np.isnan(plots.t_interval([7.0])[1]), "one seed has no interval"


def test_lengths_that_disagree_are_named(ax):
    with pytest.raises(ValueError, match=r"'a' has shape \(3,\).*N = 2"):
        plots.trajectories(ax, [0, 1], {"a": [1, 2, 3]})


def test_unknown_cells_are_hatched_not_coloured(ax):
    plots.heatmap(ax, [[1.0, -0.4], [np.nan, 1.0]], labels=["a", "b"])
    cells = ax.collections[0]
    assert np.ma.getmaskarray(cells.get_array()).tolist() == [[False, False], [True, False]]
    assert ax.patch.get_hatch() == "////", "what is left out shows the hatched background"
    assert [text.get_text() for text in ax.texts] == ["1.00", "\N{MINUS SIGN}0.40", "1.00"]
    assert cells.get_clim() == (-1, 1)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize(("size", "numbers"), [(13, True), (2, False)])
def test_large_matrices_carry_no_numbers_and_small_ones_none_on_request(ax, size, numbers):
    plots.heatmap(ax, np.eye(size), colorbar=False, numbers=numbers)
    assert not ax.texts and len(ax.figure.axes) == 1


def test_marks_lie_in_the_cells_that_they_mark(ax):
    plots.heatmap(ax, [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    plots.mark_cells(ax, [[False, True, False], [True, False, False]])
    points = ax.collections[-1].get_offsets().data
    assert np.floor(points).tolist() == [[1, 0], [0, 1]], "(column, row), rows from the top"
    assert ax.get_ylim() == (2, 0)


def test_reports_are_drawn_from_their_own_numbers():
    nan = float("nan")
    cosine = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    unknown = torch.tensor([[1.0, nan], [nan, nan]], dtype=torch.float64)
    report = types.SimpleNamespace(
        cosine=cosine, cosine_debiased=unknown, spans=lambda: ["0-9", "10-19"]
    )
    fig = plots.conflict_matrices(report)
    naive, debiased = fig.axes[:2]
    np.testing.assert_array_equal(naive.collections[0].get_array().data, cosine)
    assert debiased.collections[0].get_array().mask.sum() == 3
    assert [tick.get_text() for tick in naive.get_xticklabels()] == ["0-9", "10-19"]
    plt.close(fig)

    transfer = NegativeTransfer(
        edges=[0, 10, 20],
        losses=torch.tensor([1.0, 2.0]),
        change=torch.tensor([[-0.5, 0.2], [0.1, -0.2]]),
        change_se=torch.tensor([[0.1, 0.2], [0.01, 0.01]]),
    )
    fig = plots.transfer_matrix(transfer)
    cells, dots = fig.axes[0].collections[:2]
    np.testing.assert_allclose(cells.get_array(), [[-50, 10], [10, -10]], rtol=1e-6)
    assert np.floor(dots.get_offsets().data).tolist() == [[0, 0], [0, 1], [1, 1]]
    assert "1 rose" in transfer.sentence() and "0-9 changed 10-19 by +10.0" in transfer.sentence()
    plt.close(fig)


def test_image_grid_puts_each_image_where_it_belongs(ax):
    images = torch.stack([torch.full((1, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    plots.image_grid(ax, images, columns=2, row_labels=["x", "y"])
    sheet = np.asarray(ax.images[0].get_array())[..., 0]
    assert [sheet[0, 0], sheet[0, 3], sheet[3, 0]] == [0, 128, 255]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["x", "y"]
    with pytest.raises(ValueError, match=r"\(3, 5, 2, 2\)"):
        plots.image_grid(ax, np.zeros((3, 5, 2, 2)), columns=2)
