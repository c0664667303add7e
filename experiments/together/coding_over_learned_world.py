"""Coding over a learned world: the Markov coding game planned in a model that was explored without a reward."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.together import learned_game
from experiments.together.preferences import explore_at
from experiments.together.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.io import plots
from jaxrl_suite.reward_free import ExplorerConfig, HParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_EXPLORERS = {"ucrl_rfe": "explored (UCRL-RFE)", "hf_ucrl_rfe_pp": "explored (HF-UCRL-RFE++)", "uniform": "random walk"}
_GAMES = {
    "actions": "the receiver sees actions",
    "states": "the receiver sees positions only",
    "own": "actions, each side has a model of its own",
    "checked": "positions, the same walk read by the true model",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodingOverLearnedWorldConfig(Config):
    """Exploration and game."""

    episodes: tuple[int, ...] = field((1, 4, 16, 64, 256), help="episodes of exploration K; increasing")
    explorers: tuple[str, ...] = field(("ucrl_rfe", "uniform"), help="explorers that are told no reward")
    horizon: int = field(20, help="steps of an episode of exploration")
    num_runs: int = field(6, help="independent explorations, two or more; sides of their own take neighbouring ones")
    num_messages: int = field(64, help="messages, uniform")
    num_games: int = field(200, help="episodes of the game a point")
    temperature: float = field(0.008, help="of the maximum-entropy policy, reward a nat")

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in zip((0, *self.episodes), self.episodes, strict=False))
        check(len(self.episodes) > 0 and rising, argument="episodes", value=self.episodes,
              rule="must be positive and increase")  # fmt: skip
        fits = len(self.explorers) > 0 and set(self.explorers) <= set(_EXPLORERS)
        names = ", ".join(_EXPLORERS)
        check(fits, argument="explorers", value=self.explorers, rule=f"must be one or more of {names}")
        for name, least in (("num_runs", 2), ("num_messages", 2), ("num_games", 1), ("horizon", 1)):
            value = getattr(self, name)
            check(value >= least, argument=name, value=value, rule=f"must be at least {least}")
        check(self.temperature > 0, argument="temperature", value=self.temperature, rule="must be positive")


def run(run: "Run") -> Result:
    """Explores, plans in every model, plays."""
    config = cast(CodingOverLearnedWorldConfig, run.config)
    world = learned_game.windy_walk()
    explore_key, message_key, play_key = jax.random.split(run.key, 3)
    keys = jax.random.split(explore_key, config.num_runs)
    messages = jax.random.randint(message_key, (config.num_games,), 0, config.num_messages, jnp.int32)
    game = _Game(world, config, messages, play_key)
    ends = run.stage("ends", lambda: _ends(world, game))
    arrays: dict[str, np.ndarray] = {f"ends/{name}": value for name, value in ends.items()}
    for name in config.explorers:
        models = run.stage(f"explore_{name}", lambda name=name: _models(world, config, keys, name))["models"]
        found = run.stage(f"play_{name}", lambda models=models: _points(run, game, models))
        arrays |= {f"{name}/{key}": value for key, value in found.items()}
    summary: dict[str, float | int | str | bool | None] = {}
    for row, name in enumerate(("true", "unexplored")):
        summary[f"reward/{name}_model"] = float(ends["reward"][row])
        for kind in ("actions", "states"):
            summary[f"accuracy/{kind}/{name}_model"] = float(ends[kind][row])
    for name in config.explorers:
        for column, label in ((0, config.episodes[0]), (-1, config.episodes[-1])):
            summary[f"reward/{name}_after_{label}"] = float(arrays[f"{name}/reward"][column].mean())
            for kind in _GAMES:
                summary[f"accuracy/{kind}/{name}_after_{label}"] = float(arrays[f"{name}/{kind}"][column].mean())
    return Result(summary, arrays | {"episodes": np.array(config.episodes), "explorers": np.array(config.explorers)})


class _Game:
    """The three games as compiled functions of the models; every point plays the same messages with the same draws."""

    def __init__(self, world: Any, config: CodingOverLearnedWorldConfig, messages: jax.Array, key: jax.Array) -> None:
        truth, self.world = learned_game.grid_of(world, world.kernel()), world
        self._plan = jax.jit(lambda model: learned_game.plan_in(world, model, config.temperature))
        self._reward = jax.jit(lambda plan: learned_game.exact_reward(truth, plan.policy))

        def accuracy(sender, receiver, observed):
            played = learned_game.play(
                jax.random.clone(key),
                truth,
                messages,
                sender,
                receiver,
                num_messages=config.num_messages,
                observed=observed,
            )
            return jnp.mean(played.decoded == messages)

        self._shared = jax.jit(lambda plan, observed: accuracy(plan, None, observed), static_argnums=1)
        self._own = jax.jit(lambda sender, receiver: accuracy(sender, receiver, "actions"))

    def shared(self, model: jax.Array) -> dict[str, float]:
        """Reward and accuracies where both sides hold the same model."""
        plan = self._plan(model)
        rows = {kind: float(self._shared(plan, kind)) for kind in ("actions", "states")}
        rows["checked"] = float(self._shared(plan._replace(model=self.world.kernel()), "states"))
        return {"reward": float(self._reward(plan)), **rows}

    def own(self, sender: jax.Array, receiver: jax.Array) -> float:
        """Accuracy where the receiver has another model."""
        return float(self._own(self._plan(sender), self._plan(receiver)))


def _ends(world: Any, game: _Game) -> dict[str, np.ndarray]:
    """The line to reach, and the model before any episode."""
    rows = [game.shared(world.kernel()), game.shared(world.kernel(world.nominal))]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _models(world: Any, config: CodingOverLearnedWorldConfig, keys: jax.Array, name: str) -> dict[str, np.ndarray]:
    settings = ExplorerConfig(algorithm=name, horizon=config.horizon, num_episodes=config.episodes[-1], output="final")  # type: ignore[arg-type]  # checked in the configuration

    def one(key: jax.Array) -> jax.Array:
        found = explore_at(key, world, settings, HParams(), config.episodes)
        return jnp.stack([exploration.model for exploration in found])

    return {"models": np.asarray(jax.jit(jax.vmap(one))(keys)).swapaxes(0, 1)}  # [totals, runs, S, A, N]


def _points(run: "Run", game: _Game, models: np.ndarray) -> dict[str, np.ndarray]:
    totals, runs = models.shape[:2]
    found = {name: np.zeros((totals, runs)) for name in ("reward", *_GAMES)}
    for i, j in run.progress(list(np.ndindex(totals, runs)), "points"):
        for name, value in game.shared(models[i, j]).items():
            found[name][i, j] = value
        found["own"][i, j] = game.own(models[i, j], models[i, (j + 1) % runs])
    return found


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Reward and decoding against episodes of exploration, between the unexplored and the true model."""
    arrays = result.arrays
    figure, panels = plots.new_figure(13.5, 4.4, ncols=3)
    episodes, ends = arrays["episodes"], arrays
    colours = plots.colours()
    shown = (("reward", "what the walk earns"), ("actions", _GAMES["actions"]), ("states", _GAMES["states"]))
    for axes, (kind, title) in zip(panels, shown, strict=True):
        lines = [(str(name), kind, index) for index, name in enumerate(arrays["explorers"])]
        extra = {"actions": ("own", "each side by itself"), "states": ("checked", "read by the true model")}.get(kind)
        if extra:
            lines += [(str(arrays["explorers"][0]), extra[0], len(lines))]
        for name, measure, index in lines:
            label = _EXPLORERS[name] if measure == kind else f"{_EXPLORERS[name]}, {extra[1] if extra else ''}"
            plots.line_with_interval(axes, episodes, arrays[f"{name}/{measure}"], label=label, index=index)
        for row, (label, colour) in enumerate((("true model", colours[6]), ("unexplored model", "#999999"))):
            axes.axhline(
                float(ends[f"ends/{kind}"][row]), color=colour, linestyle=(0, (4, 2)), linewidth=1.2, label=label
            )
        axes.set(xscale="log", xlabel="episodes of exploration", title=title)
        axes.set_xticks(episodes, [str(count) for count in episodes])
        axes.minorticks_off()
        if kind != "reward":
            axes.set(ylim=(-0.03, 1.05), ylabel="share of messages decoded")
    panels[0].set_ylabel("expected reward of an episode (goal 1, trap -1)")
    panels[1].legend(fontsize=8, loc="center right")
    panels[2].legend(fontsize=8, loc="upper right")
    return {"learned_world": figure}


STUDY = Study(
    name="coding_over_learned_world",
    summary="A message is sent through a windy walk that both sides planned in a model learnt without a reward: what "
    "decoding and reward lose against the true model, by episodes of exploration.",
    config=CodingOverLearnedWorldConfig,
    run=run,
    figures=figures,
    presets=PRESETS["coding_over_learned_world"],
    headline=("reward/true_model", "accuracy/states/true_model", "accuracy/states/unexplored_model"),
    x64=True,
)
