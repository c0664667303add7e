"""What compression does to a coupling: maps of the joint law over H(X)/R, and how random it gets."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.coupling.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.coupling import ebim_greedy, greedy_coupling
from jaxrl_suite.distributions import entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_PAIRS = ("uniform to uniform", "binomial to geometric")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionMapsConfig(Config):
    """Alphabets and compressions."""

    num_symbols: int = field(30, help="symbols of input and output")
    compressions: tuple[float, ...] = field((1.0, 1.5, 2.0, 3.0, 5.0), help="H(X)/R of the maps")
    num_rates: int = field(401, help="rates of the curve")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_symbols > 1, argument="num_symbols", value=self.num_symbols, rule="must be at least 2")
        check(self.num_rates > 1, argument="num_rates", value=self.num_rates, rule="must be at least 2")
        fits = all(compression >= 1 for compression in self.compressions)
        check(fits, argument="compressions", value=self.compressions, rule="must be at least 1")


def run(run: "Run") -> Result:
    """Algorithm 1 and the greedy coupling, in one compiled call a curve."""
    config = cast(CompressionMapsConfig, run.config)
    arrays = run.stage("couple", lambda: _couple(config))
    summary: dict[str, float | int | str | bool | None] = {}
    for row, name in enumerate(_PAIRS):
        path = name.replace(" ", "_")
        for column in (0, len(config.compressions) - 1):
            compression = config.compressions[column]
            summary[f"{path}/information_at_{compression:g}_bits"] = float(arrays["map_information"][row, column])
            summary[f"{path}/noise_at_{compression:g}_bits"] = float(arrays["map_noise"][row, column])
    return Result(summary, arrays)


def _laws(size: int) -> np.ndarray:
    """Both pairs, [2, 2, N]."""
    from scipy import stats

    uniform = np.full(size, 1 / size)
    binomial = stats.binom.pmf(np.arange(size), size - 1, 0.5)
    geometric = 0.85 ** np.arange(size)
    return np.array([[uniform, uniform], [binomial / binomial.sum(), geometric / geometric.sum()]])


def _couple(config: CompressionMapsConfig) -> dict[str, np.ndarray]:
    laws = jnp.asarray(_laws(config.num_symbols))

    @jax.jit
    def through(p, q, rates):
        def one(rate):
            encoder = ebim_greedy(p, rate)
            joint = greedy_coupling(encoder.code, q).dense((p.shape[0], q.shape[0]))
            given = joint / jnp.where(encoder.code > 0, encoder.code, 1)[:, None]
            joint = p[:, None] * given[encoder.labels]  # every symbol gets the row of its code
            total = entropy(joint.reshape(-1))
            return joint, entropy(p) + entropy(q) - total, total - entropy(p)  # I(X;Y), H(Y|X)

        return jax.vmap(one)(rates)

    sources = entropy(laws[:, 0])
    map_rates = sources[:, None] / jnp.asarray(config.compressions)
    curve_rates = sources[:, None] * jnp.linspace(0, 1, config.num_rates)
    rates = jnp.concatenate([map_rates, curve_rates], axis=1)
    found = [through(p, q, r) for (p, q), r in zip(laws, rates)]
    joints, information, noise = (np.stack([np.asarray(x[i]) for x in found]) for i in range(3))
    count = len(config.compressions)
    return {
        "joints": joints[:, :count],
        "map_information": information[:, :count],
        "map_noise": noise[:, :count],
        "rates": np.asarray(curve_rates),
        "information": information[:, count:],
        "noise": noise[:, count:],
        "compressions": np.array(config.compressions),
        "laws": np.asarray(laws),
    }


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Maps of P(y | x) for each compression; information and noise against the rate."""
    return {"maps": _draw_maps(result.arrays), "noise": _draw_noise(result.arrays)}


def _draw_maps(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure

    compressions = arrays["compressions"]
    figure, panels = new_figure(2.9 * len(compressions) + 1, 6.4, ncols=len(compressions), nrows=2)
    panels = np.asarray(panels).reshape(2, -1)
    for row, name in enumerate(_PAIRS):
        p, q = arrays["laws"][row]
        across, down = np.argsort(-q, kind="stable"), np.argsort(-p, kind="stable")
        for column, axes in enumerate(panels[row]):
            given = arrays["joints"][row, column] / p[:, None]
            shown = np.ma.masked_less_equal(given[down][:, across], 1e-9)
            axes.imshow(shown, vmin=0, vmax=1, cmap="viridis_r", interpolation="nearest")
            axes.grid(False)
            bits = arrays["map_information"][row, column]
            axes.set_title(f"H(X)/R = {compressions[column]:g}: {bits:.2f} bits", fontsize=10)
            axes.set_xlabel("output, by mass")
        panels[row][0].set_ylabel(f"{name}\ninput, by mass")
    figure.colorbar(panels[0][0].images[0], ax=list(panels.reshape(-1)), label="probability of output given input")
    return figure


def _draw_noise(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    figure, panels = new_figure(10.0, 4.2, ncols=2)
    for axes, row in zip(panels, range(2)):
        for curve, (name, label) in enumerate(
            (("information", "told about the input, I(X;Y)"), ("noise", "left to chance, H(Y|X)"))
        ):
            style = {**series_style(curve), "marker": None}
            axes.plot(arrays["rates"][row], arrays[name][row], label=label, drawstyle="steps-post", **style)
        axes.plot(arrays["rates"][row], arrays["rates"][row], color="#444444", linestyle=":", label="the rate itself")
        axes.set(xlabel="rate R (bits)", ylabel="bits", title=_PAIRS[row], ylim=(0, None))
    panels[0].legend(fontsize=9)
    return figure


STUDY = Study(
    name="compression_maps",
    summary="The same two laws coupled through ever narrower codes: the map from input to output blurs.",
    config=CompressionMapsConfig,
    run=run,
    figures=figures,
    presets=PRESETS["compression_maps"],
    headline=("uniform_to_uniform/information_at_1_bits", "uniform_to_uniform/noise_at_1_bits"),
    x64=True,
    extras={"scipy": "experiments"},
)
