"""Which treasures can a fixed weighting find? Deep-sea treasure solved exactly for every weight."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.pareto.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.envs.deep_sea_treasure import Layout, deep_sea_treasure, known_front
from jaxrl_suite.pareto import hypervolume, hypervolume_contributions, non_dominated
from jaxrl_suite.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

LAYOUTS: tuple[Layout, ...] = ("concave", "convex")
_HORIZON = 40  # no sensible path is longer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeaConfig(Config):
    """How finely weights are swept, and where the hypervolume starts."""

    num_weights: int = field(2001, help="weights of the treasure between 0 and 1; the rest goes to time")
    reference_treasure: float = field(0.0, help="reference point of the hypervolume: treasure")
    reference_time: float = field(-25.0, help="reference point of the hypervolume: minus the number of steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_weights >= 2, argument="num_weights", value=self.num_weights, rule="must be at least 2")


class Table(NamedTuple):
    """The environment as a table; S cells, 4 actions.

    Attributes:
        successor: int32 [S, 4].
        reward: [S, 4, 2].
        ends: bool [S, 4].
        start: int32 [].
    """

    successor: Array
    reward: Array
    ends: Array
    start: Array


def tabulate(layout: Layout) -> Table:
    """Reads the table off the simulator itself by stepping from every cell with every action."""
    env = deep_sea_treasure(layout)
    rows, columns = env.params.sea_map.shape
    cells = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    key = jax.random.key(0)
    state, _ = env.reset(key, env.params)

    def look(cell: Array, action: Array) -> tuple[Array, Array, Array]:
        result = env.step(key, state._replace(position=cell.astype(jnp.int32)), action, env.params)
        return result.observation @ jnp.array([columns, 1]), result.reward, result.terminated

    successor, reward, ends = jax.vmap(jax.vmap(look, (None, 0)), (0, None))(cells, jnp.arange(4))
    return Table(successor, reward, ends, state.position @ jnp.array([columns, 1]))


def optimal_return(table: Table, weights: Array) -> Array:
    """Return [2] of the policy that maximises a fixed weighted sum: exact value iteration, then one episode."""
    scalar = table.reward @ weights

    def backup(values: Array, _: None) -> tuple[Array, None]:
        return jnp.max(scalar + jnp.where(table.ends, 0.0, values[table.successor]), axis=1), None

    start = jnp.full(table.reward.shape[0], -1e3)  # whoever never arrives must not look good
    values, _ = jax.lax.scan(backup, start, length=_HORIZON)
    policy = jnp.argmax(scalar + jnp.where(table.ends, 0.0, values[table.successor]), axis=1)

    def move(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        cell, total, alive = carry
        action = policy[cell]
        total = total + jnp.where(alive, table.reward[cell, action], 0.0)
        return (table.successor[cell, action], total, alive & ~table.ends[cell, action]), None

    (_, total, _), _ = jax.lax.scan(move, (table.start, jnp.zeros(2), jnp.bool_(True)), length=_HORIZON)
    return total


def shortest_returns(table: Table) -> Array:
    """(treasure, -steps) of the shortest way to every treasure, [S, 2]; cells that hold none get zero treasure."""

    def relax(steps: Array, _: None) -> tuple[Array, None]:
        reach = jnp.where(table.ends | jnp.isinf(steps)[:, None], jnp.inf, steps[:, None] + 1)
        return steps.at[table.successor.reshape(-1)].min(reach.reshape(-1)), None

    steps = jnp.full(table.reward.shape[0], jnp.inf).at[table.start].set(0.0)
    steps, _ = jax.lax.scan(relax, steps, length=_HORIZON)
    arrive = jnp.where(table.ends & jnp.isfinite(steps)[:, None], -(steps[:, None] + 1), -jnp.inf)
    points = jnp.stack([jnp.where(table.ends, table.reward[..., 0], 0.0), arrive], axis=-1)
    return points.reshape(-1, 2)


def tchebycheff_choice(front: Array, weights: Array) -> Array:
    """Index of the point of a front with the smallest largest weighted distance to the ideal point.

    Distances are measured in units of the front's own range.
    """
    ideal, worst = jnp.max(front, axis=0), jnp.min(front, axis=0)
    return jnp.argmin(jnp.max(weights * (ideal - front) / (ideal - worst), axis=1))


@jax.jit
def _solve(table: Table, weights: Array, reference: Array) -> dict[str, Array]:
    """Everything about one map: its front found from the table, what each scalarisation reaches, hypervolumes."""
    points = shortest_returns(table)
    valid = jnp.isfinite(points[:, 1])
    member = non_dominated(points, valid)
    pairs = jnp.stack([weights, 1 - weights], axis=1)
    linear = jax.vmap(optimal_return, (None, 0))(table, pairs)
    # The maps hold ten treasures; several actions lead to one of them, so rows repeat.
    order = jnp.argsort(jnp.where(member, points[:, 0], jnp.inf))[:40]
    first = jnp.concatenate([jnp.array([True]), jnp.any(jnp.diff(points[order], axis=0) != 0, axis=1)])
    keep = member[order] & first
    front = jnp.where(keep[:, None], points[order], reference)
    return {
        "front": front,
        "keep": keep,
        "linear": linear,
        "hypervolume": hypervolume(front, reference, mask=keep),
        "contributions": hypervolume_contributions(front, reference, mask=keep),
    }


def _study_layout(layout: Layout, config: DeepSeaConfig) -> dict[str, np.ndarray]:
    reference = jnp.array([config.reference_treasure, config.reference_time])
    # Inside the interval: a weight of exactly 0 or 1 does not see one objective, and any way of wandering is optimal.
    weights = (jnp.arange(config.num_weights) + 0.5) / config.num_weights
    solved: dict[str, np.ndarray] = jax.device_get(_solve(tabulate(layout), weights, reference))
    front, contributions = solved["front"][solved["keep"]], solved["contributions"][solved["keep"]]
    pairs = jnp.stack([weights, 1 - weights], axis=1)
    choice = np.asarray(jax.vmap(tchebycheff_choice, (None, 0))(jnp.asarray(front), pairs))
    linear = np.argmin(np.abs(solved["linear"][:, None, :] - front[None]).sum(-1), axis=1)
    ends = np.isin(np.arange(len(front)), linear)
    return {
        "front": front,
        "contributions": contributions,
        "hypervolume": solved["hypervolume"],
        "linear": linear,
        "linear_error": np.abs(solved["linear"] - front[linear]).max(),
        "tchebycheff": choice,
        "linear_hypervolume": np.asarray(hypervolume(jnp.asarray(front), reference, mask=jnp.asarray(ends))),
        "weights": np.asarray(weights),
        "reference": np.asarray(reference),
    }


def _published_front(layout: Layout) -> np.ndarray:
    import mo_gymnasium

    name = {"concave": "deep-sea-treasure-concave-v0", "convex": "deep-sea-treasure-v0"}[layout]
    with warnings.catch_warnings():  # it warns about the precision of its own reward space
        warnings.simplefilter("ignore")
        env = mo_gymnasium.make(name)
        inner: Any = env.unwrapped
        front = np.array(inner.pareto_front(gamma=1.0))
        env.close()
    return front[np.argsort(front[:, 0])]


def run(run: "Run") -> Result:
    """Solves both maps exactly for every weight and compares the fronts found with the published ones."""
    config = run.config
    assert isinstance(config, DeepSeaConfig)
    summary: dict[str, float | int | str | bool | None] = {}
    arrays: dict[str, np.ndarray] = {}
    for layout in run.progress(LAYOUTS, "maps"):
        found = run.stage(layout, lambda layout=layout: _study_layout(layout, config))
        arrays.update({f"{layout}/{name}": value for name, value in found.items()})
        published = _published_front(layout)
        error = max(np.abs(found["front"] - published).max(), np.abs(found["front"] - known_front(layout)).max())
        summary[f"{layout}/front_points"] = len(found["front"])
        summary[f"{layout}/largest_difference_to_mo_gymnasium"] = float(error)
        summary[f"{layout}/largest_distance_of_linear_returns_to_front"] = float(found["linear_error"])
        summary[f"{layout}/reached_by_linear_points"] = len(np.unique(found["linear"]))
        summary[f"{layout}/reached_by_tchebycheff_points"] = len(np.unique(found["tchebycheff"]))
        summary[f"{layout}/hypervolume_treasure_steps"] = float(found["hypervolume"])
        summary[f"{layout}/hypervolume_reached_by_linear_treasure_steps"] = float(found["linear_hypervolume"])
    return Result(summary, arrays)


def figures(result: Result) -> Mapping[str, "Figure"]:
    """The fronts and what a fixed weighting finds on them; the treasure found against the weight."""
    return {"reachable": _draw_fronts(result.arrays), "weights": _draw_weights(result.arrays)}


def _layout_arrays(arrays: Mapping[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    return {name.split("/", 1)[1]: value for name, value in arrays.items() if name.startswith(f"{layout}/")}


def _draw_fronts(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    figure, axes = new_figure(10.4, 4.4, ncols=2)
    for ax, layout in zip(axes, LAYOUTS, strict=True):
        data = _layout_arrays(arrays, layout)
        front, reference = data["front"], data["reference"]
        linear = np.isin(np.arange(len(front)), data["linear"])
        time, treasure = -front[:, 1], front[:, 0]
        edges = np.append(time, -reference[1])
        ax.fill_between(edges, np.append(treasure, treasure[-1]), reference[0], step="post", color="#BBBBBB",
                        alpha=0.35, linewidth=0,
                        label=f"hypervolume {float(data['hypervolume']):.5g} treasure·steps")  # fmt: skip
        hull = np.sort(np.flatnonzero(linear))
        ax.plot(time[hull], treasure[hull], color="#444444", linestyle=":", label="convex hull")
        blue, orange = series_style(0), series_style(1)
        ax.plot(time[linear], treasure[linear], **{**blue, "linestyle": "none"}, markersize=9,
                label=f"some fixed linear weighting finds it ({linear.sum()})")  # fmt: skip
        only = ~linear & np.isin(np.arange(len(front)), data["tchebycheff"])
        if only.any():
            ax.plot(time[only], treasure[only], **{**orange, "linestyle": "none"}, markersize=8,
                    label=f"none does, Tchebycheff weights do ({only.sum()})")  # fmt: skip
        ax.set(title=f"{layout} map", xlabel="time (steps)", ylabel="treasure (reward units)", xlim=(0, -reference[1]))
        ax.legend(loc="upper left", fontsize=8.5)
        ax.set_ylim(0, treasure.max() * 1.55)
    return figure


def _draw_weights(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    figure, axes = new_figure(10.4, 3.8, ncols=2)
    for ax, layout in zip(axes, LAYOUTS, strict=True):
        data = _layout_arrays(arrays, layout)
        for index, (name, label) in enumerate((("linear", "weighted sum"), ("tchebycheff", "Tchebycheff"))):
            style = {**series_style(index), "marker": ""}
            ax.plot(data["weights"], data["front"][data[name], 0], label=label, **style)
        ax.set(title=f"{layout} map", xlabel="weight of the treasure (share)", ylabel="treasure found (reward units)")
        ax.legend(loc="center right", fontsize=9)
    return figure


STUDY = Study(
    name="deep_sea_treasure",
    summary="Exact fronts and hypervolume of deep-sea treasure, and which of its points fixed weights can reach.",
    config=DeepSeaConfig,
    run=run,
    figures=figures,
    presets=PRESETS["deep_sea_treasure"],
    headline=(
        "concave/front_points",
        "concave/reached_by_linear_points",
        "concave/reached_by_tchebycheff_points",
        "concave/hypervolume_treasure_steps",
    ),
    tour=True,
    extras={"mo_gymnasium": "experiments"},
)
