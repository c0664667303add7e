"""CodeGrid, 4x4, eight steps: accuracy, information and reward exactly, by enumerating all trajectories."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.coupling.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.coupling.exact_games import enumerate_game
from jaxrl_suite.envs.rate_grid import LAYOUT_4X4, RateGridConfig, rate_grid, soft_policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeGridConfig(Config):
    """Messages, temperatures and compressions."""

    num_messages: tuple[int, ...] = field((8, 16, 32, 64, 128), help="numbers of messages, uniform")
    temperatures: tuple[float, ...] = field((0.03, 0.1, 0.2, 0.3, 0.5), help="temperatures of the policy")
    compressions: tuple[float, ...] = field((1.0, 3.0), help="entropy of the message over the rate of a step")
    horizon: int = field(8, help="steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = all(number > 1 for number in self.num_messages)
        check(fits, argument="num_messages", value=self.num_messages, rule="must be at least 2")
        fits = all(compression > 0 for compression in self.compressions)
        check(fits, argument="compressions", value=self.compressions, rule="must be positive")
        rule = "must be in 6..9: the goal is 6 steps away, and 4 ** horizon trajectories are enumerated"
        check(6 <= self.horizon <= 9, argument="horizon", value=self.horizon, rule=rule)


def run(run: "Run") -> Result:
    """One enumeration a point."""
    config = cast(CodeGridConfig, run.config)
    arrays = run.stage("enumerate", lambda: _enumerate(run, config))
    summary: dict[str, float | int | str | bool | None] = {"grid/trajectories": 4**config.horizon}
    for row, number in enumerate(config.num_messages):
        best = arrays["accuracy"][row, :, 0] * arrays["success"][row, :, 0]
        summary[f"accuracy/{number}_messages/coldest"] = float(arrays["accuracy"][row, 0, 0])
        summary[f"accuracy_times_success/{number}_messages/best_temperature"] = float(best.max())
    spread = np.abs(arrays["reward"] - arrays["reward"].mean(axis=(0, 2), keepdims=True)).max()
    summary["reward/largest_change_by_message_or_rate"] = float(spread)
    return Result(summary, arrays)


def _enumerate(run: "Run", config: CodeGridConfig) -> dict[str, np.ndarray]:
    grid = rate_grid(RateGridConfig(layout=LAYOUT_4X4, noise=0.0, horizon=config.horizon))
    successors = grid.mdp.successors[:, :, 0]  # type: ignore[index]  # the builder always stores lists
    shape = (len(config.num_messages), len(config.temperatures), len(config.compressions))
    found = np.zeros((4, *shape))
    for i, j, k in run.progress(list(np.ndindex(*shape)), "points"):
        number = config.num_messages[i]
        policies = soft_policy(grid, config.temperatures[j], horizon=config.horizon)
        rate = jnp.asarray(np.log2(number) / config.compressions[k], jnp.float32)
        exact = enumerate_game(policies, successors, grid.entry_reward, grid.terminal, grid.start, number, rate)
        found[:, i, j, k] = [float(x) for x in exact]
    accuracy, information, reward, success = found
    return {
        "accuracy": accuracy,
        "information": information,
        "reward": reward,
        "success": success,
        "num_messages": np.array(config.num_messages),
        "temperatures": np.array(config.temperatures),
        "compressions": np.array(config.compressions),
    }


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Accuracy against success for every number of messages, and at two rates."""
    from jaxrl_suite.io.plots import new_figure, series_style

    arrays = result.arrays
    compressions = arrays["compressions"]
    figure, panels = new_figure(5.4 * len(compressions), 4.4, ncols=len(compressions))
    for k, axes in enumerate(np.atleast_1d(panels)):
        for i, number in enumerate(arrays["num_messages"]):
            label = f"{number} messages"
            axes.plot(arrays["success"][i, :, k], arrays["accuracy"][i, :, k], label=label, **series_style(i))
        axes.set(
            xlabel="probability of reaching the goal in time", ylabel="probability of decoding", ylim=(-0.03, 1.05)
        )
        axes.set_title(f"entropy / rate = {compressions[k]:g}; each point a temperature, hot at the left")
        axes.title.set_fontsize(10)
    np.atleast_1d(panels)[0].legend(loc="lower left", fontsize=9)
    return {"accuracy": figure}


STUDY = Study(
    name="code_grid",
    summary="A 4x4 walk of eight steps says one of up to 128 messages; accuracy exactly, over all 65,536 trajectories.",
    config=CodeGridConfig,
    run=run,
    figures=figures,
    presets=PRESETS["code_grid"],
    headline=("grid/trajectories", "reward/largest_change_by_message_or_rate"),
)
