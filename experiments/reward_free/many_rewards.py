"""One exploration serves ten thousand rewards, and the Pareto front of two objectives told afterwards."""

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.reward_free.presets import PRESETS
from jaxrl_suite.config import Config, field
from jaxrl_suite.envs.mixtures import gridworld
from jaxrl_suite.pareto import hypervolume, non_dominated
from jaxrl_suite.reward_free import ExplorerConfig, explore, normalise_rewards, suboptimality
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
    explore_key, reward_key = jax.random.split(run.key)
    found = run.stage("explore", lambda: _explore(world, config, explore_key))
    model = jnp.asarray(found["model"])

    def planned() -> dict[str, np.ndarray]:
        rewards = _random_rewards(world, reward_key, config.num_rewards, config.horizon)
        planner = jax.jit(lambda r: plan_model(model, world.successors, world.start, r))
        jax.block_until_ready(planner(rewards))
        began = time.perf_counter()
        policies = jax.block_until_ready(planner(rewards))
        seconds = time.perf_counter() - began
        loss = jax.jit(lambda p, r: suboptimality(world, p, r))(policies.actions, rewards)
        return {"loss": np.asarray(loss), "seconds": np.array(seconds)}

    rewards = run.stage("rewards", planned)
    front = run.stage("front", lambda: _front(world, model, config))
    loss = rewards["loss"]
    summary: dict[str, float | int | str | bool | None] = {
        "rewards/count": int(loss.size),
        "rewards/mean_loss": float(loss.mean()),
        "rewards/largest_loss": float(loss.max()),
        "time/planning_seconds": float(rewards["seconds"]),
        "front/largest_gap": float(np.max(front["best"] - front["reached"])),
        "front/distinct_points": len(np.unique(front["explored"][:, front["explored_front"]].round(6), axis=1).T),
        "front/hypervolume": float(front["explored_volume"]),
        "front/hypervolume_of_the_exact_front": float(front["exact_volume"]),
        "explorer/uncertainty": float(found["uncertainty"][-1]),
        "explorer/finite": bool(found["finite"]),
    }
    return Result(summary, {**rewards, **front, "states": found["states"]})


def _explore(world, config: ManyRewardsConfig, key: jax.Array) -> dict[str, jax.Array]:
    settings = ExplorerConfig(horizon=config.horizon, num_episodes=config.num_episodes, output="final")
    found = jax.jit(lambda k: explore(k, world, settings))(key)
    history = found.history
    return {
        "model": found.model,
        "states": history.states,
        "uncertainty": history.uncertainty,
        "finite": found.finite,
    }


def _random_rewards(world, key, count: int, horizon: int) -> jax.Array:
    where, size = jax.random.split(key)
    shape = (count, horizon, world.num_states, world.num_actions)
    raw = jax.random.bernoulli(where, 0.02, shape) * jax.random.uniform(size, shape)
    return jax.jit(jax.vmap(lambda r: normalise_rewards(world, 50.0 * r)))(raw)


