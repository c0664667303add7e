"""Load of the experts while a byte model learns text, under each balancing rule."""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.corpus import source_bytes
from experiments.common.run import Run
from experiments.common.study import Result, Study
from experiments.moe.byte_model import byte_mixture
from experiments.moe.corpus import windows
from experiments.moe.presets import PRESETS
from jaxrl_suite import moe
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.io import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RULES = {
    "none": "none",
    "batch": "loss, one micro-batch of a data rank",
    "sequence": "loss, each sequence",
    "global": "loss, whole batch",
    "z": "z-loss alone",
    "bias": "bias, no loss",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadBalanceConfig(Config):
    """Model, text, folding and rules."""

    rules: str = field("none, batch, sequence, global, z, bias", help="balancing rules to compare, separated by commas")
    folding: str = field("attention=dp4 experts=ep4", help="where attention and experts lie")
    num_steps: int = field(300, help="optimizer steps under each rule")
    batch_size: int = field(16, help="sequences of a step")
    num_microbatches: int = field(2, help="micro-batches of a step on each data rank")
    length: int = field(64, help="bytes of a sequence")
    num_bytes: int = field(1_000_000, help="bytes of text, from the Python standard library's own source")
    num_layers: int = field(2, help="blocks of the model")
    width: int = field(64, help="width of the model")
    num_experts: int = field(8, help="experts of a layer")
    experts_per_token: int = field(2, help="experts of a token")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_steps > 0, argument="num_steps", value=self.num_steps, rule="must be positive")
        known = set(self.rule_names) <= set(RULES) and self.rule_names
        check(bool(known), argument="rules", value=self.rules, rule=f"must be some of {', '.join(RULES)}")
        moe.Folding.parse(self.folding)

    @property
    def rule_names(self) -> list[str]:
        """The rules in the order given."""
        return [name.strip() for name in self.rules.split(",") if name.strip()]


class LoadBalanceHParams(NamedTuple):
    """Rates and weights.

    learning_rate: step of AdamW.
    balance_coef: weight of the balancing losses.
    z_coef: weight of the router z-loss.
    bias_rate: step of the loss-free bias.
    """

    learning_rate: float = 3e-3
    balance_coef: float = 0.02
    z_coef: float = 1e-2
    bias_rate: float = 1e-2


