"""One exploration, every preference: the whole Pareto front after one exploration, against learning for weightings."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.together import preferences
from experiments.together.presets import PRESETS
from jaxrl_suite import pareto
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.io import plots
from jaxrl_suite.reward_free import ExplorerConfig, HParams, advance, certificate, finish, init_explorer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_EXPLORERS = {"ucrl_rfe": "explored once (UCRL-RFE)", "hf_ucrl_rfe_pp": "explored once (HF-UCRL-RFE++)"}
_RULES = {"schedule": "RL, weights swept", "hypervolume_gradient": "RL, weights by the hypervolume"}
_LABELS = {**_EXPLORERS, **_RULES, "fixed": "RL, fixed weightings"}
_MEASURES = ("hypervolume", "igd_plus", "reached")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryPreferenceConfig(Config):
    """World, episodes and rivals."""

    horizon: int = field(12, help="steps an episode H")
    episodes: tuple[int, ...] = field((8, 32, 128), help="episodes in all, the same for every method; increasing")
    num_weightings: int = field(10_000, help="weightings planned for after the exploration")
    num_fixed: int = field(4, help="fixed weightings of the rival; they share the episodes equally")
    num_runs: int = field(8, help="independent runs of each method")
    explorers: tuple[str, ...] = field(("ucrl_rfe", "hf_ucrl_rfe_pp"), help="explorers that are told no reward")
    rules: tuple[str, ...] = field(("schedule", "hypervolume_gradient"), help="weight rules of the dynamic rival")
    slack: float = field(0.01, help="distance within which a point of the true front counts as reached")
    proof_episodes: int = field(200_000, help="episodes of the exploration that the certificate is read from")
    delta: float = field(0.05, help="failure probability of the certificate")

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in zip(self.episodes, self.episodes[1:], strict=False))
        check(len(self.episodes) > 0 and rising, argument="episodes", value=self.episodes, rule="must increase")
        fits = self.num_fixed >= 2 and all(count >= 1 and count % self.num_fixed == 0 for count in self.episodes)
        check(fits, argument="episodes", value=self.episodes, remedy="Choose multiples of num_fixed",
              rule=f"each must be shared equally by num_fixed={self.num_fixed} weightings, two or more")  # fmt: skip
        for name, known in (("explorers", _EXPLORERS), ("rules", _RULES)):
            value = getattr(self, name)
            check(
                len(value) > 0 and set(value) <= set(known), argument=name, value=value,
                rule=f"must be one or more of {', '.join(known)}",
            )  # fmt: skip
        for name, least in (("num_runs", 1), ("num_weightings", 2), ("proof_episodes", 1)):
            value = getattr(self, name)
            check(value >= least, argument=name, value=value, rule=f"must be at least {least}")
        check(self.slack > 0, argument="slack", value=self.slack, rule="must be positive")
        check(0 < self.delta < 1, argument="delta", value=self.delta, rule="must be in (0, 1)")


def run(run: "Run") -> Result:
    """Explores and plans, learns with weights, certifies."""
    config = cast(EveryPreferenceConfig, run.config)
    world = preferences.windy_rooms(config.horizon)
    preferences.check_world(world)
    method_key, proof_key = jax.random.split(run.key)
    # Every method has draws of its own; a stage may be read back on a resume, so that its number must not matter.
    names = [*config.explorers, "fixed", *config.rules]
    keys = {
        name: jax.random.split(jax.random.fold_in(method_key, number), config.num_runs)
        for number, name in enumerate(names)
    }
    truth = run.stage("truth", lambda: _truth(world, config))
    rows, series = {}, []
    for name in config.explorers:
        found = run.stage(f"explore_{name}", lambda name=name: _explored(world, config, truth, keys[name], name))
        rows[name] = found
        series.append(name)
    agents = _sweeping_agents(world, config)
    rows["fixed"] = run.stage("fixed", lambda: _fixed(config, truth, keys["fixed"], agents))
    learn = {
        "schedule": lambda: _swept(world, config, truth, keys["schedule"], agents),
        "hypervolume_gradient": lambda: _by_hypervolume(world, config, truth, keys["hypervolume_gradient"]),
    }
    for name in config.rules:
        rows[name] = run.stage(f"dynamic_{name}", learn[name])
    series += ["fixed", *config.rules]
    proof = run.stage("proof", lambda: _proof(world, config, proof_key))
    best = float(truth["hypervolume"])
    summary: dict[str, float | int | str | bool | None] = {
        "front/weightings": config.num_weightings,
        "front/corners": len(truth["front"]),
        "unexplored/hypervolume_share": float(truth["unexplored_hypervolume"]) / best,
        "unexplored/front_reached_share": float(truth["unexplored_reached"]),
    }
    for name in series:
        last = {measure: float(rows[name][measure][-1].mean()) for measure in _MEASURES}
        summary[f"{name}/hypervolume_share"] = last["hypervolume"] / best
        summary[f"{name}/igd_plus"] = last["igd_plus"]
        summary[f"{name}/front_reached_share"] = last["reached"]
        if "reused" in rows[name]:
            summary[f"{name}/hypervolume_share_if_its_model_plans"] = float(rows[name]["reused"].mean()) / best
    summary["certificate/episodes"] = config.proof_episodes
    summary["certificate/bound"] = float(proof["bound"])
    summary["certificate/half_width_of_the_band"] = float(proof["half_width"])
    summary["certificate/largest_true_loss"] = float(proof["largest_loss"])
    summary["time/planning_seconds"] = float(truth["seconds"])
    arrays = {f"{name}/{key}": value for name in series for key, value in rows[name].items()}
    arrays |= {f"truth/{key}": value for key, value in truth.items()}
    arrays |= {f"proof/{key}": value for key, value in proof.items()}
    return Result(summary, arrays | {"series": np.array(series), "episodes": np.array(config.episodes)})


def _truth(world: preferences.World, config: EveryPreferenceConfig) -> dict[str, np.ndarray]:
    """The true front by exact planning, the reference point a little below the worst value on it, and what planning
    in the model before any episode reaches."""
    weights, kernel = preferences.weightings(config.num_weightings), world.mdp.kernel()
    values = jax.block_until_ready(_plan_all(world, kernel, weights)).true
    began = time.perf_counter()
    jax.block_until_ready(_plan_all(world, kernel, weights))
    seconds = time.perf_counter() - began
    front = preferences.corners(values)
    reference = front.min(0) - 0.05 * (front.max(0) - front.min(0))
    measure = preferences.measures(jnp.asarray(reference), config.slack)
    volume = measure(preferences.padded(front), jnp.asarray(front))[0]
    found = {"front": front, "reference": reference, "hypervolume": np.asarray(volume), "seconds": np.array(seconds)}
    nominal = _plan_all(world, world.mdp.kernel(world.mdp.nominal), weights).true
    blind = _quality(found, config, [nominal[None]])
    return found | {f"unexplored_{name}": value[0, 0] for name, value in blind.items()}


def _explored(world, config: EveryPreferenceConfig, truth, keys, name: str) -> dict[str, np.ndarray]:
    settings = ExplorerConfig(algorithm=name, horizon=config.horizon, num_episodes=config.episodes[-1], output="final")  # type: ignore[arg-type]  # checked in the configuration
    weights = preferences.weightings(config.num_weightings)

    @jax.jit
    def one(key):
        found = preferences.explore_at(key, world.mdp, settings, HParams(), config.episodes)
        return [exploration.model for exploration in found]

    fronts = [[_plan_all(world, model, weights).true for model in one(key)] for key in keys]
    values = np.asarray(fronts)  # [runs, totals, W, K]
    return _quality(truth, config, values.swapaxes(0, 1)) | {"shown": preferences.corners(values[0, -1])}


_plan_all = jax.jit(preferences.plan_all)
# values [N, T, K] and models of N agents = agents(keys [N], first and last weighting [K], episodes they play)
_Agents = Callable[[Any, Any, Any, int], tuple[jax.Array, jax.Array]]


def _sweeping_agents(world, config: EveryPreferenceConfig) -> _Agents:
    """Agents whose weights travel from one weighting to another: one program for all of them and any number of
    episodes, since weights that do not change begin where they end."""

    def one(key, first, last, count):
        rule = preferences.sweep_rule(count, first, last)
        total = config.episodes[-1]
        return preferences.learn_dynamic(key, world, _learner(config), rule, first, total, num_played=count)[:2]

    return jax.jit(jax.vmap(one, (0, None, None, None)))


def _fixed(config: EveryPreferenceConfig, truth, keys, agents: _Agents) -> dict[str, np.ndarray]:
    weights = jnp.asarray(preferences.weightings(config.num_fixed))
    share = config.episodes[-1] // config.num_fixed
    of_agent = jax.vmap(lambda key: jax.random.split(key, config.num_fixed))(keys)  # [runs, M]
    played = [agents(of_agent[:, m], weight, weight, share)[0][:, :share] for m, weight in enumerate(weights)]
    values = np.stack(played, axis=1)  # [runs, M, episodes, K]
    # The first T / M episodes of each agent are what it would have played with T episodes for all.
    totals = [values[:, :, : total // config.num_fixed].reshape(len(keys), -1, 2) for total in config.episodes]
    return _quality(truth, config, totals) | {"shown": preferences.corners(totals[-1][0])}


def _swept(world, config: EveryPreferenceConfig, truth, keys, agents: _Agents) -> dict[str, np.ndarray]:
    """Weights from one end to the other; a sweep fits its number of episodes, so that each has agents of its own."""
    last, first = jnp.asarray(preferences.weightings(2))[::-1]
    totals, models = [], None
    for length in config.episodes:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, length)
        values, models = agents(own, first, last, length)
        totals.append(np.asarray(values[:, :length]))
    return _dynamic(world, config, truth, totals, models)


def _by_hypervolume(world, config: EveryPreferenceConfig, truth, keys) -> dict[str, np.ndarray]:
    """The rule does not know how many episodes there are, so that its first ones serve all totals."""
    first, total = jnp.asarray(preferences.weightings(2)[0]), config.episodes[-1]
    rule = pareto.hypervolume_gradient_weights(jnp.full(2, 0.5), jnp.asarray(truth["reference"]), capacity=32)

    def one(key):
        return preferences.learn_dynamic(key, world, _learner(config), rule, first, total)[:2]

    values, models = jax.jit(jax.vmap(one))(jax.vmap(jax.random.fold_in, (0, None))(keys, total))
    return _dynamic(world, config, truth, [np.asarray(values[:, :total]) for total in config.episodes], models)


def _dynamic(world, config: EveryPreferenceConfig, truth, totals, models) -> dict[str, np.ndarray]:
    """Measures of the policies that were played, and of planning in the last models."""
    reused = np.stack([_plan_all(world, model, preferences.weightings(501)).true for model in models])
    volumes = _quality(truth, config, [reused])["hypervolume"][0]
    return _quality(truth, config, totals) | {"shown": preferences.corners(totals[-1][0]), "reused": volumes}


def _learner(config: EveryPreferenceConfig) -> ExplorerConfig:
    return ExplorerConfig(
        algorithm="hf_ucrl_vtr_plus", horizon=config.horizon, num_episodes=config.episodes[-1], output="final"
    )


def _quality(truth, config: EveryPreferenceConfig, totals) -> dict[str, np.ndarray]:
    """Measures [totals, runs] of sets of points, one entry of ``totals`` [runs, N, K] a number of episodes."""
    measure = preferences.measures(jnp.asarray(truth["reference"]), config.slack)
    front = jnp.asarray(truth["front"])
    found = np.array([[[float(x) for x in measure(preferences.padded(p), front)] for p in runs] for runs in totals])
    return {name: found[..., index] for index, name in enumerate(_MEASURES)}


def _proof(world, config: EveryPreferenceConfig, key: jax.Array) -> dict[str, np.ndarray]:
    """One long exploration with the proven radius, its front, and the band in which the true front lies."""
    settings = ExplorerConfig(
        algorithm="ucrl_rfe", horizon=config.horizon, num_episodes=config.proof_episodes, radius="subgaussian",
        output="final",
    )  # fmt: skip
    hparams = HParams(delta=config.delta, ridge_scale=0.01)  # a small ridge: the bound pays for its root
    weights = preferences.weightings(config.num_weightings)

    @jax.jit
    def prove(key):
        state = init_explorer(key, world.mdp, settings, hparams)
        state, history = advance(world.mdp, settings, hparams, state, jnp.int32(0), config.proof_episodes)
        found = finish(world.mdp, settings, state, history)
        return certificate(world.mdp, settings, hparams, found), found.model, found.finite

    sealed, model, finite = prove(key)
    front = _plan_all(world, model, weights)
    exact = _plan_all(world, world.mdp.kernel(), weights).true
    loss = jnp.sum(weights * (exact - front.true), axis=1)
    half = jnp.minimum(1.0, sealed.pooled / 2)  # |value in the model - value in truth| of every plan and reward
    order = np.argsort(np.asarray(front.claimed)[:, 0], kind="stable")
    return {
        "bound": np.asarray(sealed.bound),
        "half_width": np.asarray(half),
        "largest_loss": np.asarray(jnp.max(loss)),
        "largest_value_error": np.asarray(jnp.max(jnp.abs(front.claimed - front.true))),
        "claimed": preferences.corners(np.asarray(front.claimed)[order]),
        "finite": np.asarray(finite),
    }


def figures(result: Result) -> Mapping[str, "Figure"]:
    """The fronts beside each other, the measures against episodes, the certified band."""
    return {"fronts": _draw_fronts(result.arrays), "episodes": _draw_episodes(result.arrays)}


def _draw_fronts(arrays: Mapping[str, np.ndarray]) -> "Figure":
    figure, (left, right) = plots.new_figure(12.0, 4.8, ncols=2)
    truth = arrays["truth/front"]
    left.plot(*truth.T, color="#BBBBBB", linewidth=6, label="true front", zorder=1)
    for index, name in enumerate(str(x) for x in arrays["series"]):
        style = {**plots.series_style(index), "linestyle": "", "markersize": 4.5, "alpha": 0.9}
        points = arrays[f"{name}/shown"]
        label = f"{_LABELS[name]}: {len(points)} points"
        left.plot(*points.T, label=label, zorder=3 if name in _EXPLORERS else 4, **style)
    left.set(xlabel="light (share of the most there is)", ylabel="warmth (share of the most there is)")
    left.set_title(f"{int(arrays['episodes'][-1])} episodes in all, first run")
    left.legend(fontsize=9, loc="lower left")
    claimed, half = arrays["proof/claimed"], float(arrays["proof/half_width"])
    order = np.argsort(claimed[:, 0])
    x, y = claimed[order].T
    colour = plots.colours()[0]
    # The front moved by the half width along both axes, at each side: the true front lies in between. Whatever lies
    # below and to the left of the inner edge is reached by some plan, so that the edges run on to the axes.
    edges = [_edge(np.clip(np.stack([x + move, y + move], 1), 0, 1)) for move in (-half, half)]
    label = f"certified: ± {half:.2f}" if half < 1 else "certified: nothing yet"
    right.fill(*np.concatenate([edges[0], edges[1][::-1]]).T, color=colour, alpha=0.18, linewidth=0, label=label)
    right.plot(*truth.T, color="#BBBBBB", linewidth=6, label="true front")
    right.plot(x, y, color=colour, linewidth=1.6, label="front planned in the learnt model")
    right.set(xlabel="light (share of the most there is)", ylabel="warmth (share of the most there is)")
    right.set(xlim=(0, 1), ylim=(0, 1))
    right.set_title("What a long exploration proves, the truth unseen", fontsize=11)
    right.legend(fontsize=9, loc="lower left")
    return figure


def _edge(points: np.ndarray) -> np.ndarray:
    """The boundary of what a front [N, 2] dominates, from the second axis to the first."""
    return np.concatenate([[[0.0, points[0, 1]]], points, [[points[-1, 0], 0.0]]])


def _draw_episodes(arrays: Mapping[str, np.ndarray]) -> "Figure":
    figure, panels = plots.new_figure(13.0, 4.4, ncols=3)
    best = float(arrays["truth/hypervolume"])
    shown = (
        ("hypervolume", 1 / best, "hypervolume / that of the true front"),
        ("igd_plus", 1.0, "IGD+ to the true front (of a total of 1)"),
        ("reached", 1.0, "share of the true front reached"),
    )
    for axes, (measure, scale, label) in zip(panels, shown, strict=True):
        for index, name in enumerate(str(x) for x in arrays["series"]):
            values = scale * arrays[f"{name}/{measure}"]
            plots.line_with_interval(axes, arrays["episodes"], values, label=_LABELS[name], index=index)
        blind = scale * float(arrays[f"truth/unexplored_{measure}"])
        axes.axhline(blind, color="#777777", linestyle=(0, (4, 2)), linewidth=1.2, label="planned unexplored")
        axes.set(xscale="log", xlabel="episodes in all", ylabel=label)
        axes.set_xticks(arrays["episodes"], [str(count) for count in arrays["episodes"]], minor=False)
        axes.minorticks_off()
    panels[1].set(yscale="log")
    # Below the panels: with few runs the bands leave no corner free.
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


STUDY = Study(
    name="every_preference",
    summary="One exploration without a reward yields the whole Pareto front of two objectives told afterwards, with a "
    "certificate; against learning for fixed or moving weights at equal episodes, and planning without any.",
    config=EveryPreferenceConfig,
    run=run,
    figures=figures,
    presets=PRESETS["every_preference"],
    headline=("front/weightings", "ucrl_rfe/hypervolume_share", "fixed/hypervolume_share", "certificate/bound"),
    tour=True,
    x64=True,
)