def _front(world, explored: jax.Array, config: ManyRewardsConfig) -> dict[str, np.ndarray]:
    """Values of both objectives, in truth, of plans made in the explored and in the true model; their Pareto fronts."""
    corners = (4, world.num_states - 5)  # upper right, lower left
    objectives = jnp.zeros((2, config.horizon, world.num_states, world.num_actions))
    for index, cell in enumerate(corners):
        objectives = objectives.at[index, :, cell].set(1.0 / config.horizon)
    weights = jnp.linspace(0.0, 1.0, config.num_weights)
    mixed = weights[:, None, None, None] * objectives[0] + (1 - weights)[:, None, None, None] * objectives[1]
    kernel, out = world.kernel(), {}
    for name, model in (("explored", explored), ("exact", kernel)):
        actions = plan_model(model, world.successors, world.start, mixed).actions
        out[name] = np.stack(
            [
                np.asarray(
                    policy_values(kernel, world.successors, world.start, actions, jnp.broadcast_to(r, mixed.shape))
                )
                for r in objectives
            ]
        )
        points = jnp.asarray(out[name].T)
        out[f"{name}_front"] = np.asarray(non_dominated(points))
        out[f"{name}_volume"] = np.asarray(hypervolume(points, jnp.zeros(2)))
    blend = np.stack([np.asarray(weights), 1 - np.asarray(weights)])
    out["best"], out["reached"] = ((blend * out[name]).sum(0) for name in ("exact", "explored"))
    return out


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Losses over all rewards; the front; where the explorer was."""
    from jaxrl_suite.io.plots import new_figure, series_style

    arrays = result.arrays
    figure, (left, right) = new_figure(11.0, 4.2, ncols=2)
    left.hist(np.maximum(arrays["loss"], 1e-7), bins=np.logspace(-7, 0, 60), color=series_style(0)["color"])
    left.set(xscale="log", xlabel="loss of the plan (of a total reward of 1; 1e-7 stands for none)", ylabel="rewards")
    left.set_title(f"{arrays['loss'].size} rewards, one exploration")
    for index, (name, label) in enumerate(
        (("exact", "planned in the true world"), ("explored", "planned in the explored one"))
    ):
        points = arrays[name][:, arrays[f"{name}_front"]]
        style = series_style(index) | {"linestyle": "", "markersize": 9 - 4 * index}
        right.plot(points[0], points[1], label=f"{label}, volume {float(arrays[f'{name}_volume']):.4f}", **style)
    right.set(xlabel="time in the upper right corner (fraction)", ylabel="time in the lower left corner (fraction)")
    right.set_title("The Pareto front of two objectives told afterwards")
    right.legend()
    return {"many_rewards": figure, "where_it_went": _draw_visits(arrays["states"])}


def _draw_visits(states: np.ndarray) -> "Figure":
    """Visits so far on the grid, and the path of the last episode shown, at five moments."""
    from jaxrl_suite.io.plots import new_figure, series_style

    rows, columns = len(_LAYOUT), len(_LAYOUT[0])
    walls = np.array([[cell == "#" for cell in row] for row in _LAYOUT])
    shown = np.unique(np.geomspace(1, len(states), 5).round().astype(int)) - 1
    figure, panels = new_figure(
        14.0, 3.2, ncols=len(shown), title="Exploring without a reward: visits so far, and the path of the episode"
    )
    image, noise = None, np.random.default_rng(0)
    for axes, last in zip(np.atleast_1d(panels), shown, strict=True):
        visits = np.bincount(states[: last + 1, :-1].ravel(), minlength=rows * columns).reshape(rows, columns)
        shade = np.where(walls, np.nan, np.log10(np.maximum(visits, 0.5)))
        image = axes.imshow(shade, cmap="Blues", vmin=-0.3, vmax=np.log10(states.size))
        row, column = np.divmod(states[last], columns)
        jitter = noise.uniform(-0.2, 0.2, (2, len(row)))
        axes.plot(column + jitter[0], row + jitter[1], color=series_style(1)["color"], linewidth=1.0)
        axes.text(0, 0, "S", ha="center", va="center", weight="bold")
        for wall_row, wall_column in np.argwhere(walls):
            axes.text(wall_column, wall_row, "wall", ha="center", va="center", fontsize=7)
        axes.set(xticks=[], yticks=[], title=f"episode {last + 1}", xlabel=f"{np.count_nonzero(visits)} cells seen")
        axes.grid(False)
    bar = figure.colorbar(cast(Any, image), ax=list(np.atleast_1d(panels)))
    bar.set_label("visits (log10)")
    return figure


STUDY = Study(
    name="many_rewards",
    summary="Explores a windy grid once, then plans for ten thousand rewards in one call and for the Pareto front of "
    "two objectives.",
    config=ManyRewardsConfig,
    run=run,
    figures=figures,
    presets=PRESETS["many_rewards"],
    headline=("rewards/count", "rewards/largest_loss", "time/planning_seconds", "front/hypervolume"),
    x64=True,
)
