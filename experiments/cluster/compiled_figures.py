"""Picture of the compiled tables: memory of a device and what it sends, folded beside unfolded."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.cluster.models import PAPER_NAMES
from jaxrl_suite.io import plots
from jaxrl_suite.moe.cost_roofline import sent_in_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Line = Mapping[str, Any]


def compiled(pairs: Sequence[tuple[Line, Line]], limit: float) -> "Figure":
    """Bars of each compiled pair of rows.

    Args:
        pairs: (unfolded, folded) lines of the file of ``compile_table``.
        limit: memory of a device, bytes.
    """
    height = 1.6 + 0.42 * len(pairs)
    figure, panels = plots.new_figure(11.5, height, ncols=3, title="Compiled for H100s: a device in one step")
    titles = ("memory (GB)", "sent inside the node (GB)", "sent between nodes (GB)")
    for axes, title, values in zip(panels, titles, zip(*[_values(pair) for pair in pairs])):
        for index, method in enumerate(("unfolded: ETP = TP", "folded")):
            places = [row + 0.4 * index - 0.2 for row in range(len(pairs))]
            colour = plots.series_style(index)["color"]
            axes.barh(places, [value[index] for value in values], height=0.38, color=colour, label=method)
        axes.set_yticks(range(len(pairs)), [_label(pair[1]) for pair in pairs] if title == titles[0] else [])
        axes.tick_params(axis="y", labelsize=8, length=0)
        axes.invert_yaxis()
        axes.set(xlabel=title, xlim=(0, None))
    panels[0].axvline(limit / 1e9, color="#000000", linewidth=1.2, linestyle="--")
    panels[0].set_xlim(0, max(1.05 * limit / 1e9, panels[0].get_xlim()[1]))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    return figure


def _values(pair: tuple[Line, Line]) -> tuple[tuple[float, float], ...]:
    sent = [sent_in_all(line["traffic"]) for line in pair]
    memory = tuple(line["total_bytes"] / 1e9 for line in pair)
    inside, between = tuple(link.node / 1e9 for link in sent), tuple(link.network / 1e9 for link in sent)
    return memory, inside, between  # type: ignore[return-value]


def _label(line: Line) -> str:
    tokens = f"{line['sequence'] // 1024}K" if line["sequence"] >= 1024 else str(line["sequence"])
    return f"{PAPER_NAMES[line['model']]}, {line['num_devices']} GPUs, {tokens}, batch {line['global_batch']}"
