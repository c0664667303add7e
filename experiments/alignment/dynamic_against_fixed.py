"""Weight rules against ten fixed weightings at equal tokens: settings chosen on some seeds, judged on others."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.alignment.arithmetic_run import (
    ArithmeticSizes,
    start_params,
    supervised_start,
)
from experiments.alignment.comparison import at_tokens, interval
from experiments.alignment.presets import PRESETS
from experiments.alignment.rules import CANDIDATES, candidate_rule, check_candidates, rule_label
from experiments.alignment.shared_program import Contestant, compiled_runs, stacked
from experiments.common.study import Result, Study
from jaxrl_suite import pareto
from jaxrl_suite.config import check, field

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

# All weightings in thirds: the corners, the points of the edges and the middle.
FIXED = np.array([(i, j, 3 - i - j) for i in range(4) for j in range(4 - i)], np.float32) / 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolConfig(ArithmeticSizes):
    """Seeds, settings to choose from, and by how much fixed runs may be longer to reach the same number of tokens."""

    candidates: tuple[str, ...] = field(
        ("influence:0.1", "influence:0.5", "influence:2", "tchebycheff:0.03", "tchebycheff:0.1", "tchebycheff:0.3",
         "hypervolume_gradient:0.05", "hypervolume_gradient:0.3", "hypervolume_gain:1", "saw:0.9",
         "sweep:0.5", "sweep:1", "sweep:2"),
        help="weight rules with a setting each, name:number; names: " + ", ".join(CANDIDATES),
    )  # fmt: skip
    learning_rates: tuple[float, ...] = field(
        (3e-4, 1e-3, 3e-3), help="of Adam; the best for equal fixed weights on the first seeds is used by all runs"
    )
    tuning_seeds: int = field(5, help="seeds on which settings are chosen")
    test_seeds: int = field(10, help="further seeds on which the comparison is made")
    extra_steps: float = field(0.25, help="fixed runs may take this share of rollouts more, to use as many tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_candidates("candidates", self.candidates)
        check(self.tuning_seeds >= 1, argument="tuning_seeds", value=self.tuning_seeds, rule="must be positive")
        check(self.test_seeds >= 2, argument="test_seeds", value=self.test_seeds, rule="an interval needs two seeds")


class _Runs:
    """Compiled runs: fixed weightings, which may be longer, and the rules to choose from."""

    def __init__(self, run: "Run", config: ProtocolConfig, params: Any) -> None:
        self.run = run
        total = config.tuning_seeds + config.test_seeds
        self.keys = jax.vmap(jax.random.fold_in, (None, 0))(run.key, np.arange(total))
        self.tuning, self.test = range(config.tuning_seeds), range(config.tuning_seeds, total)
        longer = int(config.num_steps * (1 + config.extra_steps)) // config.eval_every * config.eval_every
        contest = {"fixed": Contestant(pareto.fixed_weights, longer)}
        for family in dict.fromkeys(candidate.split(":")[0] for candidate in config.candidates):
            contest[family] = Contestant(candidate_rule(family, config.num_steps), config.num_steps)
        self.compiled = compiled_runs(contest, config, params)

    def _stage(self, name: str, seeds: range, contestant: str, settings: np.ndarray, rate: float) -> Any:
        """Traces of some seeds, one after another (a vmap over parameters is slower here), stored as one stage."""
        one = self.compiled[contestant]
        return self.run.stage(name, lambda: stacked([one(self.keys[seed], settings, rate) for seed in seeds]))

    def fixed(self, name: str, seeds: range, weights: np.ndarray, rate: float) -> dict[str, np.ndarray]:
        """Runs with weights that do not change."""
        return self._stage(name, seeds, "fixed", weights, rate)

    def dynamic(self, name: str, seeds: range, candidate: str, rate: float) -> dict[str, np.ndarray]:
        """Runs under a rule."""
        family, setting = candidate.split(":")
        return self._stage(name, seeds, family, np.full(3, float(setting)), rate)


def union_hypervolume(traces: list[np.ndarray]) -> float:
    """Hypervolume above 0 of all checkpoints of several runs, each [C, 3]."""
    return float(_hypervolume(jnp.asarray(np.concatenate(traces))))


_hypervolume = jax.jit(lambda points: pareto.hypervolume(points, jnp.zeros(3)))


def _best_triple(fixed: list[dict[str, np.ndarray]], num_seeds: int) -> tuple[tuple[int, ...], np.ndarray]:
    """The three weightings whose united checkpoints cover most, and what they cover with each seed.

    Chosen in hindsight on the very seeds of the comparison: the strongest rival, stronger than anyone could choose.
    """
    scores = {
        triple: np.array([union_hypervolume([fixed[j]["points"][s] for j in triple]) for s in range(num_seeds)])
        for triple in itertools.combinations(range(len(FIXED)), 3)
    }
    best = max(scores, key=lambda triple: scores[triple].mean())
    return best, scores[best]


def run(run: "Run") -> Result:
    """Start, learning rate, settings on the first seeds; then every fixed weighting and every rule on the others."""
    config = run.config
    assert isinstance(config, ProtocolConfig)
    trained = run.stage("supervised", lambda: supervised_start(config))
    runs = _Runs(run, config, start_params(trained))
    tried = {rate: runs.fixed(f"rate_{i}", runs.tuning, np.full(3, 1 / 3), rate)["hypervolume"][:, -1].mean()
             for i, rate in enumerate(run.progress(config.learning_rates, "learning rates"))}  # fmt: skip
    rate = max(tried, key=lambda r: tried[r])
    tuned = {}
    for i, candidate in enumerate(run.progress(config.candidates, "settings on the first seeds")):
        tuned[candidate] = runs.dynamic(f"setting_{i}", runs.tuning, candidate, rate)["hypervolume"][:, -1].mean()
    chosen: dict[str, str] = {}
    for candidate in sorted(tuned, key=lambda name: tuned[name]):
        chosen[candidate.split(":")[0]] = candidate
    fixed = [runs.fixed(f"fixed_{j}", runs.test, weights, rate)
             for j, weights in enumerate(run.progress(FIXED, "fixed weightings"))]  # fmt: skip
    dynamic = {name: runs.dynamic(f"rule_{name}", runs.test, chosen[name], rate)
               for name in run.progress(list(chosen), "rules")}  # fmt: skip
    champion = max(chosen, key=lambda name: tuned[chosen[name]])
    return _compare(config, fixed, dynamic, {"rate": rate, "champion": champion, "chosen": chosen, "tuned": tuned})


def _compare(config: ProtocolConfig, test: list[dict[str, np.ndarray]], dynamic: dict[str, dict[str, np.ndarray]],
             choice: dict[str, Any]) -> Result:  # fmt: skip
    triple, union = _best_triple(test, config.test_seeds)
    summary: dict[str, float | int | str | bool | None] = {
        "learning_rate": choice["rate"], "chosen_rule": choice["chosen"][choice["champion"]],
        "union/triple": " ".join("/".join(f"{w:.2f}" for w in FIXED[j]) for j in triple),
        "union/hypervolume_share": float(union.mean()),
    }  # fmt: skip
    arrays: dict[str, np.ndarray] = {"weightings": FIXED, "rules": np.array(list(dynamic)), "union": union,
                                     "champion": np.array(choice["champion"])}  # fmt: skip
    arrays["fixed/hypervolume"] = np.stack([traces["hypervolume"] for traces in test])
    arrays["fixed/tokens"] = np.stack([traces["tokens"] for traces in test])
    arrays["fixed/points"] = np.stack([traces["points"] for traces in test])
    for name, traces in dynamic.items():
        values, budget = traces["hypervolume"][:, -1], traces["tokens"][:, -1]
        rivals = np.stack([at_tokens(other, budget) for other in test])
        rows = np.array([interval(values - rival) for rival in rivals])
        against_union = interval(values - union)
        hardest = int(rows[:, 1].argmin())
        summary.update({
            f"{name}/setting": choice["chosen"][name],
            f"{name}/tuning_hypervolume_share": float(choice["tuned"][choice["chosen"][name]]),
            f"{name}/hypervolume_share": float(values.mean()),
            f"{name}/fixed_weightings_behind": int((rows[:, 1] > 0).sum()),
            f"{name}/hardest_weighting": "/".join(f"{w:.2f}" for w in FIXED[hardest]),
            f"{name}/hardest_difference_mean": float(rows[hardest, 0]),
            f"{name}/hardest_difference_low": float(rows[hardest, 1]),
            f"{name}/hardest_difference_high": float(rows[hardest, 2]),
            f"{name}/union_difference_mean": against_union[0],
            f"{name}/union_difference_low": against_union[1],
            f"{name}/union_difference_high": against_union[2],
        })  # fmt: skip
        arrays[f"{name}/differences"] = rows
        arrays[f"{name}/hypervolume"], arrays[f"{name}/tokens"] = traces["hypervolume"], traces["tokens"]
        arrays[f"{name}/points"], arrays[f"{name}/weights"] = traces["points"], traces["weights"]
    for j, traces in enumerate(test):
        name = "fixed_" + "_".join(f"{w:.2f}" for w in FIXED[j])
        summary[f"{name}/hypervolume_share"] = float(traces["hypervolume"][:, -1].mean())
    champion = choice["champion"]
    summary["champion/ahead_of_every_fixed"] = summary[f"{champion}/fixed_weightings_behind"] == len(FIXED)
    return Result(summary, arrays)


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Paired differences with their intervals; hypervolume against tokens."""
    return {"differences": _draw_differences(result.arrays), "tokens": _draw_tokens(result.arrays)}


