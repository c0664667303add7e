"""How much of a letter survives a bottleneck: information against rate, with bounds on both sides."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.coupling.presets import PRESETS
from experiments.coupling.text_source import LETTERS, letter_counts
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.coupling import coupling_bounds, ebim_greedy, ebim_path, greedy_coupling
from jaxrl_suite.distributions import binary_entropy, entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_SHOWN_RATES = (1.0, 2.5, 5.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateInformationConfig(Config):
    """What is read and at how many rates it is encoded."""

    num_files: int = field(60, help="modules of the Python standard library whose letters are counted")
    num_rates: int = field(401, help="number of rates between 0 and the entropy of the source")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_files > 0, argument="num_files", value=self.num_files, rule="must be positive")
        check(self.num_rates > 1, argument="num_rates", value=self.num_rates, rule="must be at least 2")


def run(run: "Run") -> Result:
    """Counts letters, then encodes and couples them at every rate in one compiled call."""
    config = cast(RateInformationConfig, run.config)
    counts = run.stage("count_letters", lambda: dict(zip(("code", "prose"), letter_counts(config.num_files))))
    curves = run.stage("couple", lambda: _curves(counts["code"], counts["prose"], config.num_rates))
    ceiling = float(curves["entropy_code"] + curves["entropy_prose"] - curves["bound_majorize_profile"])
    reached = float(curves["entropy_code"] + curves["entropy_prose"] - curves["joint_entropy"])
    at_half = np.searchsorted(curves["rates"], curves["entropy_code"] / 2)
    summary: dict[str, float | int | str | bool | None] = {
        "letters/code": int(counts["code"].sum()),
        "letters/prose": int(counts["prose"].sum()),
        "coupling/source_entropy_bits": float(curves["entropy_code"]),
        "coupling/joint_entropy_bits": float(curves["joint_entropy"]),
        "coupling/lower_bound_bits": float(curves["bound_majorize_profile"]),
        "coupling/gap_bits": float(curves["joint_entropy"] - curves["bound_majorize_profile"]),
        "coupling/information_bits": reached,
        "coupling/information_upper_bits": ceiling,
        "bottleneck/information_at_half_rate_bits": float(curves["through"][at_half]),
        "bottleneck/largest_loss_to_rate_bits": float(np.max(curves["rates"] - curves["encoder"])),
        "bottleneck/guaranteed_loss_bits": float(curves["guarantee"]),
    }
    return Result(summary, curves)


def _curves(code_counts: np.ndarray, prose_counts: np.ndarray, num_rates: int) -> dict[str, np.ndarray]:
    # Both sides sorted by frequency, so that pictures of couplings read from the top left.
    row_order, column_order = np.argsort(-code_counts, kind="stable"), np.argsort(-prose_counts, kind="stable")
    p = jnp.asarray(code_counts[row_order] / code_counts.sum())
    q = jnp.asarray(prose_counts[column_order] / prose_counts.sum())
    source_entropy = entropy(p)
    rates = jnp.linspace(0.0, source_entropy, num_rates)
    encoder, through, upper, _ = jax.jit(jax.vmap(_bottleneck, in_axes=(None, None, 0)))(p, q, rates)
    shown = jax.jit(jax.vmap(_bottleneck, in_axes=(None, None, 0)))(p, q, jnp.asarray(_SHOWN_RATES))[3]
    bounds, path = coupling_bounds(p, q), ebim_path(p)
    values = {
        "p": p,
        "q": q,
        "row_order": row_order,
        "column_order": column_order,
        "rates": rates,
        "encoder": encoder,
        "through": through,
        "upper": upper,
        "joints": shown,
        "path": path.entropies,
        "entropy_code": source_entropy,
        "entropy_prose": entropy(q),
        "independent_entropy": source_entropy + entropy(q),
        "joint_entropy": greedy_coupling(p, q, rule="best").entropy,
        "guarantee": binary_entropy(path.sorted_masses[1]),
        **{f"bound_{name}": value for name, value in bounds._asdict().items()},
    }
    return {name: np.asarray(value) for name, value in values.items()}


def _bottleneck(p, q, rate):
    """Information of the encoder and through the decoder, its upper bound, and the joint of letter and letter."""
    encoder = ebim_greedy(p, rate)
    coupling = greedy_coupling(encoder.code, q, rule="best")
    through = encoder.entropy + entropy(q) - coupling.entropy
    bound = entropy(p) + entropy(q) - coupling_bounds(p, q).majorize_profile
    decoder = coupling.dense((p.shape[0], q.shape[0]))[encoder.labels]  # the row of each letter's code
    joint = decoder * (p / encoder.code[encoder.labels])[:, None]
    return encoder.information, through, jnp.minimum(rate, bound), joint


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Information against rate; couplings at three rates; joint entropies between their bounds."""
    return {
        "information_against_rate": _draw_curves(result.arrays),
        "couplings": _draw_couplings(result.arrays),
        "bounds": _draw_bounds(result.arrays),
    }


