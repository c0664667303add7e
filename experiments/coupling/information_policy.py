"""A policy trained through the coupling itself, against the entropy surrogate: information at equal reward.

The paper buys room for the message with entropy of the policy: reward + beta H(A | S). But what counts is information
about the message, and the coupling is differentiable: here the policy climbs

    E[reward] + lambda I(M; Z)

by its exact gradient, through every coupling and belief of all trajectories Z.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.coupling.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.coupling.exact_games import enumerate_game
from jaxrl_suite.envs.rate_grid import RateGridConfig, rate_grid, soft_policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class InformationPolicyConfig(Config):
    """World, messages, and training."""

    layout: tuple[str, ...] = field(("S..", "...", "..G"), help="grid without noise: . # S G T")
    horizon: int = field(5, help="steps")
    num_messages: int = field(16, help="messages, uniform")
    temperatures: tuple[float, ...] = field((0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4), help="of the surrogate's policies")
    weights: tuple[float, ...] = field((0.01, 0.03, 0.1, 0.2, 0.3, 0.5), help="lambda, reward a bit")
    num_steps: int = field(300, help="steps of Adam")
    step_size: float = field(0.05, help="of Adam")
    start_noise: float = field(0.3, help="spread of the logits at the start, around the middle temperature's policy")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.horizon <= 7, argument="horizon", value=self.horizon, rule="must be in 1..7")
        check(self.num_messages > 1, argument="num_messages", value=self.num_messages, rule="must be at least 2")
        check(self.start_noise >= 0, argument="start_noise", value=self.start_noise, rule="must not be negative")
        check(self.num_steps > 0, argument="num_steps", value=self.num_steps, rule="must be positive")
        fits = len(self.temperatures) > 0 and len(self.weights) > 0
        check(fits, argument="weights", value=self.weights, rule="weights and temperatures must not be empty")


def run(run: "Run") -> Result:
    """Both families of policies on one world, evaluated exactly; every seed trains from another start."""
    config = cast(InformationPolicyConfig, run.config)
    arrays = run.stage("train", lambda: _train(config, run.keys))
    gains = [_gain(arrays["surrogate"], trained) for trained in arrays["trained"]]
    summary: dict[str, float | int | str | bool | None] = {
        "policy/largest_gain_at_equal_reward_bits": float(np.mean([gain for gain, _ in gains])),
        "policy/smallest_gain_of_a_seed_bits": min(gain for gain, _ in gains),
        "policy/reward_there": float(np.mean([reward for _, reward in gains])),
        "policy/num_seeds": len(gains),
        "trained/best_information_bits": float(arrays["trained"][..., 1].max()),
        "surrogate/best_information_bits": float(arrays["surrogate"][:, 1].max()),
        "trained/best_accuracy": float(arrays["trained"][..., 0].max()),
    }
    return Result(summary, arrays)


def _gain(surrogate: np.ndarray, trained: np.ndarray) -> tuple[float, float]:
    """Largest gain in information over the surrogate's curve at the reward of a trained policy, and that reward."""
    order = np.argsort(surrogate[:, 2])
    rewards, information = surrogate[order, 2], surrogate[order, 1]
    # A colder surrogate with as much information is a better one: the curve is what can be had at this reward or more.
    information = np.maximum.accumulate(information[::-1])[::-1]
    inside = trained[:, 2] <= rewards[-1]
    gains = np.where(inside, trained[:, 1] - np.interp(trained[:, 2], rewards, information), -np.inf)
    best = int(np.argmax(gains))
    return float(gains[best]), float(trained[best, 2])


