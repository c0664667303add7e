"""FrozenLake without a goal: explore, learn how the ice slips, and only then be told what to reach."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.reward_free.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.envs.gymnasium_tables import GymnasiumWorld, gymnasium_world, play
from jaxrl_suite.reward_free import ExplorerConfig, explore, plan, suboptimality
from jaxrl_suite.reward_free.planning import plan_model, policy_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenLakeConfig(Config):
    """Which lakes, how long they are explored, how often the plan is played."""

    maps: tuple[str, ...] = field(("4x4", "8x8"), help="gymnasium's map names")
    num_episodes: int = field(60, help="episodes of exploration without reward")
    ascent_steps: int = field(10, help="ascent steps of the explorer's oracle an episode")
    play_episodes: int = field(2000, help="episodes played in gymnasium with the plan")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("4x4", "8x8")
        check(set(self.maps) <= set(known) and self.maps != (), argument="maps", value=self.maps, rule=f"from {known}")
        check(self.play_episodes > 1, argument="play_episodes", value=self.play_episodes, rule="must be at least 2")


def run(run: "Run") -> Result:
    """Explores each lake, plans for the reward given afterwards, and plays the plan in gymnasium."""
    config = cast(FrozenLakeConfig, run.config)
    arrays: dict[str, np.ndarray] = {}
    summary: dict[str, float | int | str | bool | None] = {}
    for index, name in enumerate(run.progress(config.maps, "lakes")):
        world = gymnasium_world("FrozenLake-v1", map_name=name, is_slippery=True)
        explored = run.stage(f"explore_{name}", lambda w=world: _explore(run, config, w))
        for episode, value in enumerate(explored["uncertainty"].T):
            run.log(index * config.num_episodes + episode, {f"explore_{name}/uncertainty": value})
        played = run.stage(f"play_{name}", lambda w=world, e=explored: _play(config, w, e))
        arrays |= {f"{name}/{key}": value for key, value in (explored | played).items()}
        low, high = played["interval"]
        summary |= {
            f"{name}/optimum_success": float(played["optimum"]),
            f"{name}/played_success": float(played["mean"]),
            f"{name}/played_low": float(low),
            f"{name}/played_high": float(high),
            f"{name}/plan_success": float(played["optimum"] - explored["gap"][0]),
            f"{name}/plan_gap_mean": float(np.mean(explored["gap"])),
            f"{name}/shortest_path_success": float(played["prior"]),
            f"{name}/theta_error": float(np.mean(np.abs(explored["theta"] - explored["truth"]).max(-1))),
            f"{name}/optimum_in_interval": bool(low <= played["optimum"] <= high),
        }
    return Result(summary, arrays)


def _explore(run: "Run", config: FrozenLakeConfig, world: GymnasiumWorld) -> dict[str, Any]:
    settings = ExplorerConfig(
        horizon=world.horizon, num_episodes=config.num_episodes, ascent_steps=config.ascent_steps, output="final"
    )
    rewards = jnp.asarray(world.rewards)[None]

    def one(key: jax.Array) -> dict[str, jax.Array]:
        exploration = explore(key, world.mdp, settings)
        policies = plan(exploration, rewards)  # the reward is known only from here on
        return {
            "states": exploration.history.states,
            "uncertainty": exploration.history.uncertainty,
            "error": exploration.history.parameter_error[:, 0, 0],
            "theta": exploration.estimate.theta / jnp.sum(world.mdp.theta),
            "policy": policies.actions[0],
            "gap": suboptimality(world.mdp, policies.actions, rewards)[0],
            "finite": exploration.finite,
        }

    found = jax.jit(jax.vmap(one))(run.keys)
    if not bool(jnp.all(found["finite"])):
        raise ValueError("exploration: a Cholesky factorisation failed. Remedy: run with --x64.")
    return {**found, "truth": world.mdp.theta / jnp.sum(world.mdp.theta)}


def _play(config: FrozenLakeConfig, world: GymnasiumWorld, explored: Mapping[str, np.ndarray]) -> dict[str, Any]:
    returns = play(world, explored["policy"][0], config.play_episodes, seed=0)
    low, high = _wilson(returns.sum(), len(returns))
    mdp, rewards = world.mdp, jnp.asarray(world.rewards)[None]
    best = plan_model(mdp.kernel(), mdp.successors, mdp.start, rewards).values[0]
    # Without slip every plan that arrives in time is as good, so the naive walker is told to hurry: paid at every step.
    hurried = jnp.broadcast_to(rewards[:, -1:], rewards.shape) / rewards.shape[1]
    naive = plan_model(mdp.kernel(mdp.nominal), mdp.successors, mdp.start, hurried).actions
    prior = policy_values(mdp.kernel(), mdp.successors, mdp.start, naive, rewards)[0]
    return {
        "mean": returns.mean(),
        "interval": np.array([low, high]),
        "optimum": world.to_units(best),
        "prior": world.to_units(prior),
    }


def _wilson(successes: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate."""
    rate = successes / count
    center = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return float(center - half), float(center + half)


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Where the explorer went; what it learnt; how the plan did."""
    maps = [key.split("/")[0] for key in result.arrays if key.endswith("/states")]
    return {
        **{f"where_it_went_{name}": _draw_visits(result.arrays, name) for name in maps},
        "what_it_learnt": _draw_learning(result.arrays, maps),
        "played_in_gymnasium": _draw_play(result.arrays, maps),
    }


_LAKES = {
    "4x4": ("SFFF", "FHFH", "FFFH", "HFFG"),
    "8x8": ("SFFFFFFF", "FFFFFFFF", "FFFHFFFF", "FFFFFHFF", "FFFHFFFF", "FHHFFFHF", "FHFFHFHF", "FFFHFFFG"),
}


def _draw_visits(arrays: Mapping[str, np.ndarray], name: str) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    states = arrays[f"{name}/states"][0]
    size, episodes = len(_LAKES[name]), len(states)
    shown = np.unique(np.linspace(0, episodes - 1, 5).astype(int))
    figure, panels = new_figure(
        13.0,
        3.4,
        ncols=len(shown),
        title=f"Exploring {name} without a reward: visits so far, and the path of the episode",
    )
    image, noise = None, np.random.default_rng(0)
    for axes, last in zip(np.atleast_1d(panels), shown, strict=True):
        visits = np.bincount(states[: last + 1, :-1].ravel(), minlength=size**2).reshape(size, size)
        image = axes.imshow(np.log10(np.maximum(visits, 0.5)), cmap="Blues", vmin=-0.3, vmax=np.log10(states.size))
        path = states[last]
        moved = np.concatenate([[True], path[1:] != path[:-1]])  # an absorbed walker stands still
        row, column = np.divmod(path[moved], size)
        jitter = noise.uniform(-0.18, 0.18, (2, len(row)))
        axes.plot(column + jitter[0], row + jitter[1], color=series_style(1)["color"], linewidth=0.9, alpha=0.8)
        for cell, letter in enumerate("".join(_LAKES[name])):
            if letter != "F":
                axes.text(cell % size, cell // size, letter, ha="center", va="center", fontsize=10, weight="bold")
        axes.set(xticks=[], yticks=[], title=f"episode {last + 1}", xlabel=f"{np.count_nonzero(visits)} cells seen")
        axes.grid(False)
    bar = figure.colorbar(cast(Any, image), ax=list(np.atleast_1d(panels)))
    bar.set_label("visits (log10)")
    return figure


def _draw_learning(arrays: Mapping[str, np.ndarray], maps: list[str]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    figure, (left, right) = new_figure(11.0, 4.0, ncols=2)
    for index, name in enumerate(maps):
        values = arrays[f"{name}/uncertainty"].mean(0)
        episodes, style = np.arange(1, len(values) + 1), series_style(index) | {"marker": ""}
        left.plot(episodes, values, label=name, **style)
    left.set(xlabel="episode", ylabel="uncertainty value (of a total reward 1)", ylim=(0, 1.05))
    left.set_title("How uncertain it still is (an indication)")
    left.legend()
    width = 0.8 / (len(maps) + 1)
    labels = ("as intended", "slips left", "slips right")
    right.bar(np.arange(3) - width * len(maps) / 2, arrays[f"{maps[0]}/truth"], width, color="#999999", label="truth")
    for index, name in enumerate(maps):
        place = np.arange(3) + width * (index + 1 - len(maps) / 2)
        right.bar(
            place, arrays[f"{name}/theta"][0], width, color=series_style(index)["color"], label=f"learnt on {name}"
        )
    right.set_xticks(range(3), labels)
    right.set(ylabel="weight in the mixture (probability)", title="What it learnt about the ice", ylim=(0, 0.6))
    right.legend(loc="upper center", ncols=3)
    return figure


def _draw_play(arrays: Mapping[str, np.ndarray], maps: list[str]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    figure, axes = new_figure(7.0, 4.0)
    for index, name in enumerate(maps):
        low, high = arrays[f"{name}/interval"]
        mean, best, prior = (float(arrays[f"{name}/{key}"]) for key in ("mean", "optimum", "prior"))
        axes.bar(
            index - 0.2,
            prior,
            0.35,
            color="#BBBBBB",
            label="shortest path, as if the ice did not slip" if index == 0 else None,
        )
        axes.bar(
            index + 0.2,
            mean,
            0.35,
            color=series_style(0)["color"],
            yerr=[[mean - low], [high - mean]],
            capsize=5,
            label="explored, then planned; played in gymnasium (95 % interval)" if index == 0 else None,
        )
        label = "exact optimum" if index == 0 else None
        axes.plot([index - 0.45, index + 0.45], [best, best], color="#000000", linestyle="-", label=label)
        for place, value in ((index - 0.2, prior), (index + 0.2, 0.0)):
            axes.text(
                place, 0.02, f"{value:.2g}" if value else f"{mean:.3f}", ha="center", color="#000000" if value else "w"
            )
    axes.set_xticks(range(len(maps)), maps)
    axes.set(xlabel="map", ylabel="episodes that reach the goal (fraction)", ylim=(0, 1.3))
    axes.legend(loc="upper left")
    return figure


STUDY = Study(
    name="frozen_lake",
    summary="Explores gymnasium's slippery FrozenLake without a reward, learns how it slips, plans for the goal told "
    "afterwards, and plays the plan in gymnasium itself against the exact optimum.",
    config=FrozenLakeConfig,
    run=run,
    figures=figures,
    presets=PRESETS["frozen_lake"],
    headline=("4x4/played_success", "4x4/optimum_success", "8x8/played_success", "8x8/optimum_success"),
    tour=True,
    x64=True,
    extras={"gymnasium": "experiments"},
)
