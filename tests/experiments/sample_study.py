"""A small study with a stage and a loop, for the tests of launchers; ``python -m`` runs it as a launcher would.

``SAMPLE_PAUSE`` in the environment are seconds more before each step, which are no part of the run's identity.
"""

import dataclasses
import os
import sys
import time
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.launch import launch_study
from experiments.common.study import Result, Study
from jaxrl_suite.config import Config, check, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(Config):
    num_steps: int = field(12, help="steps of the walk")
    kind: Literal["normal", "uniform"] = field("normal", help="law of the steps")
    widths: tuple[int, ...] = field((1, 2), help="widths of the stage")
    limit: float | None = field(None, help="largest position, none for no limit")
    pause_seconds: float = field(0.0, help="pause a step, so that a test can kill the process in between")
    fail: str = field("", help="stage or loop in which to raise")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_steps > 0, argument="num_steps", value=self.num_steps, rule="must be positive")


class SampleHParams(NamedTuple):
    """Swept scalars.

    rate: scale of a step.
    """

    rate: float = 1.0


def _run(run):
    def widths():
        if run.config.fail == "stage":
            raise FloatingPointError("asked to fail")
        return {"widths": np.array(run.config.widths) * 2}

    doubled = run.stage("widths", widths)["widths"]

    @jax.jit
    def step(state, t):
        keys = jax.vmap(lambda key: jax.random.fold_in(key, t))(run.keys)
        draws = jax.vmap(jax.random.normal)(keys)
        return state + jnp.asarray(run.hparams.rate, jnp.float32)[:, None] * draws

    def advance(state, start, num_steps):
        positions = []
        for t in range(start, start + num_steps):
            time.sleep(run.config.pause_seconds + float(os.environ.get("SAMPLE_PAUSE", 0)))
            if run.config.fail == "loop" and t == run.config.num_steps // 2:
                raise FloatingPointError("asked to fail")
            state = step(state, t)
            positions.append(state)
        return state, {"walk/position": np.stack(positions)}

    state = run.loop(
        "walk", init=lambda: jnp.zeros((run.num_sweep, run.num_seeds)), advance=advance, num_steps=run.config.num_steps
    )
    history = run.series("walk/position")
    return Result({"walk/end": float(state.mean()), "widths/sum": int(doubled.sum())}, {"history": history})


def _figures(result):
    from jaxrl_suite.io import plots

    figure, axes = plots.new_figure(title="walk")
    axes.plot(result.arrays["history"])
    axes.set(xlabel="step", ylabel="position")
    return {"walk": figure}


STUDY = Study(
    name="sample",
    summary="A random walk, to test launchers.",
    config=SampleConfig,
    hparams=SampleHParams,
    run=_run,
    figures=_figures,
    presets={"smoke": {"num_steps": 6}, "default": {}},
    headline=("walk/end",),
)

if __name__ == "__main__":
    launch_study("sample", STUDY, [word for word in sys.argv[1:] if not word.startswith("--study=")])
