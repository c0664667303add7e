"""A dense model that trains on, and the sparse one upcycled from it, at equal tokens."""

import dataclasses
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.corpus import source_bytes
from experiments.common.run import Run
from experiments.common.study import Result, Study
from experiments.moe.corpus import windows
from experiments.moe.presets import PRESETS
from jaxrl_suite import lm, moe
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.io import plots
from jaxrl_suite.moe.upcycling import upcycled_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("dense", "upcycled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycledConfig(Config):
    """Dense model, sparse shape, text."""

    model: str = field("", help="GGUF file or Hugging Face folder of the dense model; empty trains a byte model first")
    num_experts: int = field(8, help="experts of a layer")
    experts_per_token: int = field(2, help="experts of a token; the granularity keeps the dense model's work a token")
    granularity: int = field(2, help="slices that each dense feed-forward is cut into")
    num_steps: int = field(200, help="optimizer steps of both models")
    batch_size: int = field(8, help="sequences of a step")
    length: int = field(128, help="tokens of a sequence")
    evaluate_every: int = field(20, help="steps between evaluations on held-out text")
    num_batches: int = field(8, help="held-out batches")
    num_bytes: int = field(1_000_000, help="bytes of text, from the Python standard library's own source")
    dense_steps: int = field(300, help="optimizer steps of the byte model before (without --model)")
    width: int = field(64, help="width of the byte model")
    num_layers: int = field(2, help="blocks of the byte model")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_steps", "evaluate_every", "num_batches"):
            check(getattr(self, name) > 0, argument=name, value=getattr(self, name), rule="must be positive")
        whole = self.experts_per_token % self.granularity == 0 and self.num_experts % self.granularity == 0
        rule = f"experts_per_token={self.experts_per_token} and num_experts={self.num_experts} must be multiples"
        check(whole, argument="granularity", value=self.granularity, rule=rule, remedy="Whole copies are chosen then")


class UpcycledHParams(NamedTuple):
    """Rates.

    learning_rate: step of AdamW of both models.
    dense_rate: step of AdamW of the byte model's training before.
    balance_coef: weight of the balancing loss of the sparse model.
    """

    learning_rate: float = 1e-3
    dense_rate: float = 3e-3
    balance_coef: float = 0.01


def run(run: Run) -> Result:
    """Dense and upcycled from the same weights, on the same batches; losses on the same held-out text."""
    config: Any = run.config
    values = {name: float(np.asarray(value).reshape(-1)[0]) for name, value in run.hparams._asdict().items()}
    dense, params, tokenizer = _dense(run, config, values)
    text = _tokens(config, tokenizer)
    sparse = upcycled_config(
        dense,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        granularity=config.granularity,
    )

    def start(kind: str) -> moe.TrainState:
        weights = params if kind == "dense" else moe.upcycle(jax.random.fold_in(run.key, 1), params, dense, sparse)
        options = moe.MoEConfig(model=dense if kind == "dense" else sparse, balance="global")
        return moe.state_from_params(weights, options, moe.Folding())

    curves = {kind: run.stage(kind, lambda kind=kind: _train(run, kind, start(kind), text, values)) for kind in KINDS}
    first = [curves[kind]["held_out_nats"][0] for kind in KINDS]
    last = [curves[kind]["held_out_nats"][-1] for kind in KINDS]
    summary: dict[str, Any] = {
        "upcycled/parameters_dense": lm.num_parameters(dense),
        "upcycled/parameters_upcycled": lm.num_parameters(sparse),
        "upcycled/first_difference_nats": float(abs(first[1] - first[0])),
        "upcycled/held_out_before_nats": float(first[0]),
        "upcycled/held_out_dense_nats": float(last[0]),
        "upcycled/held_out_upcycled_nats": float(last[1]),
        "upcycled/gain_nats": float(last[0] - last[1]),
        "upcycled/tokens": config.num_steps * config.batch_size * config.length,
    }
    for kind in KINDS:
        summary[f"upcycled/step_{kind}_seconds"] = float(np.median(curves[kind]["seconds"][1:]))
    summary["upcycled/max_over_mean_load"] = float(curves["upcycled"]["load"][-1])
    arrays = {f"{kind}/{name}": value for kind in KINDS for name, value in curves[kind].items()}
    return Result(summary, {**arrays, "tokens_of_a_step": np.array(config.batch_size * config.length)})


def _dense(run: Run, config: Any, values: dict[str, float]) -> tuple[lm.LanguageModelConfig, Any, Any]:
    """Shape, weights and tokenizer of the dense model: a pretrained one, or a byte model trained here."""
    if config.model:
        loaded = lm.load_pretrained(config.model)
        return loaded.config, loaded.params, loaded.tokenizer
    model = lm.LanguageModelConfig(
        vocab_size=256,
        width=config.width,
        num_layers=config.num_layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=config.width // 4,
        ffn_width=2 * config.width,
    )

    def train() -> dict[str, np.ndarray]:
        state = moe.init_train_state(run.key, moe.MoEConfig(model=model), moe.Folding())
        text, hparams = _tokens(config, None), moe.HParams(learning_rate=values["dense_rate"])
        for index in run.progress(range(config.dense_steps), "dense byte model"):
            tokens = windows(jax.random.fold_in(run.key, 2), index, text[0], config.batch_size, config.length)
            state, _ = moe.train_step(state, moe.language_batch(tokens), hparams=hparams)
        return {path: np.asarray(leaf) for path, leaf in lm.flatten(state.params).items()}

    leaves = run.stage("dense_model", train)
    return model, lm.unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()}), None


