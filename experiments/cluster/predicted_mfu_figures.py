"""Figures of the study ``predicted_mfu``."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.cluster.models import PAPER_NAMES
from experiments.cluster.paper_tables import METHODS
from jaxrl_suite.io import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arrays = Mapping[str, np.ndarray]


def scatter(arrays: Arrays) -> "Figure":
    """Predicted against published MFU; each model predicted from the three others."""
    figure, axes = plots.new_figure(6.4, 5.6, title="Published MFU, predicted from the three other models")
    line = np.array([2.0, 60.0])
    axes.plot(line, line, color="#444444", linewidth=1.0, linestyle="-")
    axes.fill_between(line, 0.92 * line, 1.08 * line, color="#999999", alpha=0.2, linewidth=0, label="within 8 %")
    for index, (name, label) in enumerate(PAPER_NAMES.items()):
        chosen = arrays["model"] == name
        style = {**plots.series_style(index), "linestyle": ""}
        axes.plot(100 * arrays["measured"][chosen], 100 * arrays["left_out"][chosen], label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="published MFU (%)", ylabel="predicted MFU (%)")
    ticks = [2, 5, 10, 20, 50]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.legend(frameon=False)
    return figure


def scaling(arrays: Arrays) -> "Figure":
    """Strong scaling of table 4 by model: published as markers, predicted (left out) as lines."""
    figure, panels = plots.new_figure(9.6, 7.2, nrows=2, ncols=2, title="Strong scaling, global batch 1,024")
    for position, (axes, (name, label)) in enumerate(zip(panels.flat, PAPER_NAMES.items())):
        for index, method in enumerate(METHODS[1:]):
            rows = (arrays["model"] == name) & (arrays["table"] == 4) & (arrays["method"] == method)
            if not rows.any():
                continue
            style = plots.series_style(index)
            x = arrays["devices"][rows]
            axes.plot(x, 100 * arrays["left_out"][rows], color=style["color"], linestyle=style["linestyle"])
            axes.plot(x, 100 * arrays["measured"][rows], **{**style, "linestyle": ""}, label=method)
        if "scaling_best" in arrays:
            best = arrays["scaling_best"][arrays["scaling_best"][:, 0] == position]
            axes.plot(best[:, 1], 100 * best[:, 2], label="best folding found", **plots.series_style(4))
        axes.set(title=label, xlabel="GPUs", ylabel="MFU (%)", xscale="log", ylim=(0, None))
        axes.set_xticks([64, 128, 256, 512, 1024], ["64", "128", "256", "512", "1024"])
        axes.set_xticks([], minor=True)
    panels.flat[1].legend(frameon=False, fontsize=9, title="markers published, lines predicted", title_fontsize=9)
    return figure


def context(arrays: Arrays, predicted: Mapping[str, Sequence[tuple[int, float]]]) -> "Figure":
    """Context scaling: published as markers, predicted as lines, and the best mapping found where it was searched."""
    figure, axes = plots.new_figure(6.8, 4.4, title="Longer sequences, tokens of a batch constant")
    for index, (method, points) in enumerate(predicted.items()):
        style, label = plots.series_style(index), f"Mixtral 8x22B, {method}"
        x, y = np.array(points).T
        axes.plot(x / 1024, 100 * y, color=style["color"], linestyle=style["linestyle"], label=f"{label}, predicted")
        rows = (arrays["table"] == 5) & (arrays["method"] == method)
        shown = {**style, "linestyle": "", "label": f"{label}, published"}
        axes.plot(arrays["sequence"][rows] / 1024, 100 * arrays["measured"][rows], **shown)
    for model, label in enumerate(("Mixtral 8x22B", "Qwen2-57B-A14B")):
        if "context_best" in arrays:
            best = arrays["context_best"][arrays["context_best"][:, 0] == model]
            axes.plot(
                best[:, 1] / 1024, 100 * best[:, 2], label=f"{label}, best found", **plots.series_style(2 + model)
            )
    axes.set(xscale="log", xlabel="sequence (K tokens)", ylabel="MFU (%)", ylim=(0, None))
    axes.set_xticks([4, 16, 32, 64, 128], ["4", "16", "32", "64", "128"])
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False, fontsize=9)
    return figure


def memory(arrays: Arrays, limit: float) -> "Figure":
    """Memory of the fullest device of each row of table 3, by kind."""
    labels = [f"{label} ({level})" for label, level in zip(arrays["memory_label"], arrays["memory_recompute"])]
    notes = ["" if published else " out of memory in the paper" for published in arrays["memory_published"]]
    figure, axes = plots.new_figure(9.6, 7.2, title="Memory of the fullest device, mappings of table 3")
    left = np.zeros(len(labels))
    for index, kind in enumerate(arrays["memory_kinds"]):
        part = arrays["memory_bytes"][:, index] / 1e9
        colour = plots.series_style(index)["color"]
        axes.barh(range(len(labels)), part, left=left, color=colour, label=str(kind), edgecolor="white", linewidth=0.4)
        left = left + part
    for row, (end, note) in enumerate(zip(left, notes)):
        axes.text(end, row, note, va="center", fontsize=8)
    axes.axvline(limit / 1e9, color="#000000", linewidth=1.2, linestyle="--")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="GB (1e9 bytes); in brackets what is recomputed", xlim=(0, 1.35 * left.max()))
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


_KIND_LABELS = {
    "tp": "tensor",
    "cp": "context",
    "ep": "expert exchange",
    "etp": "expert tensor",
    "pp": "pipeline",
    "weights": "sharded weights",
    "dense_gradients": "dense gradients",
    "expert_gradients": "expert gradients",
}


def traffic(arrays: Arrays) -> "Figure":
    """Bytes that a device sends in a step, by kind and link, without and with folding."""
    labels = [str(label) for label in arrays["traffic_label"]]
    figure, panels = plots.new_figure(10.4, 5.2, ncols=2, title="Traffic of a device in a step (table 3, batch 256)")
    titles = {"node": "inside the node (NVLink)", "network": "between nodes (InfiniBand)"}
    for column, (axes, link) in enumerate(zip(panels, arrays["traffic_links"])):
        left = np.zeros(len(labels))
        for index, kind in enumerate(arrays["traffic_kinds"]):
            part = arrays["traffic_bytes"][:, index, column] / 1e9
            if arrays["traffic_bytes"][:, index].any():
                colour = plots.series_style(index)["color"]
                axes.barh(range(len(labels)), part, left=left, color=colour, label=_KIND_LABELS[str(kind)])
            left = left + part
        axes.set_yticks(range(len(labels)), labels if column == 0 else [""] * len(labels), fontsize=8)
        axes.invert_yaxis()
        axes.set(title=titles[str(link)], xlabel="GB (1e9 bytes)", xlim=(0, 1.04 * left.max()))
    panels[1].legend(frameon=False, fontsize=9)
    return figure