def run(run: Run) -> Result:
    """Trains the same model from the same start on the same batches under each rule."""
    config: Any = run.config
    folding = moe.Folding.parse(config.folding)
    text = jnp.asarray(source_bytes(config.num_bytes))
    values = {name: float(np.asarray(value).reshape(-1)[0]) for name, value in run.hparams._asdict().items()}
    curves = [
        run.stage(f"rule_{rule}", lambda rule=rule: _train(run, rule, folding, text, values))
        for rule in config.rule_names
    ]
    losses, loads = (np.stack([curve[name] for curve in curves]) for name in ("loss_nats", "counts"))  # [R, steps, ..]
    tail = max(1, config.num_steps // 10)
    over_mean = (loads.max(axis=-1) / loads.mean(axis=-1)).mean(axis=-1)
    shares = loads[:, -tail:].mean(axis=1) / loads[:, -tail:].mean(axis=1).sum(axis=-1, keepdims=True)
    summary: dict[str, Any] = {}
    for index, rule in enumerate(config.rule_names):
        summary[f"load_balance/{rule}/max_over_mean"] = float(over_mean[index, -tail:].mean())
        summary[f"load_balance/{rule}/smallest_share_of_even"] = float(shares[index].min() * config.num_experts)
        summary[f"load_balance/{rule}/bits_per_byte"] = float(losses[index, -tail:].mean() / np.log(2))
    arrays = {
        "rules": np.array(config.rule_names),
        "bits_per_byte": losses / np.log(2),
        "max_over_mean": over_mean,
        "shares": shares,
    }
    return Result(summary, arrays)


def options_of(rule: str, config: Any) -> moe.MoEConfig:
    """Configuration of a rule. Rules that differ only in traced weights share one compiled program."""
    # The bias stays zero unless the rule moves it.
    model = byte_mixture(config, experts_per_token=config.experts_per_token, router_bias=True)
    scope: Any = rule if rule in ("batch", "sequence") else "global"
    return moe.MoEConfig(model=model, balance=scope, block_rows=32, num_microbatches=config.num_microbatches)


def weights_of(rule: str, values: dict[str, float]) -> moe.HParams:
    """Traced weights of a rule."""
    return moe.HParams(
        learning_rate=values["learning_rate"],
        balance_coef=values["balance_coef"] if rule in ("batch", "sequence", "global") else 0.0,
        z_coef=values["z_coef"] if rule == "z" else 0.0,
        bias_rate=values["bias_rate"] if rule == "bias" else 0.0,
    )


def _train(
    run: Run, rule: str, folding: moe.Folding, text: jax.Array, values: dict[str, float]
) -> dict[str, np.ndarray]:
    """Loss in nats [steps] and copies of each expert [steps, L, E] under one rule."""
    config: Any = run.config
    hparams, rows = weights_of(rule, values), []
    state = moe.init_train_state(run.key, options_of(rule, config), folding)
    for number in run.progress(range(config.num_steps), f"rule {rule}"):
        batch = _batch(run.key, jnp.int32(number), text, config.batch_size, config.length)
        # One step in flight: collectives of two steps on few cores would starve each other.
        state, row = jax.block_until_ready(moe.train_step(state, batch, hparams=hparams))
        rows.append((float(row["loss/nats"]), np.asarray(row["load/counts"])))
    losses, counts = zip(*rows, strict=True)
    return {"loss_nats": np.array(losses), "counts": np.stack(counts)}


_batch = jax.jit(lambda *arguments: moe.language_batch(windows(*arguments)), static_argnums=(3, 4))


def figures(result: Result) -> "dict[str, Figure]":
    """Largest load over the mean load as training goes on, and the loads at the end."""
    rules = [str(rule) for rule in result.arrays["rules"]]
    over_mean, shares = result.arrays["max_over_mean"], result.arrays["shares"]
    bits, num_experts = result.arrays["bits_per_byte"], shares.shape[-1]
    steps = np.arange(1, over_mean.shape[1] + 1)
    window = max(1, len(steps) // 20)
    figure, (left, right) = plots.new_figure(10.0, 4.2, ncols=2, title="Load of the experts under each balancing rule")
    tail = max(1, len(steps) // 10)
    for index, rule in enumerate(rules):
        smooth = np.convolve(over_mean[index], np.ones(window) / window, mode="valid")
        style = {**plots.series_style(index), "markevery": (index * window // 6, max(1, len(smooth) // 8))}
        left.plot(steps[window - 1 :], smooth, label=RULES[rule], linewidth=1.3, markersize=4, **style)
        loads = np.sort(shares[index], axis=-1)[:, ::-1].mean(axis=0) * num_experts
        label = f"{rule}: {bits[index, -tail:].mean():.2f} bit/byte"
        right.plot(
            np.arange(1, num_experts + 1), loads, label=label, linewidth=1.3, markersize=4, **plots.series_style(index)
        )
    left.axhline(1, color="#999999", linewidth=1, linestyle=":")
    left.set_xlabel(f"optimizer step (mean of {window})")
    left.set_ylabel("largest load / mean load")
    left.set_ylim(top=1.35 * over_mean.max())  # room for the legend above the curves
    left.legend(fontsize=8, frameon=False, ncols=2, loc="upper center")
    right.axhline(1, color="#999999", linewidth=1, linestyle=":")
    right.set_xlabel("experts of a layer, most loaded first")
    right.set_ylabel("load / even share, last tenth of steps")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, frameon=False)
    return {"load_balance": figure}


STUDY = Study(
    name="load_balance",
    summary="How evenly the experts of a byte model are used while it learns text: no rule, three scopes of the "
    "balancing loss, z-loss, loss-free bias.",
    config=LoadBalanceConfig,
    run=run,
    figures=figures,
    presets=PRESETS["load_balance"],
    hparams=LoadBalanceHParams,
    headline=(
        "load_balance/none/max_over_mean",
        "load_balance/global/max_over_mean",
        "load_balance/bias/max_over_mean",
    ),
    num_cpu_devices=4,
)
