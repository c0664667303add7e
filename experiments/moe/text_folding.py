"""The same mixture-of-experts model on one device and folded over eight: the loss curves must be one curve."""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.corpus import source_bytes
from experiments.common.run import Run
from experiments.common.study import Result, Study
from experiments.moe.byte_model import byte_mixture
from experiments.moe.corpus import windows
from experiments.moe.presets import PRESETS
from jaxrl_suite import lm, moe
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.io import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFoldingConfig(Config):
    """Model, text and foldings."""

    foldings: str = field(
        "attention=tp2.dp4 experts=ep8; attention=tp2.cp2.dp2 experts=etp2.ep4",
        help="foldings to train under, separated by semicolons",
    )
    num_ranks: int = field(0, help="ranks of each folding; 0 for all devices (--num_cpu_devices sets how many)")
    num_steps: int = field(60, help="optimizer steps")
    batch_size: int = field(8, help="sequences of a step")
    length: int = field(128, help="bytes of a sequence")
    num_bytes: int = field(1_000_000, help="bytes of text, from the Python standard library's own source")
    num_layers: int = field(2, help="blocks of the model")
    width: int = field(64, help="width of the model")
    num_experts: int = field(8, help="experts of a layer")
    balance_coef: float = field(0.01, help="weight of the balancing loss, over the global batch")
    dispatch: str = field("padded", help="dispatcher: padded, allgather or emulated (all dropless)")
    expert_precision: str = field(
        "compute", help="operands of the folded experts' products: compute (as the model) or float8 (shows its error)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_steps > 0, argument="num_steps", value=self.num_steps, rule="must be positive")
        check(
            self.dispatch in ("padded", "allgather", "emulated"),
            argument="dispatch",
            value=self.dispatch,
            rule="must be padded, allgather or emulated, since the oracle drops nothing",
        )
        check(self.num_ranks >= 0, argument="num_ranks", value=self.num_ranks, rule="must not be negative")
        known = self.expert_precision in ("compute", "float8")
        check(known, argument="expert_precision", value=self.expert_precision, rule="must be compute or float8")


class TextFoldingHParams(NamedTuple):
    """Learning rate.

    learning_rate: step of Adam.
    """

    learning_rate: float = 1e-3


def run(run: Run) -> Result:
    """Trains the oracle, then every folding on the same batches, and compares step by step."""
    config: Any = run.config
    model = byte_mixture(config)
    text = jnp.asarray(source_bytes(config.num_bytes))
    rate = float(np.asarray(run.hparams.learning_rate).reshape(-1)[0])
    curves = {"one device (oracle)": _train_oracle(run, config, model, text, rate)}
    names = [part.strip() for part in config.foldings.split(";") if part.strip()]
    overloads = []
    for index, name in enumerate(names):
        folding = moe.Folding.parse(name, config.num_ranks or jax.device_count())
        curves[name], overload = _train_folded(run, index, config, model, text, rate, folding)
        overloads.append(overload)
    oracle = curves["one device (oracle)"]
    differences = np.stack([np.abs(curves[name] - oracle) / oracle for name in names])
    tail = max(1, config.num_steps // 10)
    summary: dict[str, Any] = {
        "text_folding/final_bits_per_byte": float(oracle[-tail:].mean() / np.log(2)),
        "text_folding/first_bits_per_byte": float(oracle[0] / np.log(2)),
        "text_folding/largest_relative_difference": float(differences.max()),
        "text_folding/within_1e-4": bool(differences.max() <= 1e-4),
        "text_folding/num_foldings": len(names),
        "text_folding/max_over_mean_load": float(np.mean([o[-tail:].mean() for o in overloads])),
        "text_folding/num_parameters": lm.num_parameters(model),
    }
    losses = np.stack([oracle] + [curves[name] for name in names])
    arrays = {"bits_per_byte": losses / np.log(2), "relative_difference": differences, "names": np.array(names)}
    return Result(summary, {**arrays, "overload": np.stack(overloads)})


def figures(result: Result) -> "dict[str, Figure]":
    """Loss curves on top of each other, the difference below."""
    bits, differences = result.arrays["bits_per_byte"], result.arrays["relative_difference"]
    names, steps = [str(name) for name in result.arrays["names"]], np.arange(1, bits.shape[1] + 1)
    figure, (top, bottom) = plots.new_figure(7.2, 6.0, nrows=2, title="One model, one device or eight: one loss curve")
    colours = plots.colours()
    top.plot(steps, bits[0], color="#BBBBBB", linewidth=6, linestyle="-", label="one device, dropless (oracle)")
    spacing = max(1, len(steps) // 12)
    for index, name in enumerate(names):
        style = {**plots.series_style(index), "markevery": (index * spacing // 2, spacing), "linewidth": 1.2}
        top.plot(steps, bits[1 + index], label=name, **style)
        bottom.plot(steps, np.maximum(differences[index], 1e-9), label=name, **style)
    top.set_ylabel("loss (bits per byte)")
    top.legend(fontsize=9, frameon=False)
    bottom.axhline(np.finfo(np.float32).eps, color=colours[6], linewidth=1, linestyle=":")
    bottom.axhline(1e-4, color=colours[1], linewidth=1, linestyle="--")
    # Beside the axes, where no curve runs.
    for height, words in ((np.finfo(np.float32).eps, "float32\nrounding"), (1e-4, "bound")):
        bottom.text(1.01, height, words, transform=bottom.get_yaxis_transform(), va="center", fontsize=9)
    bottom.set_yscale("log")
    bottom.set_ylim(5e-10, 1e-3)
    bottom.set_xlabel("optimizer step")
    bottom.set_ylabel("|difference| / oracle loss")
    return {"text_folding": figure}


def _train_oracle(run: Run, config: Any, model: lm.LanguageModelConfig, text: jax.Array, rate: float) -> np.ndarray:
    """The decoder of ``lm`` with its own dropless experts on one device: no folding, no dispatcher, no shard_map."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b1=0.9, b2=0.95))

    def loss(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, aux = lm.forward(params, tokens[:, :-1], config=model)
        logits = lm.head(params, x, config=model)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        balance = jax.vmap(moe.load_balance_loss)(aux.routing.probs, aux.routing.experts).sum()
        return nats + config.balance_coef * balance, nats

    @jax.jit
    def step(state: tuple, index: jax.Array) -> tuple[tuple, jax.Array]:
        params, moments = state
        (_, value), gradient = jax.value_and_grad(loss, has_aux=True)(
            params, windows(run.key, index, text, config.batch_size, config.length)
        )
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    def init() -> tuple:
        params = lm.init_params(run.key, model)
        return params, optimizer.init(params)

    def advance(state: tuple, start: int, num_steps: int) -> tuple[tuple, dict[str, np.ndarray]]:
        values = []
        for index in range(start, start + num_steps):
            state, value = step(state, jnp.int32(index))
            values.append(value)
        return state, {"oracle/loss_nats": np.array(values)}

    run.loop("oracle", init=init, advance=advance, num_steps=config.num_steps)
    return run.series("oracle/loss_nats")


def _train_folded(
    run: Run,
    index: int,
    config: Any,
    model: lm.LanguageModelConfig,
    text: jax.Array,
    rate: float,
    folding: moe.Folding,
) -> tuple[np.ndarray, np.ndarray]:
    """The same batches under a folding; returns the loss and the largest load over the mean load of each step."""
    options = moe.MoEConfig(model=model, dispatch=config.dispatch, block_rows=32, balance="global")
    options = options.replace(expert_precision=config.expert_precision)
    hparams = moe.HParams(learning_rate=rate, balance_coef=config.balance_coef)

    @jax.jit
    def step(state: moe.TrainState, number: jax.Array) -> tuple[moe.TrainState, dict[str, jax.Array]]:
        batch = moe.language_batch(windows(run.key, number, text, config.batch_size, config.length))
        return moe.train_step(state, batch, hparams=hparams)

    def advance(state: moe.TrainState, start: int, num_steps: int) -> tuple[moe.TrainState, dict[str, np.ndarray]]:
        rows = []
        for number in range(start, start + num_steps):
            state, row = step(state, jnp.int32(number))
            # One step in flight: collectives of two steps on few cores would starve each other.
            rows.append(jax.block_until_ready(row))
        names = {"loss/nats": "loss_nats", "load/max_over_mean": "max_over_mean_load", "gradient/norm": "gradient_norm"}
        return state, {f"folding_{index}/{new}": np.array([row[old] for row in rows]) for old, new in names.items()}

    def init() -> moe.TrainState:
        return moe.init_train_state(run.key, options, folding)

    run.loop(f"folding_{index}", init=init, advance=advance, num_steps=config.num_steps)
    return run.series(f"folding_{index}/loss_nats"), run.series(f"folding_{index}/max_over_mean_load")


STUDY = Study(
    name="text_folding",
    summary="A byte-level mixture of experts learns Python source; folded over eight devices it follows the one-device "
    "model step by step.",
    config=TextFoldingConfig,
    run=run,
    figures=figures,
    presets=PRESETS["text_folding"],
    hparams=TextFoldingHParams,
    headline=("text_folding/final_bits_per_byte", "text_folding/largest_relative_difference"),
    tour=True,
    num_cpu_devices=8,
)
