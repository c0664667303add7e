"""A mixture-of-experts policy trained by the alignment trainer, on one device or folded over several.

Nothing in the trainer knows of devices: it sees a ``Policy`` and parameters. What a folding adds is where arrays lie:
parameters and moments keep the layout of training between steps, and ``merge``, which the trainer calls before it
samples, moves the parameters to the layout of decoding.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.alignment import arithmetic_task as task
from jaxrl_suite import alignment, lm, moe, pareto
from jaxrl_suite.config import check
from jaxrl_suite.moe.partition import stored_shardings
from jaxrl_suite.moe.upcycling import upcycled_config
from jaxrl_suite.types import Array, Generation, Params, Policy

OBJECTIVES = ("accuracy", "conciseness", "clarity")

# rewards(prompts [B * G, P], generation, running mean of lengths) -> [3, B * G]
Rewards = Callable[[Array, Generation, alignment.RunningMean], Array]


class Side(NamedTuple):
    """One way of running the same training.

    Attributes:
        trainer: the trainer.
        place: puts a state of any layout where this side keeps it.
        step: ``step(state, prompts, mask) -> (state, generation, metrics)``; the moments of the given state are gone.
    """

    trainer: alignment.Trainer
    place: Callable[[alignment.TrainerState], alignment.TrainerState]
    step: Callable[[alignment.TrainerState, Array, Array], tuple[alignment.TrainerState, Generation, Any]]


def upcycled(
    key: Array, params: Params, dense: lm.LanguageModelConfig, *, num_experts: int, experts_per_token: int
) -> tuple[Params, lm.LanguageModelConfig]:
    """A dense model as a mixture of experts that computes the same at first."""
    sparse = upcycled_config(dense, num_experts=num_experts, experts_per_token=experts_per_token)
    return moe.upcycle(key, params, dense, sparse), sparse


def task_rewards(prompts: Array, generation: Generation, lengths: alignment.RunningMean) -> Array:
    """The three rewards of the synthetic sums."""
    return task.rewards_of(prompts, generation.tokens, generation.mask, lengths)


def make_side(
    model: lm.LanguageModelConfig,
    folding: moe.Folding | None,
    rewards: Rewards,
    sampling: lm.Sampling,
    *,
    group_size: int,
    learning_rate: float,
    rate: float,
    host: bool = False,
) -> Side:
    """GRPO with influence weights on one device (``folding=None``: the decoder of ``lm``) or under a folding.

    Args:
        model: shape of the mixture.
        folding: degrees over the devices.
        rewards: three rewards of each completion.
        sampling: law and length of completions.
        group_size: completions a prompt.
        learning_rate: of Adam.
        rate: exponent scale of the influence weights.
        host: whether ``rewards`` runs on the host.
    """
    if folding is None:
        plain = lm.policy(lm.LanguageModel(model))

        def generate(*arguments: Any) -> Generation:
            return plain.generate(*arguments, loop="scan", unrolled=False)

        policy, merge = Policy(plain.log_probs, generate), None
    else:
        config, over = moe.MoEConfig(model=model, block_rows=8), folding
        policy = moe.policy(config, over)

        def merge(params: Params, reference: Any) -> Params:
            del reference
            return moe.to_decode(params, config, over)

    trainer = alignment.Trainer(
        policy=policy,
        config=alignment.TrainerConfig(group_size=group_size, combine="advantage"),
        loss=alignment.LossConfig(kl_kind="none"),
        rule=pareto.influence_weights(jnp.full(3, 1 / 3), rate, max_log_step=0.3),
        # A router between equal experts has no gradient but rounding, which Adam's usual eps of 1e-8 would scale up to
        # whole steps of its own on either side.
        optimizer=optax.adam(learning_rate, eps=1e-5),
        sampling=sampling,
        merge=merge,
    )
    place = _placer(model, folding)

    def whole(
        moments: Any, rest: alignment.TrainerState, prompts: Array, mask: Array, generation: Generation, scores: Array
    ) -> Any:
        grouped = scores.reshape(3, prompts.shape[0], group_size)
        return alignment.update(trainer, rest._replace(optimizer=moments), prompts, mask, generation, grouped)

    score = rewards if host else jax.jit(rewards)
    compiled: list[Any] = []

    def step(state: alignment.TrainerState, prompts: Array, mask: Array) -> Any:
        generation = alignment.rollout(trainer, state, prompts, mask)
        lengths = alignment.update_running_mean(state.lengths, jnp.sum(generation.mask, axis=1))
        scores = score(jnp.repeat(prompts, group_size, axis=0), generation, lengths)
        if not compiled:
            layout = None if folding is None else jax.tree.map(lambda leaf: leaf.sharding, state)
            # Without fixed output layouts XLA would choose its own, and the second step would be compiled again.
            # Moments are donated: they are two thirds of the state, and nobody but the state holds them.
            shardings = None if layout is None else (layout, None)
            compiled.append(jax.jit(whole, donate_argnums=0, out_shardings=shardings))
        rest = state._replace(optimizer=None)
        state, metrics = compiled[0](state.optimizer, rest, prompts, mask, generation, scores)
        return jax.block_until_ready((state, generation, metrics))

    return Side(trainer, place, step)


def _placer(
    model: lm.LanguageModelConfig, folding: moe.Folding | None
) -> Callable[[alignment.TrainerState], alignment.TrainerState]:
    if folding is None:
        return lambda state: jax.tree.map(_strong, state)
    layout = stored_shardings(_stored(model), folding)
    whole = NamedSharding(folding.mesh(), PartitionSpec())

    def place(state: alignment.TrainerState) -> alignment.TrainerState:
        state = jax.tree.map(_strong, state)
        everywhere = jax.device_put(state._replace(params=None, optimizer=None), whole)
        moments = optax.tree_utils.tree_map_params(
            lambda params: optax.adam(1.0).init(params),
            lambda leaf, sharding: jax.device_put(leaf, sharding),
            state.optimizer,
            layout,
            transform_non_params=lambda leaf: jax.device_put(leaf, whole),
        )
        return everywhere._replace(params=jax.device_put(state.params, layout), optimizer=moments)

    return place


def _stored(model: lm.LanguageModelConfig) -> moe.MoEConfig:
    """Between steps parameters and moments are also split over the data ranks (ZeRO-1)."""
    return moe.MoEConfig(model=model, sharding="zero1")


def _strong(leaf: Array) -> Array:
    """Without a weak type, which the first step would take away, so that the second would be compiled again."""
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jax.lax.convert_element_type(leaf, leaf.dtype)


class Resharding(NamedTuple):
    """What moving the parameters between the two layouts means.

    Attributes:
        seconds: one move from training to decoding.
        moved_share: share of the parameters' bytes that a device holds in decoding and did not hold in training.
        identical: whether there and back gives the same bits.
    """

    seconds: float
    moved_share: float
    identical: bool


def reshard(params: Params, model: lm.LanguageModelConfig, folding: moe.Folding) -> Resharding:
    """Moves parameters from the layout of training to that of decoding and back."""
    config = _stored(model)
    there = jax.block_until_ready(moe.to_decode(params, config, folding))
    began = time.perf_counter()
    jax.block_until_ready(moe.to_decode(params, config, folding))
    seconds = time.perf_counter() - began
    back = jax.device_put(there, stored_shardings(config, folding))
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(there), jax.tree.leaves(back), strict=True))
    same = all(np.array_equal(np.asarray(a), np.asarray(b)) and np.array_equal(a, c) for a, b, c in pairs)
    moved = held = 0
    for before, after, _ in pairs:
        had = {shard.device: shard.index for shard in before.addressable_shards}
        for shard in after.addressable_shards:
            held += shard.data.size
            moved += shard.data.size - _overlap(had[shard.device], shard.index, before.shape)
    return Resharding(seconds, moved / held, same)


def _overlap(first: tuple[slice, ...], second: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """Number of entries that two boxes of an array share."""
    count = 1
    for a, b, size in zip(first, second, shape, strict=True):
        (low, high, _), (start, stop, _) = a.indices(size), b.indices(size)
        count *= max(0, min(high, stop) - max(low, start))
    return count


def check_model(model: lm.LanguageModelConfig, folding: moe.Folding) -> None:
    """Raises a ValueError that names what does not divide."""
    check(model.num_experts > 0, argument="num_experts", value=model.num_experts, rule="the policy must be a mixture")
    moe.check_folding(moe.MoEConfig(model=model), folding)