def _draw_differences(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    rules = [str(rule) for rule in arrays["rules"]]
    labels = ["/".join(f"{w:.2f}".lstrip("0") or "0" for w in row) for row in arrays["weightings"]]
    figure, axes = new_figure(10.4, 4.6)
    ax: Any = axes
    for index, rule in enumerate(rules):
        rows, style = arrays[f"{rule}/differences"], series_style(index)
        place = np.arange(len(rows)) + (index - (len(rules) - 1) / 2) * 0.8 / len(rules)
        ax.errorbar(place, rows[:, 0], yerr=np.stack([rows[:, 0] - rows[:, 1], rows[:, 2] - rows[:, 0]]),
                    color=style["color"], marker=style["marker"], linestyle="none", capsize=2,
                    label=rule_label(rule))  # fmt: skip
    ax.axhline(0, color="#444444", linewidth=1)
    ax.set_xticks(np.arange(len(labels)), labels, rotation=20, fontsize=8)
    ax.set(xlabel="fixed weights of accuracy / conciseness / clarity",
           ylabel="hypervolume of the rule less that of the\nfixed weighting (share of the unit cube)",
           title="above 0: the rule is ahead at equal tokens (mean, 95 % interval over seeds)")  # fmt: skip
    ax.legend(fontsize=8, ncol=3)
    return figure


def _draw_tokens(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    figure, axes = new_figure(8.0, 4.4)
    ax: Any = axes
    for j, (tokens, values) in enumerate(zip(arrays["fixed/tokens"], arrays["fixed/hypervolume"], strict=True)):
        ax.plot(tokens.mean(0) / 1000, values.mean(0), color="#AAAAAA", linewidth=1,
                label="each fixed weighting" if j == 0 else None)  # fmt: skip
    for index, rule in enumerate(map(str, arrays["rules"])):
        style = {**series_style(index), "marker": ""}
        ax.plot(arrays[f"{rule}/tokens"].mean(0) / 1000, arrays[f"{rule}/hypervolume"].mean(0),
                label=rule_label(rule), **style)  # fmt: skip
    ax.axhline(
        float(arrays["union"].mean()), color="#444444", linestyle=":", label="three fixed runs united, 3x tokens"
    )
    ax.set(xlabel="sampled tokens (thousands)", ylabel="hypervolume of the archive (share of the unit cube)",
           title="archive of checkpoints, mean over test seeds")  # fmt: skip
    ax.legend(fontsize=8)
    return figure


STUDY = Study(
    name="dynamic_against_fixed",
    summary="Weight rules against ten fixed weightings at equal tokens: paired intervals on seeds of their own.",
    config=ProtocolConfig,
    run=run,
    figures=figures,
    presets=PRESETS["dynamic_against_fixed"],
    headline=("chosen_rule", "champion/ahead_of_every_fixed"),
    extras={"scipy": "experiments"},
)
