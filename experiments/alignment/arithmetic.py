"""Accuracy, conciseness and clarity of a small model on sums: weight rules against fixed weights at equal compute."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from experiments.alignment import arithmetic_task as task
from experiments.alignment.arithmetic_run import (
    OBJECTIVES,
    ArithmeticSizes,
    start_params,
    supervised_start,
)
from experiments.alignment.comparison import median_steps, steps_to_reach
from experiments.alignment.presets import PRESETS
from experiments.alignment.rules import RULES, make_rule, rule_label
from experiments.alignment.shared_program import Contestant, compiled_runs, stacked
from experiments.common.study import Result, Study
from jaxrl_suite.config import check, field
from jaxrl_suite.pareto import WeightRule, non_dominated
from jaxrl_suite.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticConfig(ArithmeticSizes):
    """What is compared."""

    rules: tuple[str, ...] = field(
        ("fixed", "influence", "hypervolume_gain", "hypervolume_gradient", "tchebycheff", "sweep"),
        help="weight rules, of " + ", ".join(RULES),
    )
    base_weights: tuple[float, ...] = field((0.334, 0.333, 0.333), help="initial or fixed weights of the objectives")
    rate: float = field(0.5, help="exponent scale eta / mu of the influence rule")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.rules:
            check(name in RULES, argument="rules", value=name, rule="unknown rule", remedy=f"Rules: {', '.join(RULES)}")


def _contestant(config: ArithmeticConfig, name: str) -> Contestant:
    """A rule by its name; its settings are its base weights."""

    def rule(weights: Array) -> WeightRule:
        return make_rule(name, weights, rate=config.rate, num_steps=config.num_steps)

    return Contestant(rule, config.num_steps, "gdpo" if name == "gdpo" else "reward")


def run(run: "Run") -> Result:
    """Supervised traces first, then one run for each rule and seed from the same start."""
    config = run.config
    assert isinstance(config, ArithmeticConfig)
    trained = run.stage("supervised", lambda: supervised_start(config))
    keys, rate = run.keys, config.learning_rate
    contest = {name: _contestant(config, name) for name in config.rules}
    runs = compiled_runs(contest, config, start_params(trained))
    weights = np.array(config.base_weights) / np.sum(config.base_weights)

    def traces(name: str) -> dict[str, np.ndarray]:
        # One seed after another: a vmap over parameters is slower here.
        return stacked([runs[name](key, weights, rate) for key in keys])

    summary: dict[str, float | int | str | bool | None] = {"supervised/loss_nats": float(trained["losses"][-1])}
    arrays: dict[str, np.ndarray] = {"rules": np.array(config.rules), "eval_every": np.array(config.eval_every)}
    for name in run.progress(config.rules, "weight rules"):
        found = run.stage(f"rule_{name}", lambda name=name: traces(name))
        arrays.update({f"{name}/{key}": value for key, value in found.items()})
        final = found["points"][:, -1].mean(0)
        summary[f"{name}/archive_hypervolume"] = float(found["hypervolume"][:, -1].mean())
        summary[f"{name}/final_hypervolume"] = float(np.prod(found["points"][:, -1], axis=1).mean())
        for index, objective in enumerate(OBJECTIVES):
            summary[f"{name}/final_{objective}"] = float(final[index])
    if "fixed" in config.rules:
        level = arrays["fixed/hypervolume"][:, -1]
        for name in config.rules:
            steps = steps_to_reach(arrays[f"{name}/hypervolume"], level, config.eval_every)
            summary[f"{name}/steps_to_fixed_front"] = median_steps(steps)
            summary[f"{name}/runs_reaching_it"] = int(np.isfinite(steps).sum())
    return Result(summary, arrays)


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Hypervolume over rollouts; objectives of the checkpoints; weights over time."""
    return {"hypervolume": _draw_hypervolume(result.arrays), "weights": _draw_weights(result.arrays)}


def _draw_hypervolume(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    figure, axes = new_figure(10.4, 4.2, ncols=2)
    for index, rule in enumerate(map(str, arrays["rules"])):
        values, points = arrays[f"{rule}/hypervolume"], arrays[f"{rule}/points"]
        steps = np.arange(values.shape[1]) * int(arrays["eval_every"])
        style = series_style(index)
        axes[0].plot(steps, values.mean(0), label=rule_label(rule), **{**style, "marker": ""})
        if len(values) > 1:
            axes[0].fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.12, linewidth=0)
        flat = points.reshape(-1, 3)
        keep = np.asarray(non_dominated(jnp.asarray(flat)))
        lengths = task.COMPLETION_LENGTH * (1 - flat[keep, 1])
        axes[1].plot(lengths, flat[keep, 0], label=rule_label(rule), **{**style, "linestyle": "none"})
    axes[0].set(xlabel="rollouts (steps)", ylabel="hypervolume of the archive\n(share of the unit cube)",
                title="archive of checkpoints, mean and range of seeds")  # fmt: skip
    axes[1].set(
        xlabel="length (tokens)", ylabel="accuracy (share)", title="checkpoints that none dominates (3 objectives)"
    )
    axes[0].legend(fontsize=9)
    return figure


def _draw_weights(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    rules = [str(rule) for rule in arrays["rules"]]
    figure, axes = new_figure(3.2 * max(2, len(rules)), 3.2, ncols=max(2, len(rules)))
    for ax, rule in zip(axes, rules, strict=False):
        for index, objective in enumerate(OBJECTIVES):
            ax.plot(
                arrays[f"{rule}/weights"].mean(0)[:, index], label=objective, **{**series_style(index), "marker": ""}
            )
        ax.set(title=rule_label(rule), xlabel="rollouts (steps)", ylabel="weight (share)", ylim=(-0.02, 1.02))
    axes[0].legend(fontsize=8)
    return figure


STUDY = Study(
    name="arithmetic",
    summary="Accuracy, conciseness and clarity on sums: weight rules against fixed weights at equal compute.",
    config=ArithmeticConfig,
    run=run,
    figures=figures,
    presets=PRESETS["arithmetic"],
    headline=("influence/archive_hypervolume", "influence/final_hypervolume"),
)