def _draw_curves(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    figure, axes = new_figure(7.6, 4.8)
    rates, colours = arrays["rates"], [series_style(index)["color"] for index in range(4)]
    floor = np.maximum(rates - arrays["guarantee"], 0)
    axes.fill_between(
        rates, floor, rates, color="#BBBBBB", alpha=0.35, linewidth=0, label="guaranteed for the code (theorem 2)"
    )
    axes.plot(
        rates,
        arrays["encoder"],
        color=colours[0],
        linestyle="-",
        drawstyle="steps-post",
        label="letter and code, I(X;T)",
    )
    axes.plot(rates, arrays["upper"], color="#444444", linestyle=":", label="what no letter pair can exceed")
    axes.plot(
        rates,
        arrays["through"],
        color=colours[1],
        linestyle="-",
        drawstyle="steps-post",
        label="letter and letter, I(X;Y)",
    )
    axes.set(
        xlabel="rate of the code (bits a letter)",
        ylabel="information (bits a letter)",
        xlim=(0, rates[-1]),
        ylim=(0, None),
    )
    axes.set_title("Letters of code become letters of prose through a narrow code")
    axes.legend(loc="upper left")
    return figure


def _draw_couplings(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure

    figure, panels = new_figure(13.0, 4.4, ncols=len(_SHOWN_RATES))
    rows, columns = ([LETTERS[i] for i in arrays[name]] for name in ("row_order", "column_order"))
    for axes, joint, rate in zip(panels, arrays["joints"], _SHOWN_RATES, strict=True):
        given = joint / np.maximum(arrays["p"], 1e-300)[:, None]  # law of the prose letter given the code letter
        axes.imshow(np.ma.masked_equal(given, 0), vmin=0, vmax=1, cmap="viridis_r")
        axes.set_xticks(range(26), columns, fontsize=8)
        axes.set_yticks(range(26), rows, fontsize=8)
        axes.grid(False)
        axes.set(
            xlabel="letter in prose, by frequency",
            ylabel="letter in code, by frequency",
            title=f"rate {rate:g} bit a letter",
        )
    figure.colorbar(panels[0].images[0], ax=list(panels), label="probability given the letter in code")
    return figure


def _draw_bounds(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    names = ("bound_max_entropy", "bound_majorization", "bound_profile", "bound_majorize_profile", "joint_entropy")
    labels = (
        "largest marginal",
        "majorization",
        "profile",
        "majorize-profile",
        "greedy coupling",
        "independent letters",
    )
    values = [float(arrays[name]) for name in (*names, "independent_entropy")]
    kinds = [series_style(0)["color"]] * 4 + [series_style(1)["color"]] + ["#999999"]
    figure, axes = new_figure(7.6, 3.4)
    axes.barh(range(len(labels)), values, color=kinds)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    for row, value in enumerate(values):
        axes.text(value + 0.05, row, f"{value:.3f}", va="center")
    axes.set(
        xlabel="joint entropy (bits)",
        xlim=(0, max(values) * 1.1),
        title="Lower bounds, what greedy reaches, and chance",
    )
    return figure


STUDY = Study(
    name="rate_information",
    summary="How much a letter of Python code can tell about a letter of prose through a code of bounded rate, "
    "with what no coupling can beat.",
    config=RateInformationConfig,
    run=run,
    figures=figures,
    presets=PRESETS["rate_information"],
    headline=(
        "coupling/joint_entropy_bits",
        "coupling/lower_bound_bits",
        "coupling/information_bits",
        "bottleneck/information_at_half_rate_bits",
    ),
    tour=True,
    x64=True,
)
