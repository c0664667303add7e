"""What each part of the explorer is worth: moments, floor, families, centre, oracle, laziness."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from experiments.common.study import Result, Study
from experiments.reward_free.measures import bank_of, mean_and_half, measure
from experiments.reward_free.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.envs.mixtures import lock
from jaxrl_suite.reward_free import ExplorerConfig, HParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "default": ({}, {}),
    "one moment level": ({"num_moments": 1}, {}),
    "two moment levels": ({"num_moments": 2}, {}),
    "eight moment levels": ({"num_moments": 8}, {}),
    "floor off": ({}, {"floor_scale": 1e-3}),
    "cutoff off": ({}, {"cutoff_scale": 0.0}),
    "one family": ({"families": "one"}, {}),
    "centre 0": ({"center": "zero"}, {}),
    "no ascent": ({"ascent_steps": 0}, {}),
    "50 ascent steps": ({"ascent_steps": 50}, {}),
    "softmax oracle": ({"oracle": "softmax"}, {}),
    "oracle over theta too": ({"oracle": "full"}, {}),
    "lazy switching": ({"lazy": True}, {}),
    "best iterate": ({"output": "best"}, {}),
    "one-hot refit": ({"planner_estimator": "onehot"}, {}),
    "radius self-normalised": ({"radius": "selfnorm"}, {"radius_scale": 0.15}),
    "radius of the theorem": ({"radius": "paper"}, {"radius_scale": 1.0}),
}
_SHOWN = ("uncertainty", "value_error", "loss", "asked")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationsConfig(Config):
    """The lock with S = 8, A = 3, D = 5."""

    horizon: int = field(16, help="steps an episode H")
    num_episodes: int = field(150, help="episodes K")
    num_runs: int = field(8, help="independent runs")
    variants: tuple[str, ...] = field(tuple(VARIANTS), help="which parts to vary")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.variants if name not in VARIANTS]
        check(not unknown, argument="variants", value=unknown, rule=f"must be among {', '.join(VARIANTS)}")


def run(run: "Run") -> Result:
    """Measures each variant with the same keys."""
    config = cast(AblationsConfig, run.config)
    world, keys, arrays = lock(), jax.random.split(run.key, config.num_runs), {}
    bank = bank_of(world, config.horizon)
    for name in run.progress(config.variants, "variants"):
        changes, scales = VARIANTS[name]
        base: dict[str, Any] = {"horizon": config.horizon, "num_episodes": config.num_episodes, "output": "final"}
        settings = ExplorerConfig(**(base | changes))
        stage = name.replace(" ", "_").replace("-", "_")
        hparams = HParams(**scales)
        found = run.stage(stage, lambda s=settings, h=hparams: measure(world, s, h, keys, bank))
        arrays |= {f"{name}/{key}": found[key] for key in _SHOWN}
    summary: dict[str, float | int | str | bool | None] = {}
    for name in config.variants:
        for key in _SHOWN:
            mean, half = mean_and_half(arrays[f"{name}/{key}"])
            summary[f"{name}/{key}"] = float(mean)
            summary[f"{name}/{key}_interval"] = float(half)
    return Result(summary, arrays | {"variants": np.array(config.variants)})


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Uncertainty and value error of each variant."""
    from jaxrl_suite.io.plots import new_figure, series_style

    names = [str(name) for name in result.arrays["variants"]]
    figure, panels = new_figure(12.0, 0.4 * len(names) + 1.5, ncols=2, title="Lock: what each part is worth")
    for axes, key in zip(panels, ("uncertainty", "value_error"), strict=True):
        bars = [mean_and_half(result.arrays[f"{name}/{key}"]) for name in names]
        axes.barh(
            range(len(names)),
            [float(mean) for mean, _ in bars],
            xerr=[float(half) for _, half in bars],
            color=[series_style(0 if name == "default" else 5)["color"] for name in names],
        )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel=f"{key.replace('_', ' ')} (of a total reward of 1)")
    return {"ablations": figure}


STUDY = Study(
    name="ablations",
    summary="The explorer on the lock with one part changed at a time: moments, floor, families, centre, oracle.",
    config=AblationsConfig,
    run=run,
    figures=figures,
    presets=PRESETS["ablations"],
    headline=("default/uncertainty", "one moment level/uncertainty"),
    x64=True,
)
