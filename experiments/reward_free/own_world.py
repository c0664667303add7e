"""A world of your own from an ``.npz``: explored without a reward, planned for its rewards, with a certificate."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.reward_free.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.envs.mixtures import from_tables
from jaxrl_suite.mdp import LinearMixtureMDP, validate_mixture
from jaxrl_suite.reward_free import (
    ExplorerConfig,
    HParams,
    certificate,
    check_rewards,
    explore,
    plan,
    suboptimality,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnWorldConfig(Config):
    """Where the world is and how it is explored."""

    tables: str = field(
        "",
        help="an .npz with kernels [D, S, A, S] and theta [D], optionally start, nominal [D] and rewards [R, S, A] "
        "(paid at each step) or [R, H, S, A]; empty for an example with three kernels",
    )
    horizon: int = field(8, help="steps an episode H")
    num_episodes: int = field(100, help="episodes of exploration K")
    algorithm: str = field("hf_ucrl_rfe_pp", help="explorer: hf_ucrl_rfe_pp, ucrl_rfe, ...; certificates like ucrl_rfe")
    delta: float = field(0.05, help="failure probability of the proven certificate")


def run(run: "Run") -> Result:
    """Validates the world, explores it, plans for each reward, and reads both certificates."""
    config = cast(OwnWorldConfig, run.config)
    world, rewards = _load(config)
    settings = ExplorerConfig(
        algorithm=cast(Any, config.algorithm),
        horizon=config.horizon,
        num_episodes=config.num_episodes,
        output="final",
    )
    hparams = HParams(delta=config.delta, ridge_scale=0.01 if config.algorithm == "ucrl_rfe" else 1.0)

    def explored() -> dict[str, jax.Array]:
        @jax.jit
        def whole(key: jax.Array) -> dict[str, jax.Array]:
            found = explore(key, world, settings, hparams)
            policies = plan(found, rewards)
            proven = settings.replace(radius="subgaussian")
            return {
                "states": found.history.states,
                "uncertainty": found.history.uncertainty,
                "theta_error": jnp.max(jnp.abs(found.estimate.theta - world.theta)) / jnp.max(jnp.abs(world.theta)),
                "actions": policies.actions,
                "values": policies.values,
                "loss": suboptimality(world, policies.actions, rewards),
                "proven": certificate(world, proven, hparams, found).bound,
                "scaled": certificate(world, settings, hparams, found, scale=1.3).bound,
                "finite": found.finite,
                "precise": found.precise,
            }

        return whole(run.key)

    arrays = run.stage("explore", explored)
    report = validate_mixture(world)
    summary: dict[str, float | int | str | bool | None] = {
        "world/valid": report.valid,
        "world/normalised": report.normalised,
        "explorer/uncertainty": float(arrays["uncertainty"][-1]),
        "explorer/largest_error_of_a_weight": float(arrays["theta_error"]),
        "explorer/finite": bool(arrays["finite"]),
        "explorer/precise": bool(arrays["precise"]),
        "certificate/proven": float(arrays["proven"]),
        "certificate/radius_scaled_to_1.3_sqrt_d_not_proven": float(arrays["scaled"]),
        "certificate/reading": _reading(float(arrays["proven"]), config.delta),
    }
    for index, (value, loss) in enumerate(zip(arrays["values"], arrays["loss"], strict=True)):
        summary[f"reward_{index}/value_in_the_model"] = float(value)
        summary[f"reward_{index}/loss_in_truth"] = float(loss)
    return Result(summary, dict(arrays) | {"num_states": np.array(world.num_states)})


def _reading(proven: float, delta: float) -> str:
    if proven >= 1.0:
        return "1 says nothing yet: it takes thousands of episodes, as --preset=paper plays"
    return f"with probability {1 - delta:.4g} no reward of the class loses more than {proven:.3f}"


def _load(config: OwnWorldConfig) -> tuple[LinearMixtureMDP, jax.Array]:
    """The world, and rewards [R, H, S, A]: those of the file, else the last state at the end and time in the middle."""
    if not config.tables:
        kernels = _example()
        world, stored = from_tables(kernels, np.array([0.7, 0.2, 0.1])), None
    else:
        world = from_tables(config.tables)
        with np.load(config.tables) as arrays:
            stored = arrays.get("rewards")
    shape = (config.horizon, world.num_states, world.num_actions)
    if stored is None:
        rewards = jnp.zeros((2, *shape)).at[0, -1, -1].set(1.0).at[1, :, world.num_states // 2].set(1.0 / shape[0])
        return world, rewards
    if stored.ndim == 3:
        stored = np.broadcast_to(stored[:, None], (len(stored), config.horizon, *stored.shape[1:]))
    check(
        stored.ndim == 4 and stored.shape[1:] == shape,
        argument="rewards",
        value=stored.shape,
        rule=f"must be [R, S, A] or [R, H, S, A] with H, S, A = {shape}",
        remedy="Set --horizon to that of the file",
    )
    rewards = jnp.asarray(stored, world.features.dtype)
    check_rewards(world, rewards)
    return world, rewards


def _example(places: int = 6) -> np.ndarray:
    """[3, S, 2, S]: places in a row; a move goes as intended, not at all, or the other way."""
    kernels = np.zeros((3, places, 2, places))
    for place in range(places):
        sides = max(place - 1, 0), min(place + 1, places - 1)
        for action in (0, 1):
            for index, following in enumerate((sides[action], place, sides[1 - action])):
                kernels[index, place, action, following] = 1.0
    return kernels


def figures(result: Result) -> Mapping[str, "Figure"]:
    """How uncertain the model is, and where the explorer was, episode by episode."""
    from jaxrl_suite.io.plots import new_figure, series_style

    arrays, states = result.arrays, int(result.arrays["num_states"])
    figure, (left, right) = new_figure(11.0, 3.8, ncols=2)
    episodes = np.arange(1, len(arrays["uncertainty"]) + 1)
    left.plot(episodes, arrays["uncertainty"], **(series_style(0) | {"marker": ""}))
    left.set(xlabel="episode", ylabel="uncertainty value (of a total reward of 1)", ylim=(0, 1.05))
    left.set_title("How unsure the model is (an indication)")
    groups = np.array_split(arrays["states"][:, :-1], min(100, len(episodes)))  # no more columns than one can see
    visits = np.stack([np.bincount(g.ravel(), minlength=states) / len(g) for g in groups], axis=1)
    extent = (0.5, len(episodes) + 0.5, -0.5, states - 0.5)
    image = right.imshow(
        visits, aspect="auto", origin="lower", cmap="Blues", extent=extent, interpolation="nearest", vmin=0
    )
    right.grid(False)
    right.set(xlabel="episode", ylabel="state", title="Where it went, episode by episode")
    figure.colorbar(image, ax=right, label="steps spent there (mean an episode)")
    return {"own_world": figure}


STUDY = Study(
    name="own_world",
    summary="Explores a world of your own, kernels and weights from an .npz, plans for the rewards in it and reads the "
    "certificate.",
    config=OwnWorldConfig,
    run=run,
    figures=figures,
    presets=PRESETS["own_world"],
    headline=("certificate/proven", "explorer/uncertainty"),
    x64=True,
)
