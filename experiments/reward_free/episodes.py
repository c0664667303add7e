"""How fast it learns: uncertainty and errors against the number of episodes, and against the dimension."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax
import numpy as np

from experiments.common.study import Result, Study
from experiments.reward_free.measures import bank_of, errorbars, log_slope, measure_path
from experiments.reward_free.presets import PRESETS
from jaxrl_suite.config import Config, field
from jaxrl_suite.envs.mixtures import hard_instance, region_chain
from jaxrl_suite.reward_free import ExplorerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_SHOWN = ("uncertainty", "value_error", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodesConfig(Config):
    """Episodes and dimensions; the chain has S = 8, D = 5, the hard instance a gap that shrinks as 1 / sqrt(K)."""

    episodes: tuple[int, ...] = field((32, 64, 128, 256, 512), help="numbers of episodes K")
    dimensions: tuple[int, ...] = field((3, 5, 7), help="dimensions D of the hard instance")
    dimension_episodes: int = field(200, help="episodes of the comparison of dimensions")
    horizon: int = field(16, help="steps an episode H")
    num_runs: int = field(8, help="independent runs a point")
    gap_scale: float = field(0.3, help="c of the hard instance's gap c / sqrt(K), at most (1/6) sqrt(K) / (D - 1)")


def run(run: "Run") -> Result:
    """Slopes in K on the chain and on a shrinking gap, slopes in D on the hard instance."""
    config = cast(EpisodesConfig, run.config)
    keys, arrays = jax.random.split(run.key, config.num_runs), {}
    settings = ExplorerConfig(horizon=config.horizon, num_episodes=max(config.episodes), output="final")

    def chain() -> dict[str, np.ndarray]:
        world = region_chain()
        return measure_path(world, settings, keys, bank_of(world, config.horizon), config.episodes)

    def gap() -> dict[str, np.ndarray]:
        rows = []
        for count in config.episodes:  # a world of its own for each K, but of one shape: compiled once
            world = hard_instance(4, gap=config.gap_scale / count**0.5)
            ladder = tuple(k for k in config.episodes if k <= count)
            found = measure_path(world, settings, keys, bank_of(world, config.horizon), ladder)
            rows.append({name: values[-1] for name, values in found.items()})
        return {name: np.array([row[name] for row in rows]) for name in _SHOWN}

    def dimension(size: int) -> dict[str, np.ndarray]:
        world = hard_instance(size, gap=0.02)
        bank = bank_of(world, config.horizon)
        return measure_path(world, settings, keys, bank, (config.dimension_episodes,))

    for name, function in run.progress((("chain", chain), ("gap", gap)), "episodes"):
        found = run.stage(name, function)
        for index, count in enumerate(config.episodes):
            arrays |= {f"{name}/{count}/{key}": found[key][index] for key in _SHOWN}
    for size in run.progress(config.dimensions, "dimensions"):
        found = run.stage(f"dimension_{size}", lambda d=size: dimension(d))
        arrays |= {f"dimension/{size}/{key}": found[key][0] for key in _SHOWN}
    summary: dict[str, float | int | str | bool | None] = {}
    for name, values in (("chain", config.episodes), ("gap", config.episodes), ("dimension", config.dimensions)):
        for key in _SHOWN:
            means = [arrays[f"{name}/{value}/{key}"].mean() for value in values]
            summary[f"{name}/{key}_slope"] = log_slope(values, means) if len(values) > 1 else None
    # With error = c D^a K^b, the episodes that reach epsilon grow as epsilon^(1 / b) and as D^(-a / b).
    for key in _SHOWN:
        in_episodes, in_dimension = (cast(float, summary[f"{name}/{key}_slope"]) for name in ("gap", "dimension"))
        both = in_episodes and in_dimension is not None
        summary[f"gap/{key}_episodes_against_epsilon_slope"] = 1.0 / in_episodes if in_episodes else None
        summary[f"gap/{key}_episodes_against_dimension_slope"] = -in_dimension / in_episodes if both else None
    shapes = {"episodes": np.array(config.episodes), "dimensions": np.array(config.dimensions)}
    return Result(summary, arrays | shapes)


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Errors against K, on the chain and the hard instance, and against D."""
    from jaxrl_suite.io.plots import new_figure

    figure, panels = new_figure(14.0, 4.2, ncols=3)
    rows = (
        ("chain", "episodes", "chain, S = 8, D = 5", "episodes K"),
        ("gap", "episodes", "hard instance, gap falls as 1 / sqrt(K)", "episodes K"),
        ("dimension", "dimensions", "hard instance, gap 0.02", "dimension D"),
    )
    for axes, (name, axis, title, xlabel) in zip(panels, rows, strict=True):
        values = result.arrays[axis]
        for index, key in enumerate(_SHOWN):
            points = np.array([result.arrays[f"{name}/{value}/{key}"] for value in values])
            slope = result.summary[f"{name}/{key}_slope"]
            label = key.replace("_", " ") + (f", slope {slope:.2f}" if slope is not None else "")
            errorbars(axes, values, np.maximum(points, 1e-5), index, label)
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="of a total reward of 1", title=title)
        axes.set_xticks(values, [str(value) for value in values])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.legend(fontsize=8)
    return {"episodes": figure}


STUDY = Study(
    name="episodes",
    summary="Uncertainty, value error and loss against episodes and dimension, with fitted slopes, on a chain and on "
    "the lower-bound instance.",
    config=EpisodesConfig,
    run=run,
    figures=figures,
    presets=PRESETS["episodes"],
    headline=("chain/uncertainty_slope", "gap/loss_slope", "dimension/uncertainty_slope"),
    x64=True,
)
