"""Figures: intervals against their definitions, fronts by hand, defaults that a reader needs, files that are whole."""

import base64
import itertools
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy import stats

from jaxrl_suite.io import plots


def test_new_figure_defaults():
    figure, axes = plots.new_figure(5, 3, title="t")
    assert isinstance(figure, Figure) and tuple(figure.get_size_inches()) == (5, 3)
    assert figure.get_suptitle() == "t" and type(figure.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"
    assert not axes.spines["top"].get_visible() and not axes.spines["right"].get_visible()
    axes.plot([0, 1], [0, 1], label="a")
    axes.set(xlabel="x", ylabel="y", title="z")
    figure.draw_without_rendering()
    texts = [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.get_xticklabels(), *axes.legend().get_texts()]
    assert min(text.get_fontsize() for text in texts) >= 10
    assert axes.xaxis.get_gridlines()[0].get_visible()
    assert plots.new_figure(nrows=2, ncols=3)[1].shape == (2, 3)
    assert plots.new_figure(ncols=2)[1].shape == (2,)


def test_no_pyplot_state_and_no_change_of_global_settings():
    code = """
import sys
from jaxrl_suite.io import plots
assert "matplotlib" not in sys.modules
import matplotlib
before = dict(matplotlib.rcParams)
figure, axes = plots.new_figure()
plots.line_with_interval(axes, [0, 1], [[0, 1], [1, 2]], "a")
plots.figure_to_data_uri(figure)
assert "matplotlib.pyplot" not in sys.modules
assert dict(matplotlib.rcParams) == before
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def luminance(colour):
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


def test_series_differ_in_colour_marker_and_line_style():
    styles = [plots.series_style(i) for i in range(8)]
    for entry in ("color", "marker", "linestyle"):
        assert len({str(style[entry]) for style in styles}) == 8
    assert len({str(sorted(plots.series_style(i).items(), key=str)) for i in range(16)}) == 16
    assert set(plots.colours()[:7]) == {"#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"}
    for colour in plots.colours():  # visible on white
        assert 1.05 / (luminance(colour) + 0.05) > 1.9, colour


def test_t_interval_is_students():
    values = np.array([[1.0, 2, 3, 6], [0, 0, 0, 0]])
    center, low, high = plots.interval(values, method="t", level=0.9)
    expected = stats.t.interval(0.9, 3, loc=3.0, scale=stats.sem(values[0]))
    np.testing.assert_allclose([center[0], low[0], high[0]], [3.0, *expected], rtol=1e-12)
    assert center[1] == low[1] == high[1] == 0


def test_bootstrap_interval_is_the_percentiles_of_all_resamples():
    """With 4 seeds there are 4^4 equally likely resamples, so that the exact distribution can be listed."""
    values = np.array([[1.0, 2, 4, 8]])
    for statistic, reduce in (("mean", np.mean), ("median", np.median)):
        exact = [reduce(values[0, list(picks)]) for picks in itertools.product(range(4), repeat=4)]
        center, low, high = plots.interval(values, statistic=statistic, level=0.8, num_resamples=20_000)
        assert center[0] == reduce(values[0])
        np.testing.assert_allclose([low[0], high[0]], np.quantile(exact, [0.1, 0.9]), atol=0.15)
    again = plots.interval(values, statistic="median", level=0.8, num_resamples=20_000)
    assert (again[1], again[2]) == (low, high)  # the same figure twice


def test_bootstrap_of_the_mean_covers():
    rng = np.random.default_rng(1)
    _, low, high = plots.interval(rng.normal(size=(400, 20)))
    assert 0.88 < np.mean((low < 0) & (high > 0)) < 0.97


def test_line_with_interval_draws_what_it_returns():
    _, axes = plots.new_figure()
    values = np.stack([np.arange(5.0), np.arange(5.0) + 2, np.arange(5.0) + 4], axis=1)
    drawn = plots.line_with_interval(axes, np.arange(5), values, "a", statistic="median")
    np.testing.assert_array_equal(drawn.line.get_ydata(), np.arange(5) + 2)
    assert drawn.note == "median of 3 seeds, 95% bootstrap interval"
    (band,) = axes.collections
    vertices = band.get_paths()[0].vertices
    assert vertices[:, 1].min() == drawn.low.min() and vertices[:, 1].max() == drawn.high.max()
    single = plots.line_with_interval(axes, np.arange(5), np.arange(5), "b")
    assert single.note == "one seed" and len(axes.collections) == 1
    assert single.line.get_color() == plots.colours()[1] != drawn.line.get_color()
    assert plots.line_with_interval(axes, [0, 1], [[1, 2], [2, 3]], "c", method="t").note == (
        "mean of 2 seeds, 95% Student t interval"
    )


def test_a_diverged_seed_is_not_averaged_away():
    values = np.array([[1.0, 2.0], [np.nan, 2.0]])
    for choice in ({"method": "t"}, {"statistic": "median"}, {}):
        center, low, high = plots.interval(values, **choice)
        assert np.isfinite([center[0], low[0], high[0]]).all() and np.isnan([center[1], low[1], high[1]]).all()


def test_bad_arguments():
    _, axes = plots.new_figure()
    with pytest.raises(ValueError, match=r"values: shape \(3, 2\), must be \[N, num_seeds\] with N = \(2,\)"):
        plots.line_with_interval(axes, [0, 1], np.zeros((3, 2)), "a")
    with pytest.raises(ValueError, match=r'method=\'t\': must be "bootstrap", or "t" for the mean'):
        plots.interval(np.zeros((2, 2)), statistic="median", method="t")
    with pytest.raises(ValueError, match="statistic='mode'"):
        plots.interval(np.zeros((2, 2)), statistic="mode")
    with pytest.raises(ValueError, match=r"level=1\.0"):
        plots.interval(np.zeros((2, 2)), level=1.0)
    with pytest.raises(ValueError, match=r"points: shape \(2, 3\)"):
        plots.pareto_front(axes, np.zeros((2, 3)), label="a")
    with pytest.raises(ValueError, match=r"matrix: shape \(3,\)"):
        plots.heatmap(axes.figure, axes, np.zeros(3), xlabel="", ylabel="", colour_label="")


def test_non_dominated_is_its_definition():
    rng = np.random.default_rng(0)
    for maximise in (True, False):
        points = rng.integers(0, 6, (60, 2)).astype(float)  # with repeats and ties
        sign = 1 if maximise else -1
        beaten = [any((sign * q >= sign * p).all() and (sign * q > sign * p).any() for q in points) for p in points]
        assert plots.non_dominated(points, maximise=maximise).tolist() == [not b for b in beaten]


def area(axes):
    """Area of the shaded region, by the shoelace formula."""
    (band,) = axes.collections
    x, y = band.get_paths()[0].vertices.T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


@pytest.mark.parametrize("maximise", [True, False])
def test_shaded_area_is_the_hypervolume(maximise):
    """Three points: 1 x 3 + 1 x 2 + 2 x 1 = 7; the point that does not beat the reference adds nothing."""
    points = np.array([[1.0, 3], [2, 2], [4, 1], [1, 1], [9, -1]])
    reference = (0.0, 0.0)
    if not maximise:
        points, reference = 10 - points, (10.0, 10.0)
    _, axes = plots.new_figure()
    on_front = plots.pareto_front(axes, points, label="a", maximise=maximise, reference=reference)
    assert on_front.tolist() == [True, True, True, False, True]
    assert area(axes) == pytest.approx(7)


def test_no_point_beats_the_reference():
    _, axes = plots.new_figure()
    plots.pareto_front(axes, [[1.0, 1.0]], label="a", reference=(2, 2))
    assert not axes.collections


def test_heatmap_labels_everything():
    figure, axes = plots.new_figure()
    image = plots.heatmap(
        figure,
        axes,
        [[0, 1], [np.nan, -3]],
        xlabel="expert",
        ylabel="layer",
        colour_label="load (tokens)",
        row_labels=["a", "b"],
        column_labels=["c", "d"],
        diverging_around=0,
        annotate=".0f",
    )
    assert image.get_clim() == (-3, 3)  # symmetric, so that the middle colour is the middle value
    assert [text.get_text() for text in axes.texts] == ["0", "1", "-3"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert figure.axes[1].get_ylabel() == "load (tokens)" and axes.get_xlabel() == "expert"
    constant = plots.heatmap(figure, axes, [[2.0]], xlabel="", ylabel="", colour_label="")
    assert np.isfinite(constant.get_clim()).all()


@pytest.fixture(scope="module")
def figure():
    figure, axes = plots.new_figure(3, 2)
    axes.plot(np.arange(50), np.sin(np.arange(50)))
    return figure


def test_save_figure_writes_whole_files(tmp_path, figure):
    paths = plots.save_figure(figure, tmp_path / "plots" / "loss_v1.5")
    assert [path.name for path in paths] == ["loss_v1.5.svg", "loss_v1.5.png"]
    assert xml.etree.ElementTree.parse(paths[0]).getroot().tag.endswith("svg")
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    first = paths[0].read_bytes()
    assert plots.save_figure(figure, tmp_path / "again", ["svg"])[0].read_bytes() == first


def test_data_uri_is_svg_while_small_and_png_beyond(figure):
    kind, _, content = plots.figure_to_data_uri(figure).partition(",")
    assert kind == "data:image/svg+xml;base64" and b"<svg" in base64.b64decode(content)
    kind, _, content = plots.figure_to_data_uri(figure, max_svg_bytes=1000).partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(content).startswith(b"\x89PNG")


def test_data_uri_from_file_and_its_size(figure, tmp_path):
    for path in plots.save_figure(figure, tmp_path / "picture"):
        address = plots.file_to_data_uri(path)
        width, height = plots.data_uri_size(address)
        assert width / height == pytest.approx(figure.get_size_inches()[0] / figure.get_size_inches()[1], rel=0.02)
    assert plots.file_to_data_uri(tmp_path / "picture.svg", max_svg_bytes=10).startswith("data:image/png")
    for address in ("data:image/png;base64,AAAA", "https://example.org/x.png", "data:image/svg+xml;base64,AAAA"):
        with pytest.raises(ValueError, match="must be a data:image/"):
            plots.data_uri_size(address)


def test_missing_matplotlib_names_the_extra(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'matplotlib.*pip install "jaxrl-suite\[experiments\]"'):
        plots.new_figure()
