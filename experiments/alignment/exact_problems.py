"""Every weight rule with three algorithms where the front is known: what the final policy reaches, what the archive."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.alignment.bit_policy import BitSampling, bit_policy, exact_objectives
from experiments.alignment.comparison import half_width
from experiments.alignment.presets import PRESETS
from experiments.alignment.rules import RULES, make_rule, rule_label
from experiments.common.study import Result, Study
from jaxrl_suite import alignment
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.envs import tied_bits
from jaxrl_suite.pareto import hypervolume
from jaxrl_suite.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

PROBLEMS = ("tied", "autoregressive")
# With two objectives a sweep has nothing to take turns with.
TWO_OBJECTIVES = tuple(name for name in RULES if name != "sweep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactConfig(Config):
    """What is compared, and how long every run is."""

    problems: tuple[str, ...] = field(PROBLEMS, help="tied: one shared logit, front not convex; autoregressive: convex")
    rules: tuple[str, ...] = field(TWO_OBJECTIVES, help="weight rules")
    estimators: tuple[str, ...] = field(
        ("grpo", "rloo", "reinforce"), help="algorithms: grpo, dr_grpo, rloo, reinforce"
    )
    num_bits: int = field(2, help="T, length of a sequence")
    num_repeats: int = field(10, help="independent runs, each from a start of its own")
    num_steps: int = field(200, help="rollouts of a run")
    group_size: int = field(16, help="completions a prompt; four prompts a rollout")
    learning_rate: float = field(0.3, help="of plain gradient steps")
    rate: float = field(0.5, help="exponent scale eta / mu of the influence rule")

    def __post_init__(self) -> None:
        super().__post_init__()
        for argument, values, known in (("rules", self.rules, TWO_OBJECTIVES), ("problems", self.problems, PROBLEMS)):
            for value in values:
                check(value in known, argument=argument, value=value, rule=f"must be one of {', '.join(known)}")


def _runs(config: ExactConfig, problem: str, estimator: Any, name: str, keys: Array) -> dict[str, np.ndarray]:
    """All repetitions of one rule in one compiled call: exact objectives [R, S + 1, 2] and weights [R, S, 2]."""
    free = problem == "autoregressive"
    trainer = alignment.Trainer(
        policy=bit_policy(config.num_bits, autoregressive=free),
        config=alignment.TrainerConfig(
            estimator=estimator, group_size=config.group_size, combine="gdpo" if name == "gdpo" else "reward"
        ),
        loss=alignment.LossConfig(kl_kind="none"),
        rule=make_rule(name, jnp.full(2, 0.5), rate=config.rate, num_steps=config.num_steps),
        optimizer=optax.sgd(config.learning_rate),
        sampling=BitSampling,
    )
    prompts, mask = jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1), bool)

    def one(key: Array) -> dict[str, Array]:
        start_key, state_key = jax.random.split(key)
        theta = 0.5 * jax.random.normal(start_key, (2**config.num_bits - 1 if free else 1,))
        state = alignment.init_trainer(state_key, trainer, {"theta": theta}, num_objectives=2)
        evaluate = lambda s: exact_objectives(s.params["theta"], config.num_bits, autoregressive=free)  # noqa: E731

        def step(state: Any, _: None) -> tuple[Any, tuple[Array, Array]]:
            generation = alignment.rollout(trainer, state, prompts, mask)
            rewards = tied_bits.rewards(generation.tokens).T.reshape(2, 4, config.group_size)
            present = evaluate(state)  # what a validation pass would tell the rule
            state, metrics = alignment.update(trainer, state, prompts, mask, generation, rewards, objectives=present)
            return state, (evaluate(state), metrics.weights)

        _, (points, weights) = jax.lax.scan(step, state, length=config.num_steps)
        points = jnp.concatenate([evaluate(state)[None], points])
        archive = hypervolume(points, jnp.zeros(2))
        return {"points": points, "weights": weights, "final": jnp.prod(points[-1]), "archive": archive}

    return jax.device_get(jax.jit(jax.vmap(one))(keys))


def run(run: "Run") -> Result:
    """One stage for each problem, algorithm and rule."""
    config = run.config
    assert isinstance(config, ExactConfig)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(run.key, np.arange(config.num_repeats))
    whole = {"tied": tied_bits.front_hypervolume(config.num_bits), "autoregressive": 0.5}
    summary: dict[str, float | int | str | bool | None] = {}
    arrays: dict[str, np.ndarray] = {
        "problems": np.array(config.problems), "estimators": np.array(config.estimators),
        "rules": np.array(config.rules), "whole": np.array([whole[problem] for problem in config.problems]),
    }  # fmt: skip
    cases = [(p, e, r) for p in config.problems for e in config.estimators for r in config.rules]
    for problem, estimator, rule in run.progress(cases, "problems, algorithms and rules"):
        name = f"{problem}_{estimator}_{rule}"
        found = run.stage(name, lambda case=(problem, estimator, rule): _runs(config, *case, keys))
        for what in ("final", "archive"):
            shares = found[what] / whole[problem]
            summary[f"{problem}/{estimator}/{rule}/{what}_hypervolume_share"] = float(shares.mean())
            summary[f"{problem}/{estimator}/{rule}/{what}_half_width"] = half_width(shares)
            arrays[f"{name}/{what}"] = shares
        arrays[f"{name}/points"] = found["points"]
    for problem in config.problems:
        best = {what: max(config.rules, key=lambda rule, what=what, problem=problem: np.mean(
            [arrays[f"{problem}_{e}_{rule}/{what}"].mean() for e in config.estimators]))
            for what in ("final", "archive")}  # fmt: skip
        summary.update({f"{problem}/best_rule_{what}": rule for what, rule in best.items()})
    return Result(summary, arrays)


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Share of the front's hypervolume: of the final policy and of all policies visited, one panel an algorithm."""
    return {str(problem): _draw(result.arrays, str(problem)) for problem in result.arrays["problems"]}


def _draw(arrays: Mapping[str, np.ndarray], problem: str) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    estimators, rules = [str(e) for e in arrays["estimators"]], [str(r) for r in arrays["rules"]]
    figure, axes = new_figure(3.6 * max(2, len(estimators)), 1.6 + 0.3 * len(rules), ncols=max(2, len(estimators)))
    for ax, estimator in zip(axes, estimators, strict=False):
        for index, (what, label) in enumerate((("final", "final policy"), ("archive", "all policies visited"))):
            values = [arrays[f"{problem}_{estimator}_{rule}/{what}"] for rule in rules]
            style = series_style(index)
            ax.errorbar([v.mean() for v in values], np.arange(len(rules)) + 0.16 * (2 * index - 1),
                        xerr=[np.nan_to_num(half_width(v)) for v in values], color=style["color"],
                        marker=style["marker"], linestyle="none", capsize=2, label=label)  # fmt: skip
        ax.set_yticks(np.arange(len(rules)), [rule_label(r) for r in rules] if ax is axes[0] else [])
        ax.invert_yaxis()
        ax.set(xlabel="hypervolume (share of the front's)", title=estimator, xlim=(-0.04, 1.04))
    for ax in axes[len(estimators) :]:
        ax.set_visible(False)
    axes[0].legend(fontsize=8, loc="best", framealpha=0.7)
    return figure


STUDY = Study(
    name="exact_problems",
    summary="Every weight rule with three algorithms on problems with known fronts: final policy and archive apart.",
    config=ExactConfig,
    run=run,
    figures=figures,
    presets=PRESETS["exact_problems"],
    headline=("tied/best_rule_final", "tied/best_rule_archive"),
    extras={"scipy": "experiments"},
)