def _train(config: InformationPolicyConfig, keys: jax.Array) -> dict[str, np.ndarray]:
    grid = rate_grid(RateGridConfig(layout=config.layout, noise=0.0, horizon=config.horizon))
    successors = grid.successors[:, :, 0]
    world = (successors, grid.entry_reward, grid.terminal, grid.start, config.num_messages, None)

    def value(logits, weight):
        exact = enumerate_game(jax.nn.softmax(logits, axis=-1), *world)
        return exact.mean_reward + weight * exact.information, jnp.stack(exact)

    def climb(logits, weight):
        def step(carry, time):
            logits, first, second, best = carry
            (total, exact), slope = jax.value_and_grad(value, has_aux=True)(logits, weight)
            first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
            scale = jnp.sqrt(second / (1 - 0.99 ** (time + 1))) + 1e-8
            # Couplings jump at ties, so the best policy on the way is kept.
            best = jax.tree.map(lambda new, old: jnp.where(total > best[0], new, old), (total, exact), best)
            logits = logits + config.step_size * first / (1 - 0.9 ** (time + 1)) / scale
            return (logits, first, second, best), exact

        zero = jnp.zeros_like(logits)
        start = (logits, zero, zero, (jnp.full((), -jnp.inf, logits.dtype), jnp.zeros((4,), logits.dtype)))
        (_, _, _, best), history = jax.lax.scan(step, start, jnp.arange(config.num_steps, dtype=logits.dtype))
        return best[1], history

    temperatures, weights = jnp.asarray(config.temperatures), jnp.asarray(config.weights)
    plan = jax.vmap(lambda temperature: soft_policy(grid, temperature, horizon=config.horizon))
    logits = jnp.log(jnp.maximum(plan(temperatures), 1e-6))
    middle = logits[len(config.temperatures) // 2]
    noise = jax.vmap(lambda key: jax.random.normal(key, middle.shape, middle.dtype))(keys)
    starts = middle + config.start_noise * noise
    surrogate = jax.jit(lambda x: jax.lax.map(lambda logits: value(logits, 0.0)[1], x))(logits)
    pairs = [jnp.repeat(starts, len(config.weights), axis=0), jnp.tile(weights, len(keys))]
    best, history = jax.jit(lambda x, w: jax.lax.map(lambda pair: climb(*pair), (x, w)))(*pairs)
    shape = (len(keys), len(config.weights))
    return {
        "surrogate": np.asarray(surrogate),  # accuracy, information, reward, success
        "trained": np.asarray(best).reshape(*shape, 4),
        "history": np.asarray(history).reshape(*shape, config.num_steps, 4),
        "temperatures": np.array(config.temperatures),
        "weights": np.array(config.weights),
    }


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Information against reward of both families, and the training curves."""
    from jaxrl_suite.io.plots import new_figure, series_style

    arrays = result.arrays
    figure, (left, right) = new_figure(11.0, 4.4, ncols=2)
    left.plot(arrays["surrogate"][:, 2], arrays["surrogate"][:, 1], label="reward + beta entropy", **series_style(0))
    label = "reward + lambda information, through the coupling"
    for seed, trained in enumerate(arrays["trained"]):
        order = np.argsort(trained[:, 2])
        style = series_style(1) if seed == 0 else {**series_style(1), "alpha": 0.35}
        left.plot(trained[order, 2], trained[order, 1], label=label if seed == 0 else None, **style)
    left.set(xlabel="mean reward of an episode", ylabel="information about the message (bits)")
    left.set_title("What a policy says at what it earns", fontsize=11)
    left.legend(fontsize=9, loc="lower left")
    for row, weight in enumerate(arrays["weights"]):
        style = {**series_style(row), "marker": None}
        right.plot(arrays["history"][0, row, :, 1], label=f"lambda = {weight:g}", **style)
    right.set(xlabel="training step", ylabel="information about the message (bits)")
    right.set_title("Training through the coupling, first seed", fontsize=11)
    right.legend(fontsize=9, loc="lower right")
    return {"information": figure}


STUDY = Study(
    name="information_policy",
    summary="A policy trained by the exact gradient of what it says, against the entropy surrogate, at equal reward.",
    config=InformationPolicyConfig,
    run=run,
    figures=figures,
    presets=PRESETS["information_policy"],
    headline=("policy/largest_gain_at_equal_reward_bits", "policy/reward_there"),
)
