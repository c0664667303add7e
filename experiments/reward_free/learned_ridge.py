"""What the derivative of the regression buys: a ridge and feature scales learnt by descending the held-out error."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.study import Result, Study
from experiments.reward_free.measures import mean_and_half
from experiments.reward_free.presets import PRESETS
from jaxrl_suite.config import Config, field
from jaxrl_suite.envs.mixtures import region_chain
from jaxrl_suite.mdp import integrated_features, simulate
from jaxrl_suite.reward_free import weighted_ridge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedRidgeConfig(Config):
    """The chain, D = 5; one regression on few episodes of uniform play."""

    num_episodes: int = field(4, help="episodes of data")
    horizon: int = field(16, help="steps an episode")
    num_runs: int = field(128, help="independent data sets")
    num_steps: int = field(150, help="steps of descent")
    num_grid: int = field(41, help="ridges of the grid search")


def run(run: "Run") -> Result:
    """Descends the held-out error in one ridge, and in a scale for each feature, against a grid of ridges."""
    config = cast(LearnedRidgeConfig, run.config)
    keys = jax.random.split(run.key, config.num_runs)
    found = run.stage("descend", lambda: jax.jit(jax.vmap(lambda k: _one(k, config)))(keys))
    grid, ridge, scales = found["grid_error"].min(1), found["ridge_error"], found["scale_error"]
    summary: dict[str, float | int | str | bool | None] = {
        "test/prior_error": float(found["prior_error"].mean()),
        "test/grid_error": float(found["grid_test"].mean()),
        "test/learnt_ridge_error": float(found["ridge_test"].mean()),
        "test/learnt_scales_error": float(found["scale_test"].mean()),
        "held_out/grid_error": float(grid.mean()),
        "held_out/learnt_ridge_error": float(ridge[:, -1].mean()),
        "held_out/learnt_scales_error": float(scales[:, -1].mean()),
        "held_out/grid_evaluations": int(config.num_grid),
    }
    for name in ("ridge", "scale"):  # data set by data set: their spread is far above what is gained
        gain, half = mean_and_half(found["grid_test"] - found[f"{name}_test"])
        summary[f"test/gain_of_learnt_{name}"] = float(gain)
        summary[f"test/gain_of_learnt_{name}_interval"] = float(half)
    return Result(summary, dict(found))


def _one(key: jax.Array, config: LearnedRidgeConfig) -> dict[str, jax.Array]:
    world = region_chain(stall=(0.05, 0.2, 0.5, 0.9))
    play_key, function_key = jax.random.split(key)
    functions = jax.random.uniform(function_key, (3, config.num_episodes, world.num_states))
    train, held_out, test = (
        _data(k, f, world, config) for k, f in zip(jax.random.split(play_key, 3), functions, strict=True)
    )
    nominal, dimension = world.nominal, world.dimension

    def theta(log_ridge: jax.Array, log_scales: jax.Array) -> jax.Array:
        scale = jnp.exp(log_scales)
        x, y = train
        ones = jnp.ones(len(y), y.dtype)
        return scale * weighted_ridge(x * scale, y, ones, jnp.exp(log_ridge), nominal / scale)

    def error(data: tuple[jax.Array, jax.Array], log_ridge: jax.Array, log_scales: jax.Array) -> jax.Array:
        x, y = data
        return jnp.mean((x @ theta(log_ridge, log_scales) - y) ** 2)

    def truth(value: jax.Array) -> jax.Array:  # what prediction of the mean is worth, noise taken out
        x, _ = test
        return jnp.sqrt(jnp.mean((x @ (value - world.theta)) ** 2))

    zero = jnp.zeros(dimension)
    grid = jnp.linspace(-7.0, 5.0, config.num_grid)
    grid_error = jax.vmap(lambda r: error(held_out, r, zero))(grid)
    ridge, ridge_curve = _descend(lambda r: error(held_out, r, zero), jnp.array(0.0), config.num_steps)
    start = (jnp.array(0.0), zero)
    both, scale_curve = _descend(lambda p: error(held_out, *p), start, config.num_steps)
    return {
        "grid": grid,
        "grid_error": grid_error,
        "ridge_error": ridge_curve,
        "scale_error": scale_curve,
        "prior_error": truth(nominal),
        "grid_test": truth(theta(grid[jnp.argmin(grid_error)], zero)),
        "ridge_test": truth(theta(ridge, zero)),
        "scale_test": truth(theta(*both)),
    }


def _data(key: jax.Array, functions: jax.Array, world, config: LearnedRidgeConfig) -> tuple[jax.Array, jax.Array]:
    """Features and targets [K H] of uniform play with one function an episode."""

    def episode(key: jax.Array, function: jax.Array) -> tuple[jax.Array, jax.Array]:
        policy_key, play_key = jax.random.split(key)
        policy = jax.random.randint(policy_key, (config.horizon, world.num_states), 0, world.num_actions)
        states, actions = simulate(world, play_key, policy)
        return integrated_features(world, function)[states[:-1], actions], function[states[1:]]

    x, y = jax.vmap(episode)(jax.random.split(key, config.num_episodes), functions)
    return x.reshape(-1, world.dimension), y.reshape(-1)


def _descend(value, point, num_steps: int):
    """Adam; the last point and the curve of values."""
    optimiser = optax.adam(0.1)

    def step(carry, _):
        point, state = carry
        loss, gradient = jax.value_and_grad(value)(point)
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(point, updates), state), loss

    (point, _), curve = jax.lax.scan(step, (point, optimiser.init(point)), None, length=num_steps)
    return point, curve


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Held-out error along the descents against the grid."""
    from jaxrl_suite.io.plots import new_figure, series_style

    arrays = result.arrays
    figure, (left, middle, right) = new_figure(15.0, 4.2, ncols=3)
    best = arrays["grid_error"].min(1).mean()
    left.plot(np.exp(arrays["grid"][0]), arrays["grid_error"].mean(0), label="one ridge for all", **series_style(0))
    line = series_style(0) | {"marker": "", "linestyle": ":"}
    left.axhline(best, label="each data set its own best ridge", **line)
    left.set(xscale="log", xlabel="ridge", ylabel="held-out squared error", title="By grid")
    left.legend(fontsize=9)
    for index, (key, label) in enumerate(
        (("ridge_error", "one ridge"), ("scale_error", "ridge and a scale a feature"))
    ):
        style = series_style(index + 1) | {"marker": ""}
        middle.plot(arrays[key].mean(0), label=f"descent: {label}", **style)
    middle.axhline(best, label="best of the grid, data set by data set", **line)
    middle.set(xlabel="step of descent", ylabel="held-out squared error")
    middle.set_title("Through the derivative of the regression")
    middle.legend(fontsize=9)
    bars = [mean_and_half(arrays[key]) for key in ("prior_error", "grid_test", "ridge_test", "scale_test")]
    right.bar(
        ["believed before", "grid", "learnt\nridge", "learnt\nscales"],
        [float(mean) for mean, _ in bars],
        yerr=[float(half) for _, half in bars],
        color=[series_style(index)["color"] for index in (5, 0, 1, 2)],
    )
    right.set(ylabel="root mean square error of P f", title="On data that neither has seen")
    return {"learned_ridge": figure}


STUDY = Study(
    name="learned_ridge",
    summary="Learns the ridge and a scale for each feature by descending the held-out error through weighted_ridge, "
    "against a grid search.",
    config=LearnedRidgeConfig,
    run=run,
    figures=figures,
    presets=PRESETS["learned_ridge"],
    headline=("test/grid_error", "test/learnt_ridge_error", "test/learnt_scales_error"),
    x64=True,
)
