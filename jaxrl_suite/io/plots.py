"""Figures: clean defaults, colour-blind-safe, no pyplot state.

Colours are those of Okabe and Ito (2008); every series also has a marker and a line style of its own, so that a
figure survives a black-and-white printer.
"""

import base64
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from jaxrl_suite.extras import require
from jaxrl_suite.io import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A900")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINE_STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))

STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "figure.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#444444",
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "svg.hashsalt": "jaxrl-suite",
}


def colours() -> tuple[str, ...]:
    """Eight colour-blind-safe colours: Okabe and Ito's, the yellow darkened so that it shows on white.

    >>> len(colours())
    8
    """
    return _OKABE_ITO


def series_style(index: int) -> dict[str, Any]:
    """Colour, marker and line style of series ``index``, ready for ``axes.plot(x, y, **series_style(0))``."""
    n = len(_OKABE_ITO)
    # After eight series colours come back with other line styles.
    return {
        "color": _OKABE_ITO[index % n],
        "marker": MARKERS[(index + index // n) % n],
        "linestyle": LINE_STYLES[(index + index // n) % n],
    }


def new_figure(
    width: float = 6.4, height: float = 4.0, *, nrows: int = 1, ncols: int = 1, title: str | None = None
) -> tuple["Figure", Any]:
    """A figure outside pyplot's state, in the style of this package.

    Args:
        width: inches.
        height: inches.
        nrows: rows of axes.
        ncols: columns of axes.
        title: above the whole figure.

    Returns:
        The figure and its axes: one Axes, or an array of them, one-dimensional for a single row or column.
    """
    matplotlib = require("matplotlib", "experiments")
    figure_module = require("matplotlib.figure", "experiments")
    cycler = require("cycler", "experiments").cycler
    cycle = cycler(color=_OKABE_ITO) + cycler(linestyle=LINE_STYLES)
    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": cycle}):
        figure = figure_module.Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(nrows, ncols)
        if title:
            figure.suptitle(title)
    return figure, axes


class LineInterval(NamedTuple):
    """What :func:`line_with_interval` drew.

    Attributes:
        line: the matplotlib line.
        center: [N], the statistic across seeds.
        low: [N], lower end of the interval.
        high: [N], upper end of the interval.
        note: says which statistic and interval this is, for a legend title or caption.
    """

    line: Any
    center: np.ndarray
    low: np.ndarray
    high: np.ndarray
    note: str


def interval(
    values: np.ndarray,
    *,
    statistic: Literal["mean", "median"] = "mean",
    method: Literal["bootstrap", "t"] = "bootstrap",
    level: float = 0.95,
    num_resamples: int = 1000,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic across seeds with a confidence interval.

    Args:
        values: [N, num_seeds].
        statistic: mean or median across seeds.
        method: "bootstrap", the percentile bootstrap over seeds (the same resamples at every point, drawn with a
            fixed seed); or "t", Student's interval, for the mean only.
        level: coverage, between 0 and 1.
        num_resamples: bootstrap resamples.

    Returns:
        Centre, low and high, each [N]. With a single seed all three are its values. Where a seed is not a number the
        three are not either: a run that diverged is not averaged away.

    Raises:
        ValueError: an unknown choice, or a t interval around a median.
    """
    if statistic not in ("mean", "median"):
        raise ValueError(f'statistic={statistic!r}: must be "mean" or "median".')
    if method not in ("bootstrap", "t") or (method == "t" and statistic != "mean"):
        raise ValueError(f'method={method!r}: must be "bootstrap", or "t" for the mean. Choose method="bootstrap".')
    if not 0 < level < 1:
        raise ValueError(f"level={level!r}: must lie between 0 and 1.")
    reduce = np.mean if statistic == "mean" else np.median
    values = np.asarray(values, np.float64)
    num_seeds = values.shape[1]
    center = reduce(values, axis=1)
    if num_seeds == 1:
        return center, center.copy(), center.copy()
    if method == "t":
        from scipy import stats  # comes with jaxlib

        half = stats.t.ppf((1 + level) / 2, num_seeds - 1) * values.std(axis=1, ddof=1) / np.sqrt(num_seeds)
        return center, center - half, center + half
    picks = np.random.default_rng(0).integers(num_seeds, size=(num_resamples, num_seeds))
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.empty_like(center), np.empty_like(center)
    for i, row in enumerate(values):  # a row at a time: [N, resamples, seeds] may be large
        low[i], high[i] = np.quantile(reduce(row[picks], axis=1), tails)
    return center, low, high


def line_with_interval(
    axes: "Axes",
    x: Any,
    values: Any,
    label: str,
    *,
    statistic: Literal["mean", "median"] = "mean",
    method: Literal["bootstrap", "t"] = "bootstrap",
    level: float = 0.95,
    index: int | None = None,
) -> LineInterval:
    """Draws the mean or median across seeds with its confidence interval (95 % bootstrap by default) as a band.

    Args:
        axes: where.
        x: [N].
        values: [N, num_seeds], or [N] for a single seed, which gets no band.
        label: for the legend.
        statistic: see :func:`interval`.
        method: see :func:`interval`.
        level: coverage of the interval.
        index: which style; by default the number of series that these axes already show.

    Returns:
        The line, the numbers and a note such as "mean of 5 seeds, 95 % bootstrap interval".

    Raises:
        ValueError: shapes do not agree, or an unknown choice.
    """
    x, values = np.asarray(x), np.asarray(values, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if x.ndim != 1 or values.ndim != 2 or len(x) != len(values):
        raise ValueError(f"values: shape {values.shape}, must be [N, num_seeds] with N = {x.shape}, the length of x.")
    center, low, high = interval(values, statistic=statistic, method=method, level=level)
    style = series_style(len(_series(axes)) if index is None else index)
    every = max(1, len(x) // 8)  # few markers, or a dense curve drowns in them
    (line,) = axes.plot(x, center, label=label, markevery=every, **style)
    line.set_gid("series")
    num_seeds = values.shape[1]
    if num_seeds > 1:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    name = "Student t" if method == "t" else "bootstrap"
    note = f"{statistic} of {num_seeds} seeds, {level:.0%} {name} interval" if num_seeds > 1 else "one seed"
    return LineInterval(line, center, low, high, note)


def _series(axes: "Axes") -> list[Any]:
    return [line for line in axes.get_lines() if line.get_gid() == "series"]


def heatmap(
    figure: "Figure",
    axes: "Axes",
    matrix: Any,
    *,
    xlabel: str,
    ylabel: str,
    colour_label: str,
    title: str | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    diverging_around: float | None = None,
    limits: tuple[float, float] | None = None,
    annotate: str | None = None,
) -> Any:
    """A matrix as colours with a labelled colour bar; not-a-number is grey.

    Args:
        figure: owner of the axes.
        axes: where.
        matrix: [N, M]; row 0 at the top.
        xlabel: what columns are, with the unit.
        ylabel: what rows are, with the unit.
        colour_label: what the colour means, with the unit.
        title: above the axes.
        row_labels: names of the rows.
        column_labels: names of the columns.
        diverging_around: a value with a meaning of its own (zero, chance); colours then part from it in two directions.
        limits: smallest and largest value of the colour bar.
        annotate: format of numbers written into the cells, such as ".2f".

    Returns:
        The matplotlib image.

    Raises:
        ValueError: the matrix has not two axes.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"matrix: shape {matrix.shape}, must be [N, M] with entries.")
    finite = matrix[np.isfinite(matrix)]
    low, high = limits or ((finite.min(), finite.max()) if finite.size else (0.0, 1.0))
    name = "viridis"  # perceptually uniform, reads in grey too
    if diverging_around is not None:
        reach = max(abs(high - diverging_around), abs(low - diverging_around))
        low, high, name = diverging_around - reach, diverging_around + reach, "PuOr"
    colour_map = require("matplotlib", "experiments").colormaps[name].with_extremes(bad="#CCCCCC")
    image = axes.imshow(np.ma.masked_invalid(matrix), cmap=colour_map, vmin=low, vmax=high, aspect="auto")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title or "")
    if row_labels is not None:
        axes.set_yticks(range(len(row_labels)), row_labels)
    if column_labels is not None:
        axes.set_xticks(range(len(column_labels)), column_labels)
    bar = figure.colorbar(image, ax=axes, label=colour_label)
    bar.outline.set_visible(False)
    if annotate is not None:
        _annotate(axes, image, matrix, annotate)
    return image


def _annotate(axes: "Axes", image: Any, matrix: np.ndarray, form: str) -> None:
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            colour = "white" if dark else "black"
            axes.text(column, row, format(value, form), ha="center", va="center", color=colour, fontsize=10)


def non_dominated(points: np.ndarray, *, maximise: bool = True) -> np.ndarray:
    """Which of ``points [N, 2]`` no other point beats in both coordinates; bool [N]. Repeated points all count.

    >>> non_dominated(np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])).tolist()
    [True, True, False]
    """
    signed = np.asarray(points, np.float64) * (1 if maximise else -1)
    order = np.lexsort((-signed[:, 1], -signed[:, 0]))
    result = np.zeros(len(signed), bool)
    best, last = -np.inf, None
    for i in order:  # first coordinate falls, so a point survives if its second exceeds all before
        x, y = signed[i]
        if y > best or (last is not None and (x, y) == last):
            result[i], best, last = True, max(best, y), (x, y)
    return result


def pareto_front(
    axes: "Axes",
    points: Any,
    *,
    label: str,
    maximise: bool = True,
    reference: Sequence[float] | None = None,
    index: int | None = None,
) -> np.ndarray:
    """Draws points in two objectives, the front among them as a staircase, the dominated ones pale.

    Args:
        axes: where; the caller labels its axes with the objectives and their units.
        points: [N, 2].
        label: for the legend.
        maximise: whether more is better, in both objectives.
        reference: [2], shades the area between the front and this point: the hypervolume.
        index: which style; by default the number of series that these axes already show.

    Returns:
        bool [N], which points are on the front.

    Raises:
        ValueError: the points have not two coordinates.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"points: shape {points.shape}, must be [N, 2]. Draw three objectives pair by pair.")
    style = series_style(len(_series(axes)) if index is None else index)
    on_front = non_dominated(points, maximise=maximise)
    front = np.unique(points[on_front], axis=0)
    # The region that a front dominates has steps, not slopes; they turn on the side of the worse value.
    where = "pre" if maximise else "post"
    axes.step(front[:, 0], front[:, 1], where=where, color=style["color"], linestyle=style["linestyle"], linewidth=1.4)
    if reference is not None:
        _shade(axes, front, np.asarray(reference, np.float64), maximise, style["color"])
    rest = points[~on_front]
    axes.plot(rest[:, 0], rest[:, 1], linestyle="", marker=style["marker"], color=style["color"], alpha=0.25)
    line = axes.plot(front[:, 0], front[:, 1], label=label, linestyle="", **{k: style[k] for k in ("color", "marker")})
    line[0].set_gid("series")
    return on_front


def _shade(axes: "Axes", front: np.ndarray, reference: np.ndarray, maximise: bool, colour: str) -> None:
    """Fills what the front dominates down (or up) to the reference; points that do not beat it add nothing."""
    better = front > reference if maximise else front < reference
    front = front[better.all(axis=1)]
    if not len(front):
        return
    x, y = front.T
    if maximise:
        x, y = np.append(reference[0], x), np.append(y[0], y)
    else:
        x, y = np.append(x, reference[0]), np.append(y, y[-1])
    axes.fill_between(x, y, reference[1], step="pre" if maximise else "post", color=colour, alpha=0.12, linewidth=0)


def _render(figure: "Figure", form: str, dpi: int = 150) -> bytes:
    matplotlib = require("matplotlib", "experiments")
    buffer = io.BytesIO()
    # No date and fixed identifiers: the same figure gives the same bytes.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
    with matplotlib.rc_context({"svg.hashsalt": STYLE["svg.hashsalt"]}):
        figure.savefig(buffer, format=form, dpi=dpi, metadata=metadata, facecolor="white")
    return buffer.getvalue()


def save_figure(
    figure: "Figure", path_stem: str | os.PathLike[str], formats: Sequence[str] = ("svg", "png")
) -> list[Path]:
    """Writes a figure as ``path_stem.svg`` and so on, atomically.

    Raises:
        FileError: the place cannot be written.
        ValueError: matplotlib does not know a format.
    """
    stem = Path(path_stem)
    return [files.atomic_write(stem.with_name(f"{stem.name}.{form}"), _render(figure, form)) for form in formats]


def figure_to_data_uri(figure: "Figure", *, max_svg_bytes: int = 300_000) -> str:
    """The figure as a ``data:`` address for an ``<img>``: SVG, or PNG if the SVG would be larger than the limit."""
    content, kind = _render(figure, "svg"), "svg+xml"
    if len(content) > max_svg_bytes:
        content, kind = _render(figure, "png"), "png"
    return _data_uri(content, kind)


def file_to_data_uri(path: str | os.PathLike[str], *, max_svg_bytes: int = 300_000) -> str:
    """A picture on disk (.svg, .png) as a ``data:`` address; the PNG beside an SVG that is larger than the limit."""
    path = Path(path)
    if path.suffix == ".svg" and path.stat().st_size > max_svg_bytes and path.with_suffix(".png").exists():
        path = path.with_suffix(".png")
    return _data_uri(path.read_bytes(), "svg+xml" if path.suffix == ".svg" else "png")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def data_uri_size(address: str) -> tuple[float, float]:
    """Width and height of a ``data:`` address of this module, in pixels (PNG) or in points (SVG).

    Raises:
        ValueError: neither a PNG nor an SVG with a width and a height.
    """
    head, _, body = address.partition(",")
    content = base64.b64decode(body[:4096])  # both formats say it at the beginning
    if head == "data:image/png;base64" and content[12:16] == b"IHDR":
        return float(int.from_bytes(content[16:20])), float(int.from_bytes(content[20:24]))
    found = re.search(rb"<svg[^>]*?\swidth=\"([\d.]+)[^>]*?\sheight=\"([\d.]+)", content)
    if head != "data:image/svg+xml;base64" or not found:
        raise ValueError(f"address={address!r:.40}: must be a data:image/ address of an SVG or PNG with a size.")
    return float(found[1]), float(found[2])
