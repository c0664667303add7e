"""All explorers at equal episodes on six worlds, negative controls included."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from experiments.common.study import Result, Study
from experiments.reward_free.measures import WORLDS, bank_of, mean_and_half, measure
from experiments.reward_free.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.reward_free import ExplorerConfig, HParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

EXPLORERS: dict[str, dict[str, Any]] = {
    "hf_ucrl_rfe_pp": {},
    "widest_targets": {"targets": "widths"},
    "unweighted": {"algorithm": "unweighted"},
    "ucrl_rfe": {"algorithm": "ucrl_rfe"},
    "ucrl_rfe_plus": {"algorithm": "ucrl_rfe_plus"},
    "rf_ucrl": {"algorithm": "rf_ucrl"},
    "uniform": {"algorithm": "uniform"},
}
_MEASURES = ("uncertainty", "loss", "value_error")
_LABELS = {
    "hf_ucrl_rfe_pp": "HF-UCRL-RFE++",
    "widest_targets": "the same, widest targets (ours)",
    "unweighted": "the same, unweighted",
    "ucrl_rfe": "UCRL-RFE",
    "ucrl_rfe_plus": "UCRL-RFE+",
    "rf_ucrl": "RF-UCRL (tabular)",
    "uniform": "uniform play",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselinesConfig(Config):
    """Worlds, episodes and runs."""

    worlds: tuple[str, ...] = field(
        ("lock", "chain", "riverswim", "frozen_lake_8x8", "random_mixture", "hard"), help="worlds to explore"
    )
    horizon: int = field(16, help="steps an episode (FrozenLake: four times as many)")
    num_episodes: int = field(150, help="episodes K")
    num_runs: int = field(8, help="independent runs")
    num_random_rewards: int = field(30, help="random rewards in the bank")
    explorers: tuple[str, ...] = field(tuple(EXPLORERS), help="explorers, the first is compared with the others")

    def __post_init__(self) -> None:
        super().__post_init__()
        for argument, known in (("worlds", WORLDS), ("explorers", EXPLORERS)):
            unknown = [name for name in getattr(self, argument) if name not in known]
            check(not unknown, argument=argument, value=unknown, rule=f"must be among {', '.join(known)}")


def run(run: "Run") -> Result:
    """Measures each explorer on each world, and says where the paper's loses."""
    config = cast(BaselinesConfig, run.config)
    keys, arrays = jax.random.split(run.key, config.num_runs), {}
    for name in run.progress(config.worlds, "worlds"):
        world, horizon = WORLDS[name](), config.horizon * (4 if name.startswith("frozen") else 1)
        bank = bank_of(world, horizon, num_random=config.num_random_rewards)
        for explorer in config.explorers:
            settings = ExplorerConfig(
                horizon=horizon, num_episodes=config.num_episodes, output="final", **EXPLORERS[explorer]
            )
            found = run.stage(
                f"{name}_{explorer}", lambda s=settings, w=world, b=bank: measure(w, s, HParams(), keys, b)
            )
            arrays |= {f"{name}/{explorer}/{key}": found[key] for key in _MEASURES}
    summary: dict[str, float | int | str | bool | None] = {}
    for name in config.worlds:
        errors = {explorer: arrays[f"{name}/{explorer}/value_error"].mean() for explorer in config.explorers}
        better = [explorer for explorer in config.explorers if errors[explorer] < errors[config.explorers[0]]]
        surest = min(config.explorers, key=lambda e, n=name: arrays[f"{n}/{e}/uncertainty"].mean())
        summary[f"{name}/best_in_value_error"] = min(errors, key=errors.__getitem__)
        summary[f"{name}/best_in_uncertainty"] = surest
        summary[f"{name}/best_in_both"] = surest if errors[surest] == min(errors.values()) else "none"
        summary[f"{name}/ahead_of_{config.explorers[0]}"] = ", ".join(better) or "none"
        for explorer in config.explorers:
            for key in _MEASURES:
                mean, half = mean_and_half(arrays[f"{name}/{explorer}/{key}"])
                summary[f"{name}/{explorer}/{key}"] = float(mean)
                summary[f"{name}/{explorer}/{key}_interval"] = float(half)
    return Result(summary, arrays | {"worlds": np.array(config.worlds), "explorers": np.array(config.explorers)})


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Uncertainty, loss and value error of each explorer on each world."""
    from jaxrl_suite.io.plots import new_figure, series_style

    worlds, explorers = ([str(name) for name in result.arrays[key]] for key in ("worlds", "explorers"))
    figure, panels = new_figure(14.0, 9.0, nrows=3, title="Explorers at equal episodes (lower is better)")
    labels = ("uncertainty value", "worst loss of a plan", "worst value error")
    width = 0.8 / len(explorers)
    for axes, key, label in zip(panels, _MEASURES, labels, strict=True):
        for index, explorer in enumerate(explorers):
            bars = [mean_and_half(result.arrays[f"{name}/{explorer}/{key}"]) for name in worlds]
            place = np.arange(len(worlds)) + width * (index - len(explorers) / 2)
            axes.bar(
                place,
                [max(float(mean), 1e-6) for mean, _ in bars],
                width,
                yerr=[float(half) for _, half in bars],
                color=series_style(index)["color"],
                label=_LABELS[explorer],
            )
        axes.set_xticks(range(len(worlds)), [name.replace("_", " ") for name in worlds])
        axes.set(ylabel=f"{label} (of 1)", yscale="log", ylim=(1e-4, 1.5))
    panels[0].legend(ncols=4, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.02))
    return {"baselines": figure}


STUDY = Study(
    name="baselines",
    summary="Seven explorers at equal episodes on worlds where exploration matters and on negative controls; "
    "says where the horizon-free one loses, also to its variant that regresses on the widest function.",
    config=BaselinesConfig,
    run=run,
    figures=figures,
    presets=PRESETS["baselines"],
    headline=("lock/best_in_value_error", "riverswim/best_in_value_error"),
    x64=True,
    extras={"gymnasium": "experiments"},
)
