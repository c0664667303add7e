"""Pictures of a plan."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_suite.io import plots


def stacked_bars(axes: Any, labels: Sequence[str], parts: Sequence[Mapping[str, float]], xlabel: str) -> None:
    """One bar a candidate, cut by kind; kinds that are nothing everywhere are left out.

    Args:
        axes: to draw on.
        labels: names of the bars, the first on top.
        parts: sizes of each bar by kind.
        xlabel: with its unit.
    """
    left = np.zeros(len(labels))
    kinds = [kind for kind in parts[0] if any(bar[kind] > 1e-3 * sum(bar.values()) for bar in parts)]
    for index, kind in enumerate(kinds):
        size = np.array([bar[kind] for bar in parts])
        style = {"color": plots.series_style(index)["color"], "hatch": "//" if index >= len(plots.colours()) else ""}
        axes.barh(range(len(labels)), size, left=left, label=kind.replace("_", " "), edgecolor="white", **style)
        left += size
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, xlim=(0, None))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
