"""Supervised training on a text: a small byte model from scratch, or a real model, whole or by low-rank differences."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.corpus import source_bytes
from experiments.common.run import Run
from experiments.common.study import Result, Study
from experiments.lm.presets import PRESETS
from jaxrl_suite import lm
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.io import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Config):
    """Text, model and training."""

    data: str = field("", help="text file to learn; empty for the Python standard library's own source")
    model: str = field("", help="model to start from (Hugging Face folder or GGUF); empty for a new byte model")
    export: str = field("", help="folder to write the trained model to, as transformers reads it; empty for none")
    num_steps: int = field(300, help="optimizer steps")
    batch_size: int = field(16, help="rows of a step")
    accumulate: int = field(1, help="micro-batches of a step")
    length: int = field(128, help="tokens of a row")
    lora_rank: int = field(0, help="rank of low-rank differences; 0 trains every parameter")
    num_bytes: int = field(1_000_000, help="bytes of the default text")
    num_layers: int = field(2, help="blocks of a new model")
    width: int = field(96, help="width of a new model")
    prompt: str = field("def ", help="beginning of the sample that is drawn at the end")
    sample_tokens: int = field(100, help="tokens of that sample")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_steps", "batch_size", "accumulate", "length", "num_layers", "width", "sample_tokens"):
            value = getattr(self, name)
            check(value > 0, argument=name, value=value, rule="must be positive")
        divides = self.batch_size % self.accumulate == 0
        check(divides, argument="accumulate", value=self.accumulate, rule=f"must divide batch_size={self.batch_size}")
        check(self.width % 32 == 0, argument="width", value=self.width, rule="must be a multiple of 32")
        free = not self.export or not Path(self.export).exists()
        check(free, argument="export", value=self.export, rule="exists", remedy="Give another name")
        check(bool(self.prompt), argument="prompt", value=self.prompt, rule="must not be empty")


class FinetuneHParams(NamedTuple):
    """Optimiser.

    learning_rate: step of AdamW, warmed up over a tenth of the steps.
    weight_decay: of AdamW.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 0.01


class _Setting(NamedTuple):
    model: lm.LanguageModel
    tokenizer: Any
    base: Any  # pretrained parameters, or None
    lora: lm.LoraConfig | None
    rows: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float


def run(run: Run) -> Result:
    """Trains every point of the sweep and every seed, and scores each on text that it has not seen."""
    config: Any = run.config
    setting = _prepare(run)
    lanes = run.num_sweep * run.num_seeds
    single = setting.base is None or lanes == 1
    check(single, argument="num_seeds", value=lanes, rule="a pretrained model is trained once a run")
    keys = jnp.broadcast_to(run.keys[None], (run.num_sweep, run.num_seeds)).reshape(-1)
    lane_values: Any = [jnp.repeat(jnp.asarray(value), run.num_seeds) for value in run.hparams]
    hparams: Any = FinetuneHParams(*lane_values)
    advance = functools.partial(_advance, setting=setting, config=config, keys=keys, hparams=hparams)
    before = run.stage("before", lambda: {"held_out": _score(_init(keys, hparams, setting, config), setting)})
    state = run.loop(
        "training", init=lambda: _init(keys, hparams, setting, config), advance=advance, num_steps=config.num_steps
    )
    after = _score(state, setting)
    best = int(np.argmin(after))
    params = _parameters(jax.tree.map(lambda leaf: leaf[best], state.params), setting)
    text = _sample(run.key, params, setting, config)
    if config.export:
        lm.save_pretrained(config.export, lm.Pretrained(setting.model, params, setting.model.config, setting.tokenizer))
    scale = 1 / (math.log(2) * setting.bytes_per_token)
    losses = run.series("loss/nats_per_token").reshape(config.num_steps, lanes)
    summary: dict[str, Any] = {
        "finetune/held_out_bits_per_byte_before": float(before["held_out"][best] * scale),
        "finetune/held_out_bits_per_byte_after": float(after[best] * scale),
        "finetune/trained_parameters": sum(leaf[0].size for leaf in jax.tree.leaves(state.params)),
        "finetune/sample": text,
    }
    if run.num_sweep > 1:
        summary["finetune/best_learning_rate"] = float(hparams.learning_rate[best])
    arrays = {"bits_per_byte": losses * scale, "before": before["held_out"] * scale, "after": after * scale}
    return Result(summary, arrays)


