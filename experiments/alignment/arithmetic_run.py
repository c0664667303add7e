"""One training run on arithmetic, compiled whole: supervised start, rollouts under a rule, evaluated checkpoints.

Shared by the studies ``arithmetic`` (rules side by side), ``families`` (models and tasks side by side) and
``dynamic_against_fixed`` (the seeds protocol).
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.alignment import arithmetic_task as task
from jaxrl_suite import alignment, lm
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.pareto import WeightRule, archive_insert, init_archive
from jaxrl_suite.types import Array, Policy

OBJECTIVES = ("accuracy", "conciseness", "clarity")
FAMILIES: dict[str, dict[str, Any]] = {  # what of the decoder tells families of dense models apart
    "llama": {},
    "qwen2": {"qkv_bias": True, "rope_theta": 1e6, "norm_eps": 1e-6},
    "qwen3": {"qk_norm": True, "rope_theta": 1e6, "norm_eps": 1e-6},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticSizes(Config):
    """Model, supervised start, and length of every run; all runs that are compared share them."""

    estimator: Literal["grpo", "dr_grpo", "rloo", "reinforce"] = field("grpo", help="how advantages are estimated")
    family: Literal["llama", "qwen2", "qwen3"] = field("llama", help="family of the model")
    operation: task.Operation = field("sums", help="what is asked: sums, or products with a factor of one digit")
    digits: int = field(2, help="digits of each summand or of the first factor, 1 or 2")
    width: int = field(64, help="width of the model")
    num_layers: int = field(2, help="layers of the model")
    model_seed: int = field(0, help="seed of the supervised start, which all runs share")
    supervised_steps: int = field(600, help="steps of supervised training on traces of varying length")
    num_steps: int = field(120, help="rollouts of each run")
    num_prompts: int = field(32, help="sums a rollout")
    group_size: int = field(8, help="completions a sum")
    eval_every: int = field(10, help="rollouts between two evaluations")
    num_eval: int = field(256, help="sums of an evaluation, sampled once each")
    learning_rate: float = field(3e-4, help="of Adam in the rollouts")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.digits in (1, 2), argument="digits", value=self.digits, rule="must be 1 or 2")
        for name, least in (("supervised_steps", 1), ("num_steps", 1), ("num_prompts", 1), ("group_size", 2),
                            ("eval_every", 1), ("num_eval", 1)):  # fmt: skip
            check(
                getattr(self, name) >= least, argument=name, value=getattr(self, name), rule=f"must be at least {least}"
            )
        check(self.num_steps % self.eval_every == 0, argument="eval_every", value=self.eval_every,
              rule=f"must divide num_steps={self.num_steps}")  # fmt: skip


class Trace(NamedTuple):
    """What a run leaves; C checkpoints, the start included, and S steps.

    Attributes:
        points: [C, 3], accuracy, 1 - length / longest, clarity; each in [0, 1], larger is better.
        hypervolume: [C], of the archive of the checkpoints so far, above 0.
        tokens: [C], tokens sampled for training so far.
        weights: [S, 3].
        rewards: [S, 3], mean rewards of the rollouts.
    """

    points: Array
    hypervolume: Array
    tokens: Array
    weights: Array
    rewards: Array


def make_model(config: ArithmeticSizes) -> lm.LanguageModel:
    """The small model from scratch; vocabulary of 16."""
    return lm.LanguageModel(lm.LanguageModelConfig(
        vocab_size=task.VOCABULARY, width=config.width, num_layers=config.num_layers, num_heads=4, num_kv_heads=2,
        head_dim=16, ffn_width=2 * config.width, family=config.family, **FAMILIES[config.family],
    ))  # fmt: skip


def supervised_start(config: ArithmeticSizes) -> dict[str, np.ndarray]:
    """A model that adds and shows its work at any length: flattened parameters and the losses in nats."""
    model = make_model(config)
    init_key, data_key = jax.random.split(jax.random.key(config.model_seed))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, config.supervised_steps))

    def step(carry: tuple[Any, Any], t: Array) -> tuple[tuple[Any, Any], Array]:
        params, state = carry
        batch = task.supervised_batch(
            jax.random.fold_in(data_key, t), 128, digits=config.digits, operation=config.operation
        )
        loss, gradient = jax.value_and_grad(lm.supervised_loss)(params, batch, config=model.config)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def train(key: Array) -> tuple[tuple[Any, Any], Array]:
        params = lm.init_params(key, model.config)
        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(config.supervised_steps))

    (params, _), losses = train(init_key)
    return {**{f"params/{k}": np.asarray(v) for k, v in lm.flatten(params).items()}, "losses": np.asarray(losses)}


def start_params(trained: dict[str, np.ndarray]) -> Any:
    """Parameters out of what :func:`supervised_start` returned."""
    return lm.unflatten({k.removeprefix("params/"): jnp.asarray(v) for k, v in trained.items() if k != "losses"})


def make_trainer(
    config: ArithmeticSizes, rule: WeightRule, *, combine: Any = "reward", learning_rate: Any = None
) -> alignment.Trainer:
    """The trainer of a run; generation by scan, so that whole runs compile and vmap. The rate may be traced."""
    plain = lm.policy(make_model(config))

    def generate(*arguments: Any) -> Any:
        return plain.generate(*arguments, loop="scan", unrolled=False)

    return alignment.Trainer(
        policy=Policy(plain.log_probs, generate),
        config=alignment.TrainerConfig(estimator=config.estimator, group_size=config.group_size, combine=combine),
        loss=alignment.LossConfig(kl_kind="none"),
        rule=rule,
        optimizer=optax.adam(config.learning_rate if learning_rate is None else learning_rate),
        sampling=lm.Sampling(max_tokens=task.COMPLETION_LENGTH, stop_tokens=(task.STOP,), pad_token=task.PAD),
    )


def _point(prompts: Array, generation: Any, operation: task.Operation) -> Array:
    correct, length, clear = task.objectives_of(prompts, generation.tokens, generation.mask, operation)
    return jnp.stack([jnp.mean(correct), 1 - jnp.mean(length) / task.COMPLETION_LENGTH, jnp.mean(clear)])


def _evaluate(trainer: alignment.Trainer, config: ArithmeticSizes, params: Any, key: Array) -> Array:
    prompt_key, sample_key = jax.random.split(key)
    prompts, mask = task.draw_prompts(prompt_key, config.num_eval, digits=config.digits, operation=config.operation)
    ids = jnp.arange(config.num_eval, dtype=jnp.int32)
    generation = trainer.policy.generate(sample_key, params, prompts, mask, ids, trainer.sampling)
    return _point(prompts, generation, config.operation)


def train_run(
    trainer: alignment.Trainer, config: ArithmeticSizes, params: Any, key: Array, num_steps: Array | None = None
) -> Trace:
    """A whole run from the supervised start; pure, so it jits and vmaps over keys and over what the rule closes over.

    The weight rule sees the objectives themselves (mean accuracy, length in units of the longest, clarity of the
    rollout); the policy is trained on the paper's three rewards.

    Args:
        trainer: the trainer.
        config: sizes.
        params: the supervised start.
        key: consumed.
        num_steps: int [], after how many of ``config.num_steps`` the run stops, so that runs of several lengths share a
            program; what follows in the trace is 0. A multiple of ``config.eval_every``; by default all.
    """
    state_key, prompt_key, eval_key = jax.random.split(key, 3)
    state = alignment.init_trainer(state_key, trainer, params, num_objectives=3)
    rounds = config.num_steps // config.eval_every

    def step(carry: tuple[Any, Array], _: None) -> tuple[tuple[Any, Array], tuple[Array, Array]]:
        state, tokens = carry
        step_key = jax.random.fold_in(prompt_key, state.step)
        prompts, mask = task.draw_prompts(
            step_key, config.num_prompts, digits=config.digits, operation=config.operation
        )
        repeated = jnp.repeat(prompts, config.group_size, axis=0)
        generation = alignment.rollout(trainer, state, prompts, mask)
        lengths = alignment.update_running_mean(state.lengths, jnp.sum(generation.mask, axis=1))
        rewards = task.rewards_of(repeated, generation.tokens, generation.mask, lengths, config.operation)
        state, metrics = alignment.update(
            trainer, state, prompts, mask, generation, rewards.reshape(3, config.num_prompts, config.group_size),
            objectives=_point(repeated, generation, config.operation),
        )  # fmt: skip
        return (state, tokens + jnp.sum(generation.mask)), (metrics.weights, metrics.reward_mean)

    def steps(carry: tuple[Any, Array]) -> tuple[tuple[Any, Array], tuple[Array, Array]]:
        return jax.lax.scan(step, carry, length=config.eval_every)

    def block(carry: tuple[Any, Any, Array], index: Array) -> tuple[tuple[Any, Any, Array], Any]:
        # The start is a block without steps: evaluation, half of the program, is compiled once.
        state, archive, tokens = carry
        seen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(steps, (state, tokens))[1])
        (state, tokens), seen = jax.lax.cond(index > 0, steps, lambda same: (same, seen), (state, tokens))
        point = _evaluate(trainer, config, state.params, eval_key)
        archive, gain, _overflow = archive_insert(archive, point, label=state.step)
        return (state, archive, tokens), (point, gain, tokens, *seen)

    def block_in_time(carry: tuple[Any, Any, Array], index: Array) -> tuple[tuple[Any, Any, Array], Any]:
        if num_steps is None:
            return block(carry, index)
        found = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(block, carry, index)[1])
        running = index * config.eval_every <= num_steps
        return jax.lax.cond(running, block, lambda same, _: (same, found), carry, index)

    carry = state, init_archive(rounds + 1, jnp.zeros(3)), jnp.zeros((), jnp.int32)
    _, (points, gains, counts, weights, rewards) = jax.lax.scan(block_in_time, carry, jnp.arange(rounds + 1))
    return Trace(
        points=points,
        hypervolume=jnp.cumsum(gains),
        tokens=counts,
        weights=weights[1:].reshape(-1, 3),
        rewards=rewards[1:].reshape(-1, 3),
    )
