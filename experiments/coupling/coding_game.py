"""The rate-limited coding game on the 8x8 grid: reward against accuracy, and belief in the true message over time."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.coupling.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.coupling.games import CodingGame, play
from jaxrl_suite.envs.rate_grid import RateGridConfig, next_state, rate_grid, soft_policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_ENCODERS = ("greedy", "uniform_fixed", "uniform_adaptive")
_LABELS = ("bounded encoder (paper)", "uniform bins, fixed", "uniform bins of the belief")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodingGameConfig(Config):
    """Temperatures, rates and episodes."""

    log_temperatures: tuple[float, ...] = field((-6.0, -5.0, -4.0), help="natural logarithms of the temperature")
    compressions: tuple[float, ...] = field((1.0, 3.0, 9.0), help="entropy of the message over the rate")
    num_messages: int = field(512, help="number of messages, uniform")
    num_episodes: int = field(200, help="episodes a point")
    noise: float = field(0.2, help="probability that a move turns left or right")
    horizon: int = field(150, help="steps after which an episode is cut off")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_messages > 1, argument="num_messages", value=self.num_messages, rule="must be at least 2")
        check(self.num_episodes > 0, argument="num_episodes", value=self.num_episodes, rule="must be positive")
        positive = all(compression > 0 for compression in self.compressions)
        check(positive, argument="compressions", value=self.compressions, rule="must be positive")


def run(run: "Run") -> Result:
    """Plays every point: temperature, rate, encoder."""
    config = cast(CodingGameConfig, run.config)
    curves = run.stage("play", lambda: _play(run, config))
    accuracy, rewards = curves["right"].mean(-1), curves["rewards"].mean(-1)
    summary: dict[str, float | int | str | bool | None] = {"game/num_episodes": int(curves["right"].size)}
    for column, encoder in enumerate(_ENCODERS):
        summary[f"accuracy/{encoder}/highest_compression"] = float(accuracy[-1, -1, column])
    summary["reward/coldest_policy"] = float(rewards[0].mean())
    summary["reward/hottest_policy"] = float(rewards[-1].mean())
    spread = np.abs(rewards - rewards.mean(axis=(1, 2), keepdims=True)).max()
    summary["reward/largest_change_by_rate_or_encoder"] = float(spread)
    return Result(summary, curves)


def _play(run: "Run", config: CodingGameConfig) -> dict[str, np.ndarray]:
    grid = rate_grid(RateGridConfig(noise=config.noise, horizon=config.horizon))

    def move(key, state, action):
        return next_state(key, grid, state, action)

    shape = (len(config.log_temperatures), len(config.compressions), len(_ENCODERS))
    right = np.zeros((*shape, config.num_episodes), bool)
    rewards = np.zeros((*shape, config.num_episodes), np.float32)
    truth = np.zeros((*shape, config.horizon), np.float32)
    message_key, play_key = jax.random.split(run.key)
    messages = jax.random.randint(message_key, (config.num_episodes,), 0, config.num_messages)
    points = list(np.ndindex(*shape))
    for number, (i, j, k) in enumerate(run.progress(points, "points")):
        policy = soft_policy(grid, float(np.exp(config.log_temperatures[i])))
        game = CodingGame(policy, move, grid.entry_reward, grid.terminal, grid.start)
        rate = jnp.asarray(np.log2(config.num_messages) / config.compressions[j], policy.dtype)
        episodes = play(
            jax.random.fold_in(play_key, number),
            game,
            messages,
            rate,
            num_messages=config.num_messages,
            horizon=config.horizon,
            encoder=_ENCODERS[k],
        )
        right[i, j, k] = np.asarray(episodes.decoded == messages)
        rewards[i, j, k] = np.asarray(episodes.rewards)
        truth[i, j, k] = np.asarray(episodes.truth).mean(0)
    return {
        "right": right,
        "rewards": rewards,
        "truth": truth,
        "log_temperatures": np.array(config.log_temperatures),
        "compressions": np.array(config.compressions),
    }


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Accuracy against temperature with 95 % intervals over episodes; belief in the true message over time."""
    return {"accuracy": _draw_accuracy(result.arrays), "belief": _draw_belief(result.arrays)}


def _draw_accuracy(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    compressions = arrays["compressions"]
    figure, panels = new_figure(4.0 * len(compressions), 4.2, ncols=len(compressions))
    accuracy, count = arrays["right"].mean(-1), arrays["right"].shape[-1]
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / count)
    for j, axes in enumerate(np.atleast_1d(panels)):
        for k, label in enumerate(_LABELS):
            axes.errorbar(
                arrays["rewards"][:, j, k].mean(-1), accuracy[:, j, k], half[:, j, k], label=label, **series_style(k)
            )
        axes.set(xlabel="mean reward of an episode", ylabel="share of messages decoded", ylim=(-0.03, 1.05))
        axes.set_title(f"entropy / rate = {compressions[j]:g}")
    np.atleast_1d(panels)[0].legend(loc="lower left", fontsize=8)
    return figure


def _draw_belief(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    figure, axes = new_figure(7.4, 4.4)
    middle = len(arrays["compressions"]) // 2
    for i, log_temperature in enumerate(arrays["log_temperatures"]):
        for k, line in ((0, "-"), (2, ":")):
            label = f"log temperature {log_temperature:g}, {_LABELS[k]}"
            colour = series_style(i)["color"]
            axes.plot(arrays["truth"][i, middle, k][:60], color=colour, linestyle=line, label=label)
    axes.set(xlabel="step", ylabel="belief in the true message, mean", ylim=(0, 1.02))
    axes.set_title(f"entropy / rate = {arrays['compressions'][middle]:g}")
    axes.legend(fontsize=8)
    return figure


STUDY = Study(
    name="coding_game",
    summary="An agent says a message by how it walks, at no cost in reward: accuracy by temperature, rate and encoder.",
    config=CodingGameConfig,
    run=run,
    figures=figures,
    presets=PRESETS["coding_game"],
    headline=("reward/coldest_policy", "reward/hottest_policy", "reward/largest_change_by_rate_or_encoder"),
)
