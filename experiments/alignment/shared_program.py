"""Runs under several weight rules from one start: rules that need the same of a step share one compiled program."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.alignment.arithmetic_run import ArithmeticSizes, Trace, make_trainer, train_run
from jaxrl_suite import pareto
from jaxrl_suite.types import Array


class Contestant(NamedTuple):
    """One rule of a comparison.

    Attributes:
        rule: weight rule out of settings [3], which are traced, so that all settings of a rule share a program.
        num_steps: rollouts of its runs.
        combine: what its weights combine, of :class:`jaxrl_suite.alignment.TrainerConfig`.
    """

    rule: Callable[[Array], pareto.WeightRule]
    num_steps: int
    combine: str = "reward"


# run(key, settings [3], learning rate) -> what the run leaves
CompiledRun = Callable[[Array, Any, Any], Trace]


def compiled_runs(contest: Mapping[str, Contestant], config: ArithmeticSizes, params: Any) -> dict[str, CompiledRun]:
    """The run of each contestant; one program with influences, one without, and one for each rule with a gain.

    A program is as long as the longest of its runs; shorter ones stop before its end.

    Args:
        contest: name -> rule and length, a multiple of ``config.eval_every``.
        config: sizes that all of them share.
        params: where all of them start.
    """
    kinds: dict[Any, list[str]] = {}
    for name, contestant in contest.items():
        rule = contestant.rule(jnp.full(3, 1 / 3))
        # A rule with a gain acts on the rewards too, which the trainer sees from its state.
        gain = isinstance(pareto.weight_gain(rule.init()), jax.Array)
        kinds.setdefault((contestant.combine, "influence" in rule.reads, name if gain else ""), []).append(name)

    def program(names: list[str]) -> Callable[..., Trace]:
        sizes = config.replace(num_steps=max(contest[name].num_steps for name in names))
        combine = contest[names[0]].combine

        def run(number: Array, num_steps: Array, key: Array, settings: Array, rate: Array) -> Trace:
            rule = _one_of([contest[name].rule(settings) for name in names], number)
            trainer = make_trainer(sizes, rule, combine=combine, learning_rate=rate)
            return train_run(trainer, sizes, params, key, num_steps)

        return jax.jit(run)

    def one(shared: Callable[..., Trace], number: int, num_steps: int, key: Array, settings: Any, rate: Any) -> Trace:
        words = jnp.int32(number), jnp.int32(num_steps), key, jnp.asarray(settings, jnp.float32), jnp.float32(rate)
        trace, checkpoints = jax.device_get(shared(*words)), num_steps // config.eval_every + 1
        return Trace(*(part[:checkpoints] for part in trace[:3]), *(part[:num_steps] for part in trace[3:]))

    return {
        name: functools.partial(one, shared, number, contest[name].num_steps)
        for names, shared in ((names, program(names)) for names in kinds.values())
        for number, name in enumerate(names)
    }


def stacked(traces: Sequence[Trace]) -> dict[str, np.ndarray]:
    """Traces of several runs [N, ...], by the names of their fields."""
    return {name: np.stack([getattr(trace, name) for trace in traces]) for name in Trace._fields}


def _one_of(rules: Sequence[pareto.WeightRule], number: Array) -> pareto.WeightRule:
    """The rule with this number, which is traced."""
    if len(rules) == 1:
        return rules[0]

    def moved(place: int) -> Callable[[tuple[Any, ...], pareto.Signals], tuple[tuple[Any, ...], Array]]:
        def step(states: tuple[Any, ...], signals: pareto.Signals) -> tuple[tuple[Any, ...], Array]:
            state, weights = rules[place].step(states[place], signals)
            return (*states[:place], state, *states[place + 1 :]), weights

        return step

    def step(states: tuple[Any, ...], signals: pareto.Signals) -> tuple[tuple[Any, ...], Array]:
        return jax.lax.switch(number, [moved(place) for place in range(len(rules))], states, signals)

    reads = tuple(sorted({signal for rule in rules for signal in rule.reads}))
    return pareto.WeightRule(lambda: tuple(rule.init() for rule in rules), step, reads)
