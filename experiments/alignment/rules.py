"""Weight rules by name, with settings that suit objectives scaled to [0, 1]."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

from jaxrl_suite import pareto
from jaxrl_suite.config import check
from jaxrl_suite.types import Array


def _ramp(weights: Array, num_steps: int) -> pareto.WeightRule:
    """All weight on the first objective at the start, the given weights at the end."""
    first = jnp.zeros_like(weights).at[0].set(1.0)

    def schedule(step: Array) -> Array:
        share = jnp.minimum(step.astype(weights.dtype) / max(1, num_steps), 1)
        return (1 - share) * first + share * weights

    return pareto.scheduled_weights(schedule)


def sweep_weights(weights: Array, cycles: Any, num_steps: int) -> pareto.WeightRule:
    """The first objective keeps its weight, the others take turns: a preference that travels along the front (ours).

    The share of objective i of the others follows ``1 + cos(2 pi (cycles t / num_steps - i / number of others))``.

    Args:
        weights: [K], on the simplex, K at least 3.
        cycles: rounds in the whole run; half a round with two others goes from one end to the other once.
        num_steps: length of the run.
    """
    others = weights.shape[0] - 1
    phase = jnp.arange(others, dtype=weights.dtype) / others

    def schedule(step: Array) -> Array:
        turn = jnp.asarray(cycles, weights.dtype) * step.astype(weights.dtype) / max(1, num_steps)
        bumps = 1 + jnp.cos(2 * jnp.pi * (turn - phase))
        rest = (1 - weights[0]) * bumps / jnp.sum(bumps)
        return jnp.concatenate([weights[:1], rest])

    return pareto.scheduled_weights(schedule)


# name -> rule(weights [K], rate, number of steps)
RULES: dict[str, Callable[[Array, Any, int], pareto.WeightRule]] = {
    "fixed": lambda w, rate, n: pareto.fixed_weights(w),
    "schedule": lambda w, rate, n: _ramp(w, n),
    "hypervolume_gain": lambda w, rate, n: pareto.hypervolume_gain_weights(w, capacity=16),
    "influence": lambda w, rate, n: pareto.influence_weights(w, rate),
    "hypervolume_gradient": lambda w, rate, n: pareto.hypervolume_gradient_weights(
        w, jnp.zeros_like(w), capacity=16, mixing=0.3
    ),
    "tchebycheff": lambda w, rate, n: pareto.tchebycheff_weights(w, jnp.ones_like(w), temperature=0.1),
    "saw": lambda w, rate, n: pareto.saw_weights(w, decay=0.9),
    "ctwa": lambda w, rate, n: pareto.ctwa_weights(w, rate, targets=jnp.full_like(w, 0.1)),
    "gdpo": lambda w, rate, n: pareto.gdpo_weights(w),
    "mo_grpo": lambda w, rate, n: pareto.mo_grpo_weights(w),
    "lagrangian": lambda w, rate, n: pareto.lagrangian_weights(w, jnp.full_like(w, 0.8), 0.05),
    "sweep": lambda w, rate, n: sweep_weights(w, 1.0, n),
    "famo": lambda w, rate, n: pareto.famo_weights(w, jnp.full_like(w, 1.01)),
}

_ABBREVIATIONS = ("saw", "ctwa", "gdpo", "mo_grpo", "famo")


def rule_label(name: str) -> str:
    """A rule's name as figures print it.

    >>> rule_label("saw"), rule_label("mo_grpo"), rule_label("hypervolume_gain")
    ('SAW', 'MO-GRPO', 'hypervolume gain')
    """
    return name.upper().replace("_", "-") if name in _ABBREVIATIONS else name.replace("_", " ")


# name -> rule(setting, number of steps) from equal weights of three objectives; a setting is traced, so that a family
# of settings is compiled once.
CANDIDATES: dict[str, Callable[[Array, int], pareto.WeightRule]] = {
    "influence": lambda s, n: pareto.influence_weights(_equal(), s),
    "tchebycheff": lambda s, n: pareto.tchebycheff_weights(_equal(), jnp.ones(3), temperature=s),
    "hypervolume_gradient": lambda s, n: pareto.hypervolume_gradient_weights(
        _equal(), jnp.zeros(3), capacity=32, mixing=s
    ),
    "hypervolume_gain": lambda s, n: pareto.hypervolume_gain_weights(_equal(), capacity=32, scale=jnp.full(3, s)),
    "saw": lambda s, n: pareto.saw_weights(_equal(), decay=s),
    "sweep": lambda s, n: sweep_weights(_equal(), s, n),
}


def candidate_rule(name: str, num_steps: int) -> Callable[[Array], pareto.WeightRule]:
    """A candidate as a rule of settings [3], all the same, the shape in which :mod:`shared_program` takes them."""
    return lambda settings: CANDIDATES[name](settings[0], num_steps)


def _equal() -> Array:
    return jnp.full(3, 1 / 3)


def check_candidates(argument: str, candidates: Iterable[str]) -> None:
    """Checks that each reads ``name:number`` with a name of ``CANDIDATES``.

    Raises:
        ValueError: one does not.
    """
    for candidate in candidates:
        name, _, setting = candidate.partition(":")
        check(_is_number(setting), argument=argument, value=candidate, rule="must read name:number")
        check(name in CANDIDATES, argument=argument, value=candidate, rule="unknown rule",
              remedy=f"Rules: {', '.join(CANDIDATES)}")  # fmt: skip


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def make_rule(name: str, weights: Array, *, rate: Any, num_steps: int) -> pareto.WeightRule:
    """A weight rule by its name.

    Args:
        name: one of ``RULES``.
        weights: [K], base or initial weights, on the simplex.
        rate: exponent scale eta / mu of the influence rule.
        num_steps: length of the run, for schedules.

    Raises:
        ValueError: unknown name, or weights off the simplex.
    """
    check(
        name in RULES, argument="weights", value=name, rule="unknown weight rule", remedy=f"Rules: {', '.join(RULES)}"
    )
    return RULES[name](pareto.fixed_weights(weights).init(), rate, num_steps)
