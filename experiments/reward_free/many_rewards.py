"""One exploration serves ten thousand rewards, and the Pareto front of two objectives told afterwards."""

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.reward_free.presets import PRESETS
from jaxrl_suite.config import Config, field
from jaxrl_suite.envs.mixtures import gridworld
from jaxrl_suite.reward_free import ExplorerConfig, explore, normalise_rewards, plan, suboptimality
from jaxrl_suite.reward_free.planning import plan_model, policy_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_LAYOUT = ("S....", ".#.#.", ".....", ".#...")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyRewardsConfig(Config):
    """A windy grid of 4 x 5 cells, explored once."""

    horizon: int = field(16, help="steps an episode H")
    num_episodes: int = field(150, help="episodes of exploration K")
    num_rewards: int = field(10_000, help="rewards planned for afterwards")
    num_weights: int = field(101, help="weights between the two objectives")


def run(run: "Run") -> Result:
    """Explores, then plans for random rewards and for every trade-off between two objectives."""
    config = cast(ManyRewardsConfig, run.config)
    world = gridworld(_LAYOUT)
    settings = ExplorerConfig(horizon=config.horizon, num_episodes=config.num_episodes, output="final")
    explore_key, reward_key = jax.random.split(run.key)
    found = jax.jit(lambda k: explore(k, world, settings))(explore_key)

    def planned() -> dict[str, np.ndarray]:
        rewards = _random_rewards(world, reward_key, config.num_rewards, config.horizon)
        planner = jax.jit(lambda r: plan(found, r))
        jax.block_until_ready(planner(rewards))
        began = time.perf_counter()
        policies = jax.block_until_ready(planner(rewards))
        seconds = time.perf_counter() - began
        loss = jax.jit(lambda p, r: suboptimality(world, p, r))(policies.actions, rewards)
        return {"loss": np.asarray(loss), "seconds": np.array(seconds)}

    rewards = run.stage("rewards", planned)
    front = run.stage("front", lambda: _front(world, found, config))
    loss = rewards["loss"]
    summary: dict[str, float | int | str | bool | None] = {
        "rewards/count": int(loss.size),
        "rewards/mean_loss": float(loss.mean()),
        "rewards/largest_loss": float(loss.max()),
        "time/planning_seconds": float(rewards["seconds"]),
        "front/largest_gap": float(np.max(front["best"] - front["reached"])),
        "explorer/uncertainty": float(found.history.uncertainty[-1]),
        "explorer/finite": bool(found.finite),
    }
    states = np.asarray(found.history.states)
    visits = np.bincount(states[:, :-1].ravel(), minlength=world.num_states)
    return Result(summary, {**rewards, **front, "visits": visits})


def _random_rewards(world, key, count: int, horizon: int) -> jax.Array:
    where, size = jax.random.split(key)
    shape = (count, horizon, world.num_states, world.num_actions)
    raw = jax.random.bernoulli(where, 0.02, shape) * jax.random.uniform(size, shape)
    return jax.jit(jax.vmap(lambda r: normalise_rewards(world, 50.0 * r)))(raw)


def _front(world, found, config: ManyRewardsConfig) -> dict[str, np.ndarray]:
    """Values of both objectives, in truth, of plans made in the explored and in the true model."""
    corners = (4, world.num_states - 5)  # upper right, lower left
    objectives = jnp.zeros((2, config.horizon, world.num_states, world.num_actions))
    for index, cell in enumerate(corners):
        objectives = objectives.at[index, :, cell].set(1.0 / config.horizon)
    weights = jnp.linspace(0.0, 1.0, config.num_weights)
    mixed = weights[:, None, None, None] * objectives[0] + (1 - weights)[:, None, None, None] * objectives[1]
    kernel, out = world.kernel(), {}
    for name, model in (("explored", found.model), ("exact", kernel)):
        actions = plan_model(model, world.successors, world.start, mixed).actions
        out[name] = np.stack(
            [
                np.asarray(
                    policy_values(kernel, world.successors, world.start, actions, jnp.broadcast_to(r, mixed.shape))
                )
                for r in objectives
            ]
        )
    blend = np.stack([np.asarray(weights), 1 - np.asarray(weights)])
    out["best"], out["reached"] = ((blend * out[name]).sum(0) for name in ("exact", "explored"))
    return out


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Losses over all rewards; the front; where the explorer was."""
    from jaxrl_suite.io.plots import heatmap, new_figure, series_style

    arrays = result.arrays
    figure, (left, middle, right) = new_figure(14.0, 4.2, ncols=3)
    left.hist(np.maximum(arrays["loss"], 1e-7), bins=np.logspace(-7, 0, 60), color=series_style(0)["color"])
    left.set(xscale="log", xlabel="loss of the plan (of a total reward of 1)", ylabel="rewards")
    left.set_title(f"{arrays['loss'].size} rewards, one exploration")
    for index, (name, label) in enumerate(
        (("exact", "planned in the true world"), ("explored", "planned in the explored one"))
    ):
        middle.plot(arrays[name][0], arrays[name][1], label=label, **(series_style(index) | {"linestyle": ""}))
    middle.set(xlabel="time in the upper right corner (fraction)", ylabel="time in the lower left corner (fraction)")
    middle.set_title("Two objectives told afterwards")
    middle.legend()
    grid = arrays["visits"].reshape(len(_LAYOUT), -1).astype(float)
    grid[np.array([[cell == "#" for cell in row] for row in _LAYOUT])] = np.nan
    heatmap(figure, right, grid, xlabel="column", ylabel="row", colour_label="visits", title="Where the explorer was")
    return {"many_rewards": figure}


STUDY = Study(
    name="many_rewards",
    summary="Explores a windy grid once, then plans for ten thousand rewards in one call and for the Pareto front of "
    "two objectives.",
    config=ManyRewardsConfig,
    run=run,
    figures=figures,
    presets=PRESETS["many_rewards"],
    headline=("rewards/count", "rewards/largest_loss", "time/planning_seconds", "front/largest_gap"),
    x64=True,
    extras={"matplotlib": "experiments"},
)
