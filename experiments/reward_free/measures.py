"""What the studies of this family measure of an exploration, and the worlds they share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.envs import mixtures
from jaxrl_suite.envs.gymnasium_tables import gymnasium_world
from jaxrl_suite.mdp import LinearMixtureMDP
from jaxrl_suite.reward_free import (
    ExplorerConfig,
    HParams,
    advance,
    certificate,
    explore,
    finish,
    goal_value_errors,
    init_explorer,
    plan,
    reward_bank,
    search_rewards,
    suboptimality,
    value_error,
)
from jaxrl_suite.reward_free.hf import HFState, exploration_radius, pooled
from jaxrl_suite.reward_free.oracles import start_logits
from jaxrl_suite.reward_free.radius import scales
from jaxrl_suite.reward_free.regression import fit

WORLDS: dict[str, Callable[[], LinearMixtureMDP]] = {
    "lock": mixtures.lock,
    "chain": mixtures.region_chain,
    "riverswim": mixtures.riverswim,
    "frozen_lake_8x8": lambda: gymnasium_world("FrozenLake-v1", map_name="8x8", is_slippery=True).mdp,
    "random_mixture": lambda: mixtures.random_mixture(jax.random.key(7)),
    "hard": mixtures.hard_instance,
}


def measure(
    world: LinearMixtureMDP,
    config: ExplorerConfig,
    hparams: HParams,
    keys: jax.Array,
    bank: jax.Array,
    *,
    certificate_scale: float = 1.3,
) -> dict[str, np.ndarray]:
    """Explores with each key, plans for each reward of the bank, and compares with the truth.

    Args:
        world: the world.
        config: algorithm and sizes.
        hparams: traced scalars, [].
        keys: [seeds].
        bank: [R, H, S, A], rewards of the class.
        certificate_scale: multiplies the radius of the certificate.

    Returns:
        Arrays [seeds]: "uncertainty" (last episode), "loss" (worst suboptimality), "value_error" (worst), "certificate"
        (1 where there is none), "asked" (oracle calls), "finite"; and "curve" [seeds, K].
    """
    certified = config.algorithm != "rf_ucrl" and config.planner_estimator == "pooled"

    def one(key: jax.Array) -> dict[str, jax.Array]:
        found = explore(key, world, config, hparams)
        planned = plan(found, bank).actions
        sealed = (
            certificate(world, config, hparams, found, scale=certificate_scale).bound if certified else jnp.ones(())
        )
        return {
            "uncertainty": found.history.uncertainty[-1],
            "loss": jnp.max(suboptimality(world, planned, bank)),
            "value_error": jnp.max(value_error(world, found, planned, bank)),
            "certificate": sealed,
            "asked": jnp.sum(found.history.asked),
            "finite": found.finite,
            "curve": found.history.uncertainty,
        }

    found = jax.jit(jax.vmap(one))(keys)
    if not bool(jnp.all(found["finite"])):
        raise ValueError("exploration: a Cholesky factorisation failed. Remedy: run in float64 (--x64).")
    return {name: np.asarray(value) for name, value in found.items()}


def measure_path(
    world: LinearMixtureMDP,
    config: ExplorerConfig,
    keys: jax.Array,
    bank: jax.Array,
    episodes: tuple[int, ...],
) -> dict[str, np.ndarray]:
    """As :func:`measure` at several numbers of episodes of the same runs; worlds of equal shape share the compilation.

    Args:
        world: the world.
        config: with ``output="final"``.
        keys: [seeds].
        bank: [R, H, S, A].
        episodes: increasing multiples of the first.

    Returns:
        "uncertainty", "loss" and "value_error", each [len(episodes), seeds].
    """
    chunk, rows = episodes[0], []
    state = _init_seeds(world, config, keys)
    for start in range(0, episodes[-1], chunk):
        state, history = _advance_seeds(world, config, state, jnp.int32(start), chunk)
        if start + chunk in episodes:
            rows.append(_read_seeds(world, config, state, history, bank))
    names = ("uncertainty", "loss", "value_error")
    return {name: np.array([row[index] for row in rows]) for index, name in enumerate(names)}


@functools.partial(jax.jit, static_argnames="config")
def _init_seeds(world, config, keys):
    return jax.vmap(lambda key: init_explorer(key, world, config, HParams()))(keys)


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def _advance_seeds(world, config, state, start, chunk):
    return jax.vmap(lambda s: advance(world, config, HParams(), s, start, chunk))(state)


@functools.partial(jax.jit, static_argnames=("config", "certified"))
def _read_seeds(world, config, state, history, bank, *, certified=False):
    def one(state, history):
        found = finish(world, config, state, history)
        planned = plan(found, bank).actions
        losses = suboptimality(world, planned, bank)
        error = jnp.max(value_error(world, found, planned, bank))
        measures = (history.uncertainty[-1], jnp.max(losses), error)
        if not certified:
            return measures
        goals = jnp.max(goal_value_errors(world, found, config.horizon))
        sealed = certificate(world, config, HParams(), found, scale=1.3).bound
        return *measures, sealed, jnp.maximum(error, goals)

    return jax.vmap(one)(state, history)


def measure_settled(
    world: LinearMixtureMDP,
    config: ExplorerConfig,
    keys: jax.Array,
    bank: jax.Array,
    *,
    max_doublings: int,
    tolerance: float = 0.02,
) -> dict[str, np.ndarray]:
    """As :func:`measure`, with the uncertainty value of the final statistics searched for until it settles.

    The oracle's effort is doubled, each time from where it stopped, until the mean over the runs moves by less than
    ``tolerance``. A search that weakens with the size of the problem would otherwise understate the uncertainty.

    Args:
        world: the world.
        config: with ``output="final"``.
        keys: [seeds].
        bank: [R, H, S, A].
        max_doublings: most doublings.
        tolerance: relative change below which the value has settled.

    Returns:
        As :func:`measure`; "uncertainty" is the settled value, "played_uncertainty" that of the last episode, "effort"
        [doublings + 1, seeds] the value after ``ascent_steps`` times 1, 2, 4, ...; "settled" whether it settled;
        "largest_error" the largest value error over the bank and over goals at every step.
    """
    state = _init_seeds(world, config, keys)
    state, history = _advance_seeds(world, config, state, jnp.int32(0), config.num_episodes)
    names = ("uncertainty", "loss", "value_error", "certificate", "largest_error")
    read = _read_seeds(world, config, state, history, bank, certified=True)
    found = {n: np.asarray(x) for n, x in zip(names, read, strict=True)}
    found["played_uncertainty"] = found["uncertainty"]
    if not isinstance(state.inner, HFState):  # the predecessors plan for their uncertainty exactly
        return found | {"effort": found["uncertainty"][None], "settled": np.array(True)}
    inner = state.inner
    logits = inner.answer.logits
    curve, settled, steps, score = [found["uncertainty"]], False, 1, None
    starts = jax.vmap(lambda k, w: start_logits(k, w, config.num_starts))(keys, logits)
    for _ in range(max_doublings + 1):
        for _ in range(steps):
            logits, score = _search_seeds(world, config, inner.statistics, starts)
            starts = starts.at[:, 0].set(logits)  # the best stays a start, so that the value never falls
        curve.append(np.clip(np.asarray(score), 0.0, 1.0))
        settled = len(curve) > 2 and abs(curve[-1].mean() - curve[-2].mean()) <= tolerance * curve[-2].mean()
        if settled:
            break
        steps = steps if len(curve) == 2 else 2 * steps
    return found | {"uncertainty": curve[-1], "effort": np.stack(curve[1:]), "settled": np.array(settled)}


@functools.partial(jax.jit, static_argnames="config")
def _search_seeds(world, config, statistics, starts):
    def one(statistics, starts):
        sizes = scales(world, config, HParams())
        radius = exploration_radius(config, HParams(), sizes, statistics)
        inverse = fit(statistics).inverse
        hat = inverse[-1, 0] * (radius[-1] / radius[0]) ** 2
        rate = jnp.asarray(HParams().ascent_rate, hat.dtype)
        return search_rewards(
            world, pooled(statistics), inverse[0, 0], hat, radius[0], starts, rate, num_steps=config.ascent_steps
        )

    return jax.vmap(one)(statistics, starts)


def bank_of(world: LinearMixtureMDP, horizon: int, *, num_random: int = 30) -> jax.Array:
    """The rewards that a study tries its plans on."""
    return reward_bank(world, jax.random.key(11), horizon, num_random=num_random)


def mean_and_half(values: Any, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half width of a 95 % normal interval over an axis."""
    values = np.asarray(values, float)
    count = values.shape[axis]
    half = 1.96 * values.std(axis, ddof=min(1, count - 1)) / max(count, 1) ** 0.5
    return values.mean(axis), half


def ratio_interval(rows: list[np.ndarray], num_resamples: int = 4000) -> tuple[float, float]:
    """95 % percentile bootstrap over runs of the largest over the smallest mean of several rows of runs.

    Resampling adds noise, which can only part the largest from the smallest: the interval leans upwards.
    """
    generator, means = np.random.default_rng(0), []
    for row in rows:
        picks = generator.integers(0, len(row), (num_resamples, len(row)))
        means.append(np.asarray(row)[picks].mean(axis=1))
    ratios = np.max(means, axis=0) / np.maximum(np.min(means, axis=0), 1e-12)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def log_slope(x: Any, y: Any) -> float:
    """Least-squares slope of log y against log x."""
    return float(np.polyfit(np.log(np.asarray(x, float)), np.log(np.maximum(np.asarray(y, float), 1e-12)), 1)[0])


def errorbars(axes: Any, x: Any, values: np.ndarray, index: int, label: str) -> None:
    """Means over the last axis with 95 % intervals, in the style of series ``index``."""
    from jaxrl_suite.io.plots import series_style

    mean, half = mean_and_half(values)
    axes.errorbar(x, mean, yerr=half, capsize=3, label=label, **series_style(index))