def _tokens(config: Any, tokenizer: Any) -> tuple[jax.Array, jax.Array]:
    """Training and held-out tokens: the last tenth of the text is held out."""
    raw = source_bytes(config.num_bytes)
    if tokenizer is not None:
        raw = np.asarray(tokenizer.encode(raw.tobytes().decode("utf-8", errors="replace")), np.int32)
    split = int(0.9 * len(raw))
    return jnp.asarray(raw[:split]), jnp.asarray(raw[split:])


def _train(
    run: Run, kind: str, state: moe.TrainState, text: tuple[jax.Array, jax.Array], values: dict[str, float]
) -> dict[str, np.ndarray]:
    """Held-out loss every few steps, training loss and seconds of each step."""
    config: Any = run.config
    hparams = moe.HParams(learning_rate=values["learning_rate"], balance_coef=values["balance_coef"])
    log_probs = moe.policy(state.config, state.folding).log_probs
    key = jax.random.fold_in(run.key, 3)
    tests = [windows(key, index, text[1], config.batch_size, config.length) for index in range(config.num_batches)]

    def held_out(params: Any) -> float:
        return float(np.mean([-np.asarray(log_probs(params, tokens, None))[:, 1:].mean() for tokens in tests]))

    losses, seconds, loads, held, steps = [], [], [], [held_out(state.params)], [0]
    for number in run.progress(range(config.num_steps), f"{kind} model"):
        batch = moe.language_batch(windows(run.key, number, text[0], config.batch_size, config.length))
        began = time.perf_counter()
        state, row = jax.block_until_ready(moe.train_step(state, batch, hparams=hparams))
        seconds.append(time.perf_counter() - began)
        losses.append(float(row["loss/nats"]))
        loads.append(float(row["load/max_over_mean"]))
        if (number + 1) % config.evaluate_every == 0 or number + 1 == config.num_steps:
            held.append(held_out(state.params))
            steps.append(number + 1)
    return {
        "loss_nats": np.array(losses),
        "seconds": np.array(seconds),
        "load": np.array(loads),
        "held_out_nats": np.array(held),
        "steps": np.array(steps),
    }


def figures(result: Result) -> "dict[str, Figure]":
    """Held-out loss of both against tokens."""
    arrays, tokens = result.arrays, int(result.arrays["tokens_of_a_step"])
    figure, axes = plots.new_figure(6.8, 4.2, title="Upcycled from a dense model, against training the dense one on")
    for index, kind in enumerate(KINDS):
        style = {**plots.series_style(index), "markersize": 4}
        axes.plot(arrays[f"{kind}/steps"] * tokens, arrays[f"{kind}/held_out_nats"], label=f"{kind}, held out", **style)
        noisy = arrays[f"{kind}/loss_nats"]
        window = max(1, len(noisy) // 20)
        smooth = np.convolve(noisy, np.ones(window) / window, mode="valid")
        where = np.arange(window, len(noisy) + 1) * tokens
        axes.plot(where, smooth, color=plots.colours()[index], linewidth=0.8, alpha=0.5, label=f"{kind}, training")
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(fontsize=9, frameon=False)
    return {"upcycled": figure}


STUDY = Study(
    name="upcycled",
    summary="A sparse model upcycled from a dense one against the dense one trained on, at equal tokens: the same "
    "function at the start, four times the feed-forward weights, the same work a token.",
    config=UpcycledConfig,
    run=run,
    figures=figures,
    presets=PRESETS["upcycled"],
    hparams=UpcycledHParams,
    headline=("upcycled/held_out_dense_nats", "upcycled/held_out_upcycled_nats"),
)
