"""How many episodes until a proven certificate says something: the bound on every reward's loss against K."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.reward_free.measures import WORLDS, bank_of
from experiments.reward_free.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.envs.gymnasium_tables import gymnasium_world
from jaxrl_suite.reward_free import (
    ExplorerConfig,
    HParams,
    advance,
    certificate,
    finish,
    init_explorer,
    plan,
    suboptimality,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_LAKE = "frozen_lake_4x4"  # explored with its own time limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertificatesConfig(Config):
    """Worlds and episodes; UCRL-RFE explores, whose plain regression has the smallest proven radius."""

    worlds: tuple[str, ...] = field(("lock", _LAKE), help="lock, frozen_lake_4x4 or another world")
    num_chunks: int = field(60, help="most checkpoints at which the certificate is read; it ends at the target")
    chunk_episodes: int = field(1000, help="episodes between two checkpoints")
    horizon: int = field(16, help="steps an episode (FrozenLake: its own time limit)")
    target: float = field(0.5, help="certificate to reach")
    delta: float = field(0.05, help="failure probability of the certificate")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*WORLDS, _LAKE)
        unknown = [name for name in self.worlds if name not in known]
        check(not unknown, argument="worlds", value=unknown, rule=f"must be among {', '.join(known)}")


def run(run: "Run") -> Result:
    """Explores in chunks and reads the certificate after each."""
    config = cast(CertificatesConfig, run.config)
    arrays: dict[str, np.ndarray] = {}
    summary: dict[str, float | int | str | bool | None] = {}
    for name in run.progress(config.worlds, "worlds"):
        found = run.stage(name, lambda n=name: _curve(run, config, n))
        arrays |= {f"{name}/{key}": value for key, value in found.items()}
        reached = np.flatnonzero(found["bound"] <= config.target)
        summary[f"{name}/episodes_to_target"] = int(found["episodes"][reached[0]]) if len(reached) else None
        summary[f"{name}/bound_at_the_end"] = float(found["bound"][-1])
        summary[f"{name}/decoupled_at_the_end"] = float(found["decoupled"][-1])
        summary[f"{name}/worst_loss_at_the_end"] = float(found["loss"][-1])
        summary[f"{name}/always_above_worst_loss"] = bool(np.all(found["bound"] >= found["loss"]))
    return Result(summary, arrays | {"worlds": np.array(config.worlds)})


def _curve(run: "Run", config: CertificatesConfig, name: str) -> dict[str, np.ndarray]:
    horizon = config.horizon
    if name == _LAKE:
        lake = gymnasium_world("FrozenLake-v1", map_name="4x4", is_slippery=True)
        world, horizon = lake.mdp, lake.horizon
    else:
        world = WORLDS[name]()
    total = config.num_chunks * config.chunk_episodes
    settings = ExplorerConfig(
        algorithm="ucrl_rfe", horizon=horizon, num_episodes=total, radius="subgaussian", output="final"
    )
    hparams = HParams(delta=config.delta, ridge_scale=0.01)  # a small ridge: the bound pays for its root
    bank = bank_of(world, horizon, num_random=10)

    @jax.jit
    def read(state, history):
        found = finish(world, settings, state, history)
        sealed = certificate(world, settings, hparams, found)
        return sealed.bound, sealed.decoupled, jnp.max(suboptimality(world, plan(found, bank).actions, bank))

    state, rows = init_explorer(run.key, world, settings, hparams), []
    for chunk in run.progress(range(config.num_chunks), name):
        start = jnp.int32(chunk * config.chunk_episodes)
        state, history = advance(world, settings, hparams, state, start, config.chunk_episodes)
        rows.append([float(value) for value in read(state, history)])
        if rows[-1][0] <= config.target:
            break
    bound, decoupled, loss = np.array(rows).T
    episodes = config.chunk_episodes * np.arange(1, len(rows) + 1)
    return {"episodes": episodes, "bound": bound, "decoupled": decoupled, "loss": loss}


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Certificate and true worst loss against episodes."""
    from jaxrl_suite.io.plots import new_figure, series_style

    figure, axes = new_figure(8.0, 4.6)
    for index, name in enumerate(str(world) for world in result.arrays["worlds"]):
        arrays = {key: result.arrays[f"{name}/{key}"] for key in ("episodes", "bound", "loss")}
        label, style = name.replace("_", " "), series_style(2 * index) | {"marker": ""}
        axes.plot(arrays["episodes"], arrays["bound"], label=f"{label}: certificate", **style)
        style = series_style(2 * index + 1) | {"marker": ""}
        axes.plot(
            arrays["episodes"],
            np.maximum(arrays["loss"], 1e-5),
            label=f"{label}: worst loss of a bank of rewards (1e-5 stands for none)",
            **style,
        )
    axes.set(xscale="log", yscale="log", xlabel="episodes", ylabel="loss of a plan (of a total reward of 1)")
    axes.set_title("A proven bound for every reward, and what is really lost")
    axes.legend()
    return {"certificates": figure}


STUDY = Study(
    name="certificates",
    summary="A bound that holds for every reward with proven probability, against episodes, with the number that it "
    "took to fall below the target.",
    config=CertificatesConfig,
    run=run,
    figures=figures,
    presets=PRESETS["certificates"],
    headline=("lock/episodes_to_target", "frozen_lake_4x4/episodes_to_target"),
    x64=True,
    extras={"gymnasium": "experiments"},
)
