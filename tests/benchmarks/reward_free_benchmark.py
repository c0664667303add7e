"""Speed of the explorer and the planner against NumPy doing the same work.

Run: python -m tests.benchmarks.reward_free_benchmark [explorer] [scaling] [planner] [lazy]

Prints one JSON line a measurement: medians of runs, compilation apart, quality beside speed.
"""

import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.envs.mixtures import lock
from jaxrl_suite.reward_free import ExplorerConfig, explore, normalise_rewards, plan
from jaxrl_suite.reward_free.planning import policy_values
from tests.reference import mdp_planning
from tests.reference import reward_free_explorer as oracle

HORIZON, EPISODES = 32, 10


def timed(function, repeats=5):
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return float(np.median(times)), result


def ours(world, seeds, horizon, **changes):
    """Milliseconds a seed and episode, and seconds to compile."""
    config = ExplorerConfig(horizon=horizon, num_episodes=EPISODES, **changes)
    keys = jax.random.split(jax.random.key(0), seeds)
    began = time.perf_counter()
    compiled = jax.jit(jax.vmap(lambda k: explore(k, world, config))).lower(keys).compile()
    compile_seconds = time.perf_counter() - began
    seconds, found = timed(lambda: compiled(keys))
    return 1e3 * seconds / (seeds * EPISODES), compile_seconds, float(found.history.uncertainty[:, -1].mean())


def numpy_explorer(world, episodes=4):
    plain = oracle.World(world.features, world.successors, world.theta, world.nominal, world.start)
    d, generator = world.dimension, np.random.default_rng(0)
    run = oracle.Explorer(
        plain, HORIZON, 4, float(d / world.norm_bound**2), HORIZON**-0.5, d**-0.25, 0.15 * d**0.5, steps=10
    )
    times = []
    for _ in range(episodes):
        starts = np.full((3, HORIZON, *plain.shape), -8.0)
        for start in starts:
            start[generator.integers(1, HORIZON), generator.random(plain.shape[0]) < 0.5] = 4.0
        uniforms = generator.random(HORIZON)
        began = time.perf_counter()
        run.episode(starts, uniforms)
        times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times))


def explorer():
    world = lock(12, 2, 4)
    milliseconds, compile_seconds, uncertainty = ours(world, 64, HORIZON)
    peer = numpy_explorer(world)
    report(
        "explorer, 64 seeds, S=12 A=2 H=32 D=5 M=4, 4 starts x 10 steps",
        ours_ms=milliseconds,
        numpy_ms=peer,
        ratio=peer / milliseconds,
        compile_seconds=compile_seconds,
        uncertainty=uncertainty,
    )


def scaling():
    for horizon in (32, 128):
        milliseconds, _, _ = ours(lock(12, 2, 4), 16, horizon)
        report("cost an episode against H", horizon=horizon, ours_ms=milliseconds, ms_a_step=milliseconds / horizon)
    for states in (12, 48):
        milliseconds, _, _ = ours(lock(states, 2, 4), 16, HORIZON)
        report(
            "cost an episode against S A", pairs=2 * states, ours_ms=milliseconds, ms_a_pair=milliseconds / 2 / states
        )


def planner():
    world, horizon, count = lock(8, 3, 4), 16, 10_000
    found = jax.jit(lambda k: explore(k, world, ExplorerConfig(horizon=horizon, num_episodes=EPISODES)))(
        jax.random.key(0)
    )
    rewards = jax.random.uniform(jax.random.key(1), (count, horizon, 8, 3)) / horizon
    rewards = jax.jit(jax.vmap(lambda r: normalise_rewards(world, r)))(rewards)
    function = jax.jit(lambda r: plan(found, r))
    began = time.perf_counter()
    planned = jax.block_until_ready(function(rewards))
    first = time.perf_counter() - began
    seconds, planned = timed(lambda: function(rewards))
    kernel = np.zeros((8, 3, 8))
    for s, a, j in np.ndindex(*world.successors.shape):
        kernel[s, a, world.successors[s, a, j]] += found.model[s, a, j]
    some = np.array(rewards[:100])

    def vectorised_loop():
        """One reward after the other, each step vectorised over states and actions."""
        values = []
        for reward in some:
            value, policy = np.zeros(8), np.zeros((horizon, 8), np.int32)
            for h in range(horizon - 1, -1, -1):
                scores = reward[h] + kernel @ value
                policy[h] = scores.argmax(1)
                value = np.clip(scores.max(1), 0.0, 1.0)
            values.append(value[0])
        return np.array(values)

    slow, values = timed(vectorised_loop, 3)
    slow = slow / len(some) * count
    began = time.perf_counter()
    mdp_planning.best_finite_policy(kernel, some[0])
    plain = (time.perf_counter() - began) * count
    report(
        "planning 10,000 rewards, S=8 A=3 H=16",
        ours_seconds=seconds,
        first_call_seconds=first,
        numpy_vectorised_loop_seconds=slow,
        ratio=slow / seconds,
        plain_loop_ratio=plain / seconds,
        largest_difference=float(np.max(np.abs(values - np.array(planned.values[:100])))),
    )


def lazy():
    world = lock(8, 3, 4)
    config = ExplorerConfig(horizon=16, num_episodes=150, output="final")
    bank = jnp.eye(8)[:, None, :, None] * jnp.zeros((8, 16, 8, 3)).at[:, -1].set(1.0)
    kernel = world.kernel()
    for is_lazy in (False, True):
        settings = config.replace(lazy=is_lazy)
        run = jax.jit(lambda k, s=settings: explore(k, world, s))
        jax.block_until_ready(run(jax.random.key(0)))
        errors, times, calls = [], [], []
        for seed in range(8):
            seconds, found = timed(functools.partial(run, jax.random.key(seed)), 1)
            actions = plan(found, bank).actions
            claimed, true = (
                policy_values(model, world.successors, world.start, actions, bank) for model in (found.model, kernel)
            )
            errors.append(float(jnp.max(jnp.abs(claimed - true))))
            times.append(seconds)
            calls.append(int(found.history.asked.sum()))
        report(
            "lazy switching" if is_lazy else "oracle every episode",
            value_error=float(np.mean(errors)),
            seconds=float(np.median(times)),
            oracle_calls=float(np.mean(calls)),
        )


def report(name, **values):
    print(json.dumps({"what": name, **{k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}}))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    parts = {"explorer": explorer, "scaling": scaling, "planner": planner, "lazy": lazy}
    for name in sys.argv[1:] or parts:
        parts[name]()
