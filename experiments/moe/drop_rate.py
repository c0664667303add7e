"""Copies that a capacity drops, and what they cost: which copies are kept, and over which tokens that is decided."""

import dataclasses
import itertools
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
from jaxrl_suite.lm.feed_forward import router_logits
from jaxrl_suite.moe.layer import make_experts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLICIES = ("probs", "position")
SCOPES = ("rank", "sequence")
NAMES = {"rank": "each rank's tokens", "sequence": "whole sequences"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropRateConfig(Config):
    """Model, text and capacities."""

    factors: str = field("0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4", help="capacity factors, separated by commas")
    ranks: int = field(8, help="context times tensor ranks that share a sequence; 'rank' decides within each part")
    num_steps: int = field(400, help="optimizer steps of the dropless training before")
    num_batches: int = field(8, help="held-out batches")
    batch_size: int = field(8, help="sequences of a batch")
    length: int = field(128, help="bytes of a sequence")
    num_bytes: int = field(1_000_000, help="bytes of text, from the Python standard library's own source")
    num_layers: int = field(2, help="blocks of the model")
    width: int = field(64, help="width of the model")
    num_experts: int = field(8, help="experts of a layer")
    balance_coef: float = field(0.01, help="weight of the balancing loss while training")

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.ranks >= 1 and self.length % self.ranks == 0
        check(divides, argument="ranks", value=self.ranks, rule=f"must divide length={self.length}")
        check(min(self.values) > 0, argument="factors", value=self.factors, rule="must be positive")

    @property
    def values(self) -> list[float]:
        """The capacity factors as numbers."""
        return [float(part) for part in self.factors.split(",") if part.strip()] or [0.0]


class DropRateHParams(NamedTuple):
    """Learning rate.

    learning_rate: step of AdamW of the training before.
    """

    learning_rate: float = 3e-3


class Dropped(NamedTuple):
    """What one layer loses; scalars, and one number a sequence of the batch.

    Attributes:
        copies: share of the copies that are dropped.
        weight: share of the combine weight that is dropped.
        tokens: share of the tokens that lose every copy.
        by_row: share of the copies dropped in each sequence of the batch, [B].
    """

    copies: jax.Array
    weight: jax.Array
    tokens: jax.Array
    by_row: jax.Array


def run(run: Run) -> Result:
    """Trains a dropless model, then runs it on held-out text under every capacity, policy and scope."""
    config: Any = run.config
    model = byte_mixture(config)
    text = jnp.asarray(source_bytes(config.num_bytes))
    split = int(0.9 * text.shape[0])
    rate = float(np.asarray(run.hparams.learning_rate).reshape(-1)[0])
    params = run.stage("train", lambda: lm.flatten(_train(run, config, model, text[:split], rate)))
    params = lm.unflatten({path: jnp.asarray(leaf) for path, leaf in params.items()})
    kinds = list(itertools.product(POLICIES, SCOPES))
    measured = run.stage("measure", lambda: _measure(run, config, model, params, text[split:], kinds))
    summary: dict[str, Any] = {"drop_rate/dropless/bits_per_byte": float(measured["dropless"] / np.log(2))}
    near = int(np.argmin(np.abs(np.array(config.values) - 1.25)))
    for index, (policy, scope) in enumerate(kinds):
        name = f"drop_rate/{policy}/{scope}"
        summary[f"{name}/copies_dropped"] = float(measured["copies"][index, near])
        summary[f"{name}/weight_dropped"] = float(measured["weight"][index, near])
        extra = measured["loss"][index, near] - measured["dropless"]
        summary[f"{name}/extra_bits_per_byte"] = float(extra / np.log(2))
    summary["drop_rate/capacity_factor"] = config.values[near]
    arrays = {**measured, "factors": np.array(config.values), "kinds": np.array([" ".join(kind) for kind in kinds])}
    return Result(summary, arrays)


def capacity_feed_forward(model: lm.LanguageModelConfig, policy: Any, parts: int, capacity: jax.Array) -> Any:
    """The sparse layer of one device with the drops of ``parts`` ranks that share each sequence.

    Args:
        model: shape.
        policy: "probs" or "position".
        parts: ranks, each with an equal run of every sequence; 1 decides over the whole batch.
        capacity: slots of an expert and part, int32 []; traced, so that all capacities share a program.

    Returns:
        ``(params, x [B, T, D]) -> (y, Dropped)``.
    """
    options, num_experts = moe.MoEConfig(model=model, block_rows=32), model.num_experts

    def feed_forward(params: Any, x: jax.Array) -> tuple[jax.Array, Dropped]:
        tokens = x.reshape(-1, x.shape[-1])
        routing = moe.route(router_logits(params, tokens, model), model, params.get("router_bias"))
        keep = keep_in_parts(routing.experts, routing.weights, x.shape[:2], num_experts, capacity, policy, parts)
        y, _ = moe.dispatch(
            "padded",
            tokens,
            routing.experts,
            routing.weights,
            keep,
            make_experts(params["experts"], options),
            num_experts=num_experts,
        )
        lost = ~keep
        dropped = Dropped(
            lost.mean(),
            jnp.sum(routing.weights * lost) / jnp.sum(routing.weights),
            lost.all(axis=1).mean(),
            lost.reshape(x.shape[0], -1).mean(axis=1),
        )
        return y.reshape(x.shape), dropped

    return feed_forward


def keep_in_parts(
    experts: jax.Array,
    weights: jax.Array,
    shape: tuple[int, ...],
    num_experts: int,
    capacity: jax.Array,
    policy: Any,
    parts: int,
) -> jax.Array:
    """Which copies [B · T, k] survive when ranks decide on their own part of every sequence."""
    batch, length = shape

    def to_parts(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(batch, parts, length // parts, -1).swapaxes(0, 1).reshape(parts, -1, leaf.shape[-1])

    rank = jax.vmap(lambda e, w: moe.rank_in_expert(e, w, num_experts, policy))(to_parts(experts), to_parts(weights))
    keep = (rank < capacity).reshape(parts, batch, length // parts, -1).swapaxes(0, 1)
    return keep.reshape(experts.shape)


def _measure(
    run: Run, config: Any, model: lm.LanguageModelConfig, params: Any, text: jax.Array, kinds: list
) -> dict[str, np.ndarray]:
    """Loss and drops of every kind and capacity on held-out text, averaged over layers and batches."""

    def evaluate(capacity: jax.Array, tokens: jax.Array, policy: str, parts: int) -> tuple[jax.Array, Dropped]:
        slot = capacity_feed_forward(model, policy, parts, capacity)
        x, dropped = lm.forward(params, tokens[:, :-1], config=model, feed_forward=slot)
        logits = lm.head(params, x, config=model)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        return loss, jax.tree.map(lambda leaf: leaf.mean(axis=0), dropped)

    evaluate = jax.jit(evaluate, static_argnames=("policy", "parts"))
    key = jax.random.fold_in(run.key, 1)
    batches = [windows(key, index, text, config.batch_size, config.length) for index in range(config.num_batches)]
    num_tokens = config.batch_size * config.length
    rows = []
    for policy, scope in kinds:
        parts = config.ranks if scope == "rank" else 1
        for factor in config.values:
            slots = moe.expert_capacity(num_tokens // parts, model.num_experts, model.experts_per_token, factor)
            values = [evaluate(jnp.int32(slots), tokens, policy=policy, parts=parts) for tokens in batches]
            rows.append(jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *values))
    whole = jnp.int32(num_tokens)
    dropless = np.mean([evaluate(whole, tokens, policy="probs", parts=1)[0] for tokens in batches])
    losses, drops = zip(*rows, strict=True)
    shape = (len(kinds), len(config.values))
    stacked = {name: np.stack([getattr(drop, name) for drop in drops]) for name in Dropped._fields}
    stacked = {name: leaf.reshape(*shape, *leaf.shape[1:]) for name, leaf in stacked.items()}
    return {**stacked, "loss": np.array(losses).reshape(shape), "dropless": np.asarray(dropless)}


def _train(run: Run, config: Any, model: lm.LanguageModelConfig, text: jax.Array, rate: float) -> Any:
    options = moe.MoEConfig(model=model, balance="global", block_rows=32)
    hparams = moe.HParams(learning_rate=rate, balance_coef=config.balance_coef)
    state = moe.init_train_state(run.key, options, moe.Folding())

    @jax.jit
    def step(state: moe.TrainState, number: jax.Array) -> moe.TrainState:
        batch = moe.language_batch(windows(run.key, number, text, config.batch_size, config.length))
        return moe.train_step(state, batch, hparams=hparams)[0]

    for number in run.progress(range(config.num_steps), "dropless training"):
        state = step(state, jnp.int32(number))
    return jax.tree.map(np.asarray, state.params)


def figures(result: Result) -> "dict[str, Figure]":
    """Copies and weight dropped, loss, and which sequences of the batch lose most."""
    arrays = result.arrays
    factors, kinds = arrays["factors"], [str(kind).split(" ") for kind in arrays["kinds"]]
    figure, axes = plots.new_figure(11.5, 4.0, ncols=3, title="What a capacity drops, and what that costs")
    share, loss, place = axes
    for index, (policy, scope) in enumerate(kinds):
        style = {**plots.series_style(index), "linewidth": 1.3, "markersize": 4}
        label = f"{policy}, over {NAMES[scope]}"
        share.plot(factors, 100 * arrays["weight"][index], label=label, **style)
        loss.plot(factors, (arrays["loss"][index] - arrays["dropless"]) / np.log(2), label=label, **style)
        near = int(np.argmin(np.abs(factors - 1)))
        rows = arrays["by_row"][index, near]
        place.plot(np.arange(1, len(rows) + 1), 100 * rows, label=label, **style)
    for scope, line in zip(SCOPES, ("--", ":"), strict=True):
        index = [s for _, s in kinds].index(scope)
        label = f"copies, over {NAMES[scope]}"
        share.plot(factors, 100 * arrays["copies"][index], color="#777777", linestyle=line, label=label)
    share.set_ylabel("combine weight (or copies) dropped (%)")
    loss.set_ylabel("extra loss (bits per byte)")
    place.set_ylabel(f"copies dropped at factor {factors[near]:g} (%)")
    for panel in (share, loss):
        panel.set_xlabel("capacity factor")
    loss.axhline(0, color="#999999", linewidth=1, linestyle=":")
    place.set_xlabel("sequence of the batch")
    for panel in (share, place):
        panel.set_ylim(bottom=0)
    share.legend(fontsize=7, frameon=False)
    return {"drop_rate": figure}


STUDY = Study(
    name="drop_rate",
    summary="Copies dropped, combine weight dropped and loss of a trained byte model against capacity: kept by "
    "probability or by position, decided on each rank or over whole sequences.",
    config=DropRateConfig,
    run=run,
    figures=figures,
    presets=PRESETS["drop_rate"],
    hparams=DropRateHParams,
    headline=("drop_rate/probs/rank/copies_dropped", "drop_rate/probs/rank/extra_bits_per_byte"),
)
