"""Do the confidence sets hold the truth? Coverage of every radius over many runs, and the radius that is needed."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.reward_free.presets import PRESETS
from jaxrl_suite.config import Config, field
from jaxrl_suite.envs.mixtures import lock
from jaxrl_suite.reward_free import ExplorerConfig, HParams, explore, paper_radius
from jaxrl_suite.reward_free.radius import scales

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_MODES = ("fixed", "selfnorm", "subgaussian", "paper")
_FAMILIES = ("pseudo value", "uncertainty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoverageConfig(Config):
    """The lock with S = 8, A = 3, D = 5; exploration always uses the small fixed radius."""

    horizon: int = field(16, help="steps an episode H")
    num_episodes: int = field(100, help="episodes K")
    num_runs: int = field(64, help="independent runs")
    fixed_scale: float = field(1.3, help="c of the radius c sqrt(D)")


def run(run: "Run") -> Result:
    """One batch of runs; every radius is evaluated on the same statistics."""
    config = cast(CoverageConfig, run.config)
    world = lock()
    keys = jax.random.split(run.key, config.num_runs)

    settings = ExplorerConfig(horizon=config.horizon, num_episodes=config.num_episodes)
    hparams = HParams()

    def explored() -> dict[str, np.ndarray]:
        history = jax.jit(jax.vmap(lambda k: explore(k, world, settings).history))(keys)
        error, found = history.parameter_error, {}
        for mode, radius in _radii(world, settings, hparams, history.log_det[..., 0], config.fixed_scale).items():
            found[f"{mode}/inside"] = np.asarray(jnp.all(error[..., 0] <= radius, axis=(1, 2)))
            found[f"{mode}/inside_all_levels"] = np.asarray(jnp.all(error <= radius[..., None], axis=(1, 2, 3)))
            found[f"{mode}/radius"] = np.asarray(jnp.mean(radius[:, -1], axis=0))
            joint = jnp.sqrt(jnp.sum(radius**2, axis=-1))
            found[f"{mode}/pooled_inside"] = np.asarray(jnp.all(history.pooled_error <= joint, axis=1))
        return found | {"needed": np.asarray(jnp.max(error[..., 0], axis=1))}

    arrays = run.stage("explore", explored)
    summary: dict[str, float | int | str | bool | None] = {}
    for mode in _MODES:
        for key in ("inside", "inside_all_levels", "pooled_inside"):
            summary[f"{mode}/{key}_fraction"] = float(arrays[f"{mode}/{key}"].mean())
        summary[f"{mode}/radius_at_the_end"] = float(arrays[f"{mode}/radius"][0])
    for index, family in enumerate(_FAMILIES):
        needed = arrays["needed"][:, index]
        summary[f"needed/{family.replace(' ', '_')}_95_percent"] = float(np.quantile(needed, 0.95))
    return Result(summary, dict(arrays))


def _radii(world, settings: ExplorerConfig, hparams: HParams, log_det: jax.Array, fixed: float) -> dict[str, jax.Array]:
    """Radius [seeds, K, F] of every mode, from the log determinants of the same runs."""
    sizes = scales(world, settings, hparams)
    gain = jnp.maximum(log_det - world.dimension * jnp.log(sizes.ridge), 0.0)
    bias, delta = jnp.sqrt(sizes.ridge) * sizes.norm, hparams.delta
    theorem = paper_radius(world.dimension, settings.horizon, settings.num_episodes, *sizes, delta)
    return {
        "fixed": jnp.full_like(gain, fixed * world.dimension**0.5),
        "selfnorm": jnp.sqrt(gain + 2 * jnp.log(1 / delta)) + bias,
        "subgaussian": jnp.sqrt(gain + 2 * jnp.log(2 / delta)) / (2 * sizes.floor) + bias,
        "paper": jnp.full_like(gain, theorem),
    }


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Radius needed by each run against the radius offered."""
    from jaxrl_suite.io.plots import new_figure, series_style

    figure, axes = new_figure(8.0, 4.4)
    for index, family in enumerate(_FAMILIES):
        needed = np.sort(result.arrays["needed"][:, index])
        style = series_style(index) | {"marker": ""}
        axes.plot(needed, np.arange(1, len(needed) + 1) / len(needed), drawstyle="steps-post", label=family, **style)
    for index, mode in enumerate(_MODES[:3]):
        value = float(result.arrays[f"{mode}/radius"][0])
        axes.axvline(value, **(series_style(index + 2) | {"marker": ""}), label=f"radius {mode}: {value:.1f}")
    axes.set(xlabel="largest distance to the truth in a run (norm of the covariance)", ylabel="fraction of runs")
    theorem = float(result.arrays["paper/radius"][0])
    axes.set_title(
        f"Radius that would have held the truth in every episode (the theorem's: {theorem:.0f})", fontsize=11
    )
    axes.legend()
    return {"coverage": figure}


STUDY = Study(
    name="coverage",
    summary="The fraction of runs whose confidence sets hold the truth in every episode, for every radius, and the "
    "radius that would have been enough.",
    config=CoverageConfig,
    run=run,
    figures=figures,
    presets=PRESETS["coverage"],
    headline=("selfnorm/inside_fraction", "subgaussian/inside_fraction", "fixed/inside_fraction"),
    x64=True,
)
