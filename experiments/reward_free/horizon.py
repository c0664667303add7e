"""The horizon drops out with weights and not without: uncertainty, value error and certificate against H."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from experiments.common.study import Result, Study
from experiments.reward_free.measures import bank_of, errorbars, measure_settled, ratio_interval
from experiments.reward_free.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.envs.mixtures import lock
from jaxrl_suite.reward_free import ExplorerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_KINDS: dict[str, dict[str, Any]] = {
    "weighted": {},
    "unweighted": {"algorithm": "unweighted"},
    "widest_targets": {"targets": "widths"},
    "ucrl_rfe": {"algorithm": "ucrl_rfe"},
}
_SHOWN = ("uncertainty", "largest_error", "certificate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HorizonConfig(Config):
    """Horizons and effort. The world is the lock with S = 8, A = 3, D = 5."""

    horizons: tuple[int, ...] = field((8, 16, 64, 256, 1024), help="horizons H")
    num_episodes: int = field(100, help="episodes K")
    num_runs: int = field(16, help="independent runs a point")
    ascent_steps: int = field(10, help="ascent steps of the oracle an episode")
    max_doublings: int = field(
        6, help="at the end the steps are doubled until the uncertainty of the final data moves by less than 2 percent"
    )
    num_random_rewards: int = field(30, help="random rewards in the bank")
    kinds: tuple[str, ...] = field(
        ("weighted", "unweighted"), help="explorers, of weighted, unweighted, widest_targets, ucrl_rfe"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [kind for kind in self.kinds if kind not in _KINDS]
        check(not unknown and self.kinds != (), argument="kinds", value=unknown, rule=f"must be of {', '.join(_KINDS)}")


def run(run: "Run") -> Result:
    """Runs every kind at every horizon; doubles the oracle's effort until it no longer matters."""
    config = cast(HorizonConfig, run.config)
    world, arrays = lock(), {}
    keys = jax.random.split(run.key, config.num_runs)
    points = [(kind, horizon) for kind in config.kinds for horizon in config.horizons]
    for kind, horizon in run.progress(points, "horizons"):
        found = run.stage(f"{kind}_{horizon}", lambda k=kind, h=horizon: _point(world, config, k, h, keys))
        arrays |= {f"{kind}/{horizon}/{name}": value for name, value in found.items()}
    summary: dict[str, float | int | str | bool | None] = {}
    for kind in config.kinds:
        for name in ("uncertainty", "largest_error", "value_error", "loss"):
            rows = {h: arrays[f"{kind}/{h}/{name}"] for h in config.horizons}
            late_rows = [row for h, row in rows.items() if h >= min(16, max(config.horizons))]
            curve, late = np.mean([*rows.values()], axis=1), np.mean(late_rows, axis=1)
            summary[f"{kind}/{name}_max_over_min"] = float(late.max() / late.min())
            low, high = ratio_interval(late_rows)
            summary[f"{kind}/{name}_max_over_min_low"] = low
            summary[f"{kind}/{name}_max_over_min_high"] = high
            summary[f"{kind}/{name}_growth"] = float(late[-1] / late[0])
            summary[f"{kind}/{name}_at_last_horizon"] = float(curve[-1])
        summary[f"{kind}/settled"] = bool(all(arrays[f"{kind}/{h}/settled"] for h in config.horizons))
        # Effort after the first two entries (which both cost the first number of steps) doubles.
        lengths = [len(arrays[f"{kind}/{h}/effort"]) for h in config.horizons]
        summary[f"{kind}/largest_ascent_steps"] = config.ascent_steps * 2 ** (max(lengths) - 1)
    return Result(summary, arrays | {"horizons": np.array(config.horizons), "kinds": np.array(config.kinds)})


def _point(world, config: HorizonConfig, kind: str, horizon: int, keys) -> dict[str, np.ndarray]:
    bank = bank_of(world, horizon, num_random=config.num_random_rewards)
    settings = ExplorerConfig(
        horizon=horizon,
        num_episodes=config.num_episodes,
        ascent_steps=config.ascent_steps,
        output="final",
        **_KINDS[kind],
    )
    return measure_settled(world, settings, keys, bank, max_doublings=config.max_doublings)


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Uncertainty, value error and certificate against the horizon."""
    from jaxrl_suite.io.plots import new_figure

    horizons = result.arrays["horizons"]
    figure, panels = new_figure(14.0, 4.2, ncols=3, title="Lock, S = 8, A = 3, D = 5: what a longer horizon costs")
    labels = ("uncertainty value (an indication)", "largest value error found", "certificate, radius 1.3 sqrt(D)")
    for axes, name, label in zip(panels, _SHOWN, labels, strict=True):
        for index, kind in enumerate(str(name) for name in result.arrays["kinds"]):
            values = np.array([result.arrays[f"{kind}/{h}/{name}"] for h in horizons])
            errorbars(axes, horizons, values, index, kind.replace("_", " "))
        axes.set_xscale("log", base=2)
        axes.set(xlabel="horizon H (steps)", ylabel=label, ylim=(0, None))
    panels[0].legend()
    panels[-1].set_title("1 says nothing: that takes thousands of episodes", fontsize=10)
    return {"horizon": figure}


STUDY = Study(
    name="horizon",
    summary="On the lock the weighted explorer's uncertainty stays flat from 16 steps to many, where the unweighted "
    "one's grows to 1; the ascent effort is doubled until it does not matter.",
    config=HorizonConfig,
    run=run,
    figures=figures,
    presets=PRESETS["horizon"],
    headline=("weighted/uncertainty_max_over_min", "unweighted/uncertainty_growth"),
    x64=True,
)