def _prepare(run: Run) -> _Setting:
    config: Any = run.config
    if config.data:
        data = Path(config.data).read_bytes()
    else:
        data = source_bytes(config.num_bytes).tobytes()
    lora = lm.LoraConfig(rank=config.lora_rank, alpha=2.0 * config.lora_rank) if config.lora_rank else None
    if config.model:
        pretrained = lm.load_pretrained(config.model)
        model, base = pretrained.model, pretrained.params
        tokenizer: Any = pretrained.tokenizer
        named = tokenizer is not None
        check(named, argument="model", value=config.model, rule="holds no tokenizer", remedy="Add its tokenizer.json")
        tokens = tokenizer.encode(data.decode("utf-8", errors="replace"))
    else:
        heads = config.width // 32
        shape = lm.LanguageModelConfig(
            vocab_size=lm.ByteTokenizer.vocab_size, width=config.width, num_layers=config.num_layers, num_heads=heads,
            num_kv_heads=heads, head_dim=32, ffn_width=4 * config.width, max_length=config.length,
        )  # fmt: skip
        model, tokenizer, base = lm.LanguageModel(shape), lm.ByteTokenizer(), None
        check(lora is None, argument="lora_rank", value=config.lora_rank, rule="needs a model to start from")
        tokens = list(data)
    rows = lm.text_rows(tokens, config.length)
    enough = len(rows) >= 10
    check(enough, argument="data", value=config.data, rule=f"gives only {len(rows)} rows", remedy="Lower --length")
    border = max(1, len(rows) // 10)
    held_out = rows[-border:][: 4 * config.batch_size]
    return _Setting(model, tokenizer, base, lora, rows[:-border], held_out, len(data) / len(tokens))


def _optimizer(hparams: FinetuneHParams, num_steps: int) -> optax.GradientTransformation:
    def rate(step: Any) -> jax.Array:
        return hparams.learning_rate * jnp.minimum(1.0, (step + 1) / max(1, num_steps // 10))

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=hparams.weight_decay))


def _init(keys: jax.Array, hparams: FinetuneHParams, setting: _Setting, config: Any) -> lm.SupervisedState:
    def one(key: jax.Array, hparams: FinetuneHParams) -> lm.SupervisedState:
        if setting.lora is not None:
            params = lm.init_lora(key, setting.base, setting.lora)
        else:
            params = lm.init_params(key, setting.model.config) if setting.base is None else setting.base
        return lm.init_supervised(params, _optimizer(hparams, config.num_steps))

    return jax.jit(jax.vmap(one))(keys, hparams)


def _advance(
    state: Any, start: int, num_steps: int, *, setting: _Setting, config: Any, keys: jax.Array, hparams: FinetuneHParams
) -> tuple[Any, dict[str, jax.Array]]:
    rows = jnp.asarray(setting.rows)
    state, metrics = _train(
        state, start, rows, keys, hparams, setting.base if setting.lora else None,
        num_steps=num_steps, total_steps=config.num_steps, batch_size=config.batch_size,
        accumulate=config.accumulate, model=setting.model.config, lora=setting.lora,
    )  # fmt: skip
    return state, {name: value.squeeze(1) if value.shape[1] == 1 else value for name, value in metrics.items()}


@functools.partial(jax.jit, static_argnames=("num_steps", "total_steps", "batch_size", "accumulate", "model", "lora"))
def _train(
    state: Any, start: int, rows: jax.Array, keys: jax.Array, hparams: FinetuneHParams, base: Any, *,
    num_steps: int, total_steps: int, batch_size: int, accumulate: int, model: lm.LanguageModelConfig,
    lora: lm.LoraConfig | None,
) -> tuple[Any, dict[str, jax.Array]]:  # fmt: skip
    def one(state: Any, key: jax.Array, hparams: FinetuneHParams, step: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        chosen = jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, rows.shape[0])
        batch = lm.SupervisedBatch(rows[chosen], jnp.ones((batch_size, rows.shape[1])))
        return lm.supervised_step(
            state, batch, config=model, optimizer=_optimizer(hparams, total_steps), accumulate=accumulate,
            base=base, lora=lora,
        )  # fmt: skip

    def body(state: Any, step: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        return jax.vmap(one, in_axes=(0, 0, 0, None))(state, keys, hparams, step)

    return jax.lax.scan(body, state, start + jnp.arange(num_steps))


def _parameters(trained: Any, setting: _Setting) -> Any:
    return trained if setting.lora is None else lm.merge_lora(setting.base, trained, setting.lora)


def _score(state: Any, setting: _Setting) -> np.ndarray:
    """Mean nats a token on the held-out rows, one a lane."""

    @jax.jit
    def one(trained: Any) -> jax.Array:
        params = _parameters(trained, setting)
        batch = lm.SupervisedBatch(jnp.asarray(setting.held_out), jnp.ones(setting.held_out.shape))
        return lm.supervised_loss(params, batch, config=setting.model.config)

    count = jax.tree.leaves(state.params)[0].shape[0]
    return np.array([one(jax.tree.map(lambda leaf, i=i: leaf[i], state.params)) for i in range(count)])


def _sample(key: jax.Array, params: Any, setting: _Setting, config: Any) -> str:
    prompt = setting.tokenizer.encode(config.prompt)
    prompts, mask = lm.left_pad([prompt])
    stops = setting.tokenizer.stop_tokens
    sampling = lm.Sampling(max_tokens=config.sample_tokens, temperature=0.8, stop_tokens=stops)
    row = np.zeros(1, np.int32)
    out = lm.generate(key, setting.model, params, prompts, mask, row_ids=row, sampling=sampling, unrolled=False)
    return config.prompt + setting.tokenizer.decode(np.asarray(out.tokens[0])[np.asarray(out.mask[0])])


def figures(result: Result) -> dict[str, "Figure"]:
    """Loss over steps, with the held-out loss before and after."""
    curves = result.arrays["bits_per_byte"]
    figure, axes = plots.new_figure(6.0, 3.6, title="Learning a text")
    for lane in range(curves.shape[1]):
        axes.plot(
            np.arange(1, len(curves) + 1), curves[:, lane], label=f"training, lane {lane}" if lane else "training"
        )
    axes.axhline(float(result.arrays["before"].min()), linestyle=":", color="0.5", label="held out, before")
    axes.axhline(float(result.arrays["after"].min()), linestyle="--", color="0.3", label="held out, after (best lane)")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (bits per byte)")
    axes.legend()
    return {"loss": figure}


STUDY = Study(
    name="finetune",
    summary="A model learns a text: bits per byte on a held-out part before and after, and a sample.",
    config=FinetuneConfig,
    hparams=FinetuneHParams,
    run=run,
    figures=figures,
    presets=PRESETS["finetune"],
    headline=("finetune/held_out_bits_per_byte_before", "finetune/held_out_bits_per_byte_after"),
    tour=True,
)
