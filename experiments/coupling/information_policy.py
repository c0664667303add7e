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
from jaxrl_suite.coupling.games import enumerate_game
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.horizon <= 7, argument="horizon", value=self.horizon, rule="must be in 1..7")
        check(self.num_messages > 1, argument="num_messages", value=self.num_messages, rule="must be at least 2")
        check(self.num_steps > 0, argument="num_steps", value=self.num_steps, rule="must be positive")
        fits = len(self.temperatures) > 0 and len(self.weights) > 0
        check(fits, argument="weights", value=self.weights, rule="weights and temperatures must not be empty")


def run(run: "Run") -> Result:
    """Both families of policies on one world, evaluated exactly."""
    config = cast(InformationPolicyConfig, run.config)
    arrays = run.stage("train", lambda: _train(config))
    gain, at = _gain(arrays)
    summary: dict[str, float | int | str | bool | None] = {
        "policy/largest_gain_at_equal_reward_bits": gain,
        "policy/reward_there": at,
        "trained/best_information_bits": float(arrays["trained"][:, 1].max()),
        "surrogate/best_information_bits": float(arrays["surrogate"][:, 1].max()),
        "trained/best_accuracy": float(arrays["trained"][:, 0].max()),
    }
    return Result(summary, arrays)


def _gain(arrays: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Largest gain in information over the surrogate's curve at the reward of a trained policy, and that reward."""
    order = np.argsort(arrays["surrogate"][:, 2])
    rewards, information = arrays["surrogate"][order, 2], arrays["surrogate"][order, 1]
    # A colder surrogate with as much information is a better one: the curve is what can be had at this reward or more.
    information = np.maximum.accumulate(information[::-1])[::-1]
    inside = arrays["trained"][:, 2] <= rewards[-1]
    gains = np.where(
        inside, arrays["trained"][:, 1] - np.interp(arrays["trained"][:, 2], rewards, information), -np.inf
    )
    best = int(np.argmax(gains))
    return float(gains[best]), float(arrays["trained"][best, 2])


def _train(config: InformationPolicyConfig) -> dict[str, np.ndarray]:
    grid = rate_grid(RateGridConfig(layout=config.layout, noise=0.0, horizon=config.horizon))
    successors = grid.mdp.successors[:, :, 0]  # type: ignore[index]  # the builder always stores lists
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

    temperatures = jnp.asarray(config.temperatures)
    plan = jax.vmap(lambda temperature: soft_policy(grid, temperature, horizon=config.horizon))
    logits = jnp.log(jnp.maximum(plan(temperatures), 1e-6))
    middle = logits[len(config.temperatures) // 2]
    # The surrogates are the first entries of training without steps: one compiled function serves both.
    weights = jnp.asarray(config.weights)
    starts = jnp.concatenate([logits, jnp.broadcast_to(middle, (weights.shape[0], *middle.shape))])
    best, history = jax.jit(lambda x, w: jax.lax.map(lambda pair: climb(*pair), (x, w)))(
        starts, jnp.concatenate([jnp.zeros_like(temperatures), weights])
    )
    count = len(config.temperatures)
    return {
        "surrogate": np.asarray(history[:count, 0]),  # accuracy, information, reward, success
        "trained": np.asarray(best[count:]),
        "history": np.asarray(history[count:]),
        "temperatures": np.array(config.temperatures),
        "weights": np.array(config.weights),
    }


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Information against reward of both families, and the training curves."""
    from jaxrl_suite.io.plots import new_figure, series_style

    arrays = result.arrays
    figure, (left, right) = new_figure(11.0, 4.4, ncols=2)
    left.plot(arrays["surrogate"][:, 2], arrays["surrogate"][:, 1], label="reward + beta entropy", **series_style(0))
    order = np.argsort(arrays["trained"][:, 2])
    label = "reward + lambda information, through the coupling"
    left.plot(arrays["trained"][order, 2], arrays["trained"][order, 1], label=label, **series_style(1))
    left.set(xlabel="mean reward of an episode", ylabel="information about the message (bits)")
    left.set_title("What a policy says at what it earns", fontsize=11)
    left.legend(fontsize=9, loc="lower left")
    for row, weight in enumerate(arrays["weights"]):
        style = {**series_style(row), "marker": None}
        right.plot(arrays["history"][row, :, 1], label=f"lambda = {weight:g}", **style)
    right.set(xlabel="training step", ylabel="information about the message (bits)")
    right.set_title("Training through the coupling", fontsize=11)
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
    extras={"matplotlib": "experiments"},
)
