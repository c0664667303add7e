"""Bounded encoders against bin packing on binomial and truncated geometric sources."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.coupling.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.coupling import ebim_greedy, ebim_refine, quantize_lpt
from jaxrl_suite.distributions import entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_SOURCES = ("binomial", "geometric")
_ENCODERS = ("greedy", "refined", "bin packing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceCodingConfig(Config):
    """Sources and rates."""

    num_symbols: int = field(32, help="symbols of each source")
    num_rates: int = field(201, help="number of rates between 0 and 4.5 bits")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_symbols > 1, argument="num_symbols", value=self.num_symbols, rule="must be at least 2")
        check(self.num_rates > 1, argument="num_rates", value=self.num_rates, rule="must be at least 2")


def sources(num_symbols: int) -> np.ndarray:
    """Binomial(N - 1, 1/2) and a geometric law of ratio 0.85 cut to N symbols, ``[2, N]``."""
    from scipy import stats

    binomial = stats.binom.pmf(np.arange(num_symbols), num_symbols - 1, 0.5)
    geometric = 0.85 ** np.arange(num_symbols)
    return np.stack([binomial / binomial.sum(), geometric / geometric.sum()])


def run(run: "Run") -> Result:
    """Information of three encoders at every rate, in one compiled call each."""
    config = cast(SourceCodingConfig, run.config)
    curves = run.stage("encode", lambda: _encode(config))
    summary: dict[str, float | int | str | bool | None] = {}
    for row, source in enumerate(_SOURCES):
        low = curves["rates"] < 2
        reach = np.minimum(curves["rates"], curves["entropies"][row])
        for column, encoder in enumerate(_ENCODERS):
            loss = (reach - curves["information"][row, column])[low].mean()
            summary[f"{source}/{encoder.replace(' ', '_')}/mean_loss_below_2_bits"] = float(loss)
    return Result(summary, curves)


def _encode(config: SourceCodingConfig) -> dict[str, np.ndarray]:
    laws, rates = jnp.asarray(sources(config.num_symbols)), jnp.linspace(0.0, 4.5, config.num_rates)
    encoders = (ebim_greedy, ebim_refine, quantize_lpt)

    def every(encoder):
        over_rates = jax.vmap(lambda law, rate: encoder(law, rate).information, in_axes=(None, 0))
        return jax.jit(jax.vmap(over_rates, in_axes=(0, None)))(laws, rates)

    information = np.stack([np.asarray(every(encoder)) for encoder in encoders], axis=1)
    return {
        "rates": np.asarray(rates),
        "information": information,
        "entropies": np.asarray(entropy(laws)),
        "laws": np.asarray(laws),
    }


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Information against rate, a panel a source."""
    from jaxrl_suite.io.plots import new_figure, series_style

    arrays = result.arrays
    figure, panels = new_figure(11.0, 4.4, ncols=2)
    for row, (axes, source) in enumerate(zip(panels, _SOURCES, strict=True)):
        reach = np.minimum(arrays["rates"], arrays["entropies"][row])
        axes.plot(arrays["rates"], reach, color="#444444", linestyle=":", label="what no encoder can exceed")
        for column, encoder in enumerate(_ENCODERS):
            colour = series_style(column)["color"]
            axes.plot(arrays["rates"], arrays["information"][row, column], color=colour, linestyle="-", label=encoder)
        axes.set(xlabel="rate (bits)", ylabel="information about the source (bits)", title=f"{source} source")
    panels[0].legend(loc="upper left")
    return {"encoders": figure}


STUDY = Study(
    name="source_coding",
    summary="Greedy and refined bounded encoders against bin packing on binomial and truncated geometric sources.",
    config=SourceCodingConfig,
    run=run,
    figures=figures,
    presets=PRESETS["source_coding"],
    headline=("binomial/greedy/mean_loss_below_2_bits", "binomial/bin_packing/mean_loss_below_2_bits"),
    x64=True,
)
