"""Two families of models and two tasks in one table: dynamic weight rules against equal fixed weights, equal tokens."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.alignment.arithmetic_run import (
    FAMILIES,
    OBJECTIVES,
    ArithmeticSizes,
    start_params,
    supervised_start,
)
from experiments.alignment.comparison import at_tokens, interval, median_steps, steps_to_reach
from experiments.alignment.presets import PRESETS
from experiments.alignment.rules import candidate_rule, check_candidates, rule_label
from experiments.alignment.shared_program import Contestant, compiled_runs, stacked
from experiments.common.study import Result, Study
from jaxrl_suite import pareto
from jaxrl_suite.config import check, field

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamiliesConfig(ArithmeticSizes):
    """Which models, tasks and rules, and how many runs of each."""

    families: tuple[str, ...] = field(("llama", "qwen3"), help="families of models, of " + ", ".join(FAMILIES))
    operations: tuple[str, ...] = field(("sums", "products"), help="tasks: sums, products")
    rules: tuple[str, ...] = field(
        ("influence:0.1", "hypervolume_gain:1", "saw:0.9"),
        help="weight rules with a setting each, name:number; the settings are those that dynamic_against_fixed chose",
    )
    num_repeats: int = field(6, help="runs of each, with prompts and samples of their own")
    extra_steps: float = field(0.25, help="fixed runs may take this share of rollouts more, to use as many tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_candidates("rules", self.rules)
        check(len({rule.split(":")[0] for rule in self.rules}) == len(self.rules), argument="rules", value=self.rules,
              rule="must name each rule once")  # fmt: skip
        for argument, values, known in (("families", self.families, tuple(FAMILIES)),
                                        ("operations", self.operations, ("sums", "products"))):  # fmt: skip
            for value in values:
                check(value in known, argument=argument, value=value, rule=f"must be one of {', '.join(known)}")
        check(self.num_repeats >= 2, argument="num_repeats", value=self.num_repeats, rule="an interval needs two runs")

    @property
    def cells(self) -> list[tuple[str, "FamiliesConfig"]]:
        """Name and sizes of each cell of the table."""
        return [
            (f"{family}_{operation}", dataclasses.replace(self, family=family, operation=operation))
            for family, operation in itertools.product(self.families, self.operations)
        ]


def _cell(run: "Run", name: str, config: FamiliesConfig) -> dict[str, dict[str, np.ndarray]]:
    """Traces of equal fixed weights and of every rule, from one supervised start."""
    params = start_params(run.stage(f"start_{name}", lambda: supervised_start(config)))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(run.key, np.arange(config.num_repeats))
    longer = int(config.num_steps * (1 + config.extra_steps)) // config.eval_every * config.eval_every
    contest = {"fixed": Contestant(pareto.fixed_weights, longer)}
    settings = {"fixed": np.full(3, 1 / 3)}
    for rule in config.rules:
        family, setting = rule.split(":")
        contest[family] = Contestant(candidate_rule(family, config.num_steps), config.num_steps)
        settings[family] = np.full(3, float(setting))
    runs = compiled_runs(contest, config, params)

    def traces(contestant: str) -> dict[str, np.ndarray]:
        # One seed after another: a vmap over parameters is slower here.
        return stacked([runs[contestant](key, settings[contestant], config.learning_rate) for key in keys])

    return {key: run.stage(f"{name}_{key}", lambda key=key: traces(key)) for key in contest}


def _compare(config: FamiliesConfig, traces: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Of each contestant: share [N], difference from fixed weights at equal tokens [N], steps to their front [N]."""
    fixed = traces["fixed"]["hypervolume"][:, : config.num_steps // config.eval_every + 1]
    level = fixed[:, -1]
    found = {"fixed": {"share": level, "steps": steps_to_reach(fixed, level, config.eval_every)}}
    for name, trace in traces.items():
        if name != "fixed":
            share = trace["hypervolume"][:, -1]
            found[name] = {
                "share": share,
                "difference": share - at_tokens(traces["fixed"], trace["tokens"][:, -1]),
                "steps": steps_to_reach(trace["hypervolume"], level, config.eval_every),
            }
    return found


def run(run: "Run") -> Result:
    """Every cell of the table: a start, equal fixed weights, and the rules, with the same seeds."""
    config = run.config
    assert isinstance(config, FamiliesConfig)
    rules = [rule.split(":")[0] for rule in config.rules]
    summary: dict[str, float | int | str | bool | None] = {}
    arrays: dict[str, np.ndarray] = {"cells": np.array([name for name, _ in config.cells]), "rules": np.array(rules),
                                     "eval_every": np.array(config.eval_every)}  # fmt: skip
    differences = {rule: [] for rule in rules}
    for name, sizes in run.progress(config.cells, "families and tasks"):
        traces = _cell(run, name, sizes)
        found = _compare(sizes, traces)
        for index, objective in enumerate(OBJECTIVES):
            summary[f"{name}/start_{objective}"] = float(traces["fixed"]["points"][:, 0, index].mean())
        for key, values in found.items():
            summary[f"{name}/{key}/hypervolume_share"] = float(values["share"].mean())
            summary[f"{name}/{key}/steps_to_fixed_front"] = median_steps(values["steps"])
            summary[f"{name}/{key}/runs_reaching_it"] = int(np.isfinite(values["steps"]).sum())
            arrays[f"{name}/{key}/hypervolume"] = traces[key]["hypervolume"]
            arrays[f"{name}/{key}/points"], arrays[f"{name}/{key}/weights"] = (
                traces[key]["points"],
                traces[key]["weights"],
            )
            if key != "fixed":
                differences[key].append(values["difference"])
                _put_interval(summary, f"{name}/{key}", values["difference"])
    for rule, values in differences.items():
        arrays[f"{rule}/differences"] = np.array([interval(cell) for cell in values])
        _put_interval(summary, rule, np.mean(values, axis=0))
        summary[f"{rule}/cells_ahead"] = int((arrays[f"{rule}/differences"][:, 1] > 0).sum())
    return Result(summary, arrays)


def _put_interval(summary: dict[str, Any], name: str, differences: np.ndarray) -> None:
    for part, value in zip(("mean", "low", "high"), interval(differences), strict=True):
        summary[f"{name}/difference_{part}"] = value


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Paired differences of every cell; hypervolume over rollouts."""
    return {"differences": _draw_differences(result.arrays), "hypervolume": _draw_hypervolume(result.arrays)}


def _title(cell: str) -> str:
    return cell.replace("_", ", ")


def _draw_differences(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    rules, cells = [str(rule) for rule in arrays["rules"]], [str(cell) for cell in arrays["cells"]]
    figure, ax = new_figure(7.6, 4.2)
    for index, rule in enumerate(rules):
        rows, style = arrays[f"{rule}/differences"], series_style(index)
        place = np.arange(len(rows)) + (index - (len(rules) - 1) / 2) * 0.6 / len(rules)
        ax.errorbar(place, rows[:, 0], yerr=np.stack([rows[:, 0] - rows[:, 1], rows[:, 2] - rows[:, 0]]),
                    color=style["color"], marker=style["marker"], linestyle="none", capsize=3,
                    label=rule_label(rule))  # fmt: skip
    ax.axhline(0, color="#444444", linewidth=1)
    ax.set_xticks(np.arange(len(cells)), [_title(cell) for cell in cells])
    ax.set(xlim=(-0.5, len(cells) - 0.5),
           ylabel="hypervolume of the rule less that of\nequal fixed weights (share of the unit cube)",
           title="above 0: the rule is ahead at equal tokens (mean, 95 % interval)")  # fmt: skip
    ax.legend(fontsize=9)
    return figure


def _draw_hypervolume(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    cells = [str(cell) for cell in arrays["cells"]]
    figure, axes = new_figure(3.2 * max(2, len(cells)), 3.4, ncols=len(cells))
    axes = np.atleast_1d(axes)
    for ax, cell in zip(axes, cells, strict=True):
        for index, rule in enumerate(["fixed", *map(str, arrays["rules"])]):
            values = arrays[f"{cell}/{rule}/hypervolume"]
            steps = np.arange(values.shape[1]) * int(arrays["eval_every"])
            ax.plot(steps, values.mean(0), label=rule_label(rule), **{**series_style(index), "marker": ""})
        ax.set(title=_title(cell), xlabel="rollouts (steps)")
    axes[0].set_ylabel("hypervolume of the archive\n(share of the unit cube)")
    axes[0].legend(fontsize=8)
    return figure


STUDY = Study(
    name="families",
    summary="Two families of models and two tasks: weight rules against equal fixed weights, paired intervals.",
    config=FamiliesConfig,
    run=run,
    figures=figures,
    presets=PRESETS["families"],
    headline=("influence/difference_mean", "hypervolume_gain/difference_mean", "saw/difference_mean"),
    extras={"scipy": "experiments"},
)
