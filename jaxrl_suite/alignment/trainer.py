"""Online training of any policy on several rewards: roll out, score, weigh, update.

The step is cut where the host may come in: :func:`rollout` samples, a reward function of any kind scores, and
:func:`update` (in ``update.py``) does the rest in one compiled call. Choices and state are in ``trainer_state.py``, the
one linearisation that serves influence and update in ``linearised.py``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_suite.alignment.running import RunningMean, update_running_mean
from jaxrl_suite.alignment.trainer_state import Metrics, Trainer, TrainerHParams, TrainerState, slope_is_known
from jaxrl_suite.alignment.update import update
from jaxrl_suite.types import Array, Generation


def rollout(trainer: Trainer, state: TrainerState, prompts: Array, mask: Array) -> Generation:
    """Samples a group of completions for every prompt.

    Args:
        trainer: the trainer.
        state: its state; the step's key is ``fold_in(key, step)``.
        prompts: int32 [B, P], padded on the left.
        mask: bool [B, P].

    Returns:
        Generation of ``B * G`` rows, the G completions of a prompt in a row.
    """
    return trainer.policy.generate(*_request(trainer, state, prompts, mask))


def rollout_with_laws(
    trainer: Trainer,
    state: TrainerState,
    prompts: Array,
    mask: Array,
    *,
    hparams: TrainerHParams | None = None,
    spare: Any = None,
) -> tuple[Generation, Any]:
    """:func:`rollout`, and the laws that tokens were drawn from where :func:`update` can use them again; else None.

    ``spare`` may be the laws of the step before, once its update has read them: their memory is written over, and they
    are deleted.
    """
    known_slope = slope_is_known(trainer, state.reference, TrainerHParams() if hparams is None else hparams)
    request = _request(trainer, state, prompts, mask)
    if trainer.early is not None and known_slope:
        options = {} if spare is None else {"spare": spare}  # not every policy can use it
        return trainer.early.generate(*request, group=trainer.config.group_size, **options)
    return trainer.policy.generate(*request), None


def _request(trainer: Trainer, state: TrainerState, prompts: Array, mask: Array) -> tuple[Any, ...]:
    """Arguments of a policy's ``generate``: every prompt once for each sample of its group."""
    size = trainer.config.group_size
    repeat = lambda x: jnp.repeat(x, size, axis=0)  # noqa: E731
    number = prompts.shape[0]
    index = jnp.arange(number * size, dtype=jnp.int32)
    ids = jnp.stack([index // size, index % size], axis=1)
    params = (trainer.merge or trainer.assemble)(state.params, state.reference)
    key = jax.random.fold_in(state.key, state.step)
    return key, params, repeat(prompts), repeat(mask), ids, trainer.sampling


def trainer_step(
    trainer: Trainer,
    state: TrainerState,
    prompts: Array,
    mask: Array,
    reward: Callable[[Any, Generation, RunningMean], Array],
    *,
    hparams: TrainerHParams | None = None,
) -> tuple[TrainerState, Metrics]:
    """A whole step with a reward inside the graph; jit, scan and vmap over seeds work through it.

    Args:
        trainer: the trainer.
        state: its state.
        prompts: int32 [B, P].
        mask: bool [B, P].
        reward: ``reward(params, generation, lengths) -> [K, B * G]``; ``lengths`` is the running mean with this batch.
        hparams: numbers that people sweep.

    Returns:
        The next state and the metrics.
    """
    generation, laws = rollout_with_laws(trainer, state, prompts, mask, hparams=hparams)
    lengths = update_running_mean(state.lengths, jnp.sum(generation.mask, axis=1))
    rewards = reward(state.params, generation, lengths)
    grouped = rewards.reshape(rewards.shape[0], prompts.shape[0], trainer.config.group_size)
    return update(trainer, state, prompts, mask, generation, grouped, hparams=hparams, laws=laws)


def run_trainer(
    trainer: Trainer,
    state: TrainerState,
    sample_prompts: Callable[[Array], tuple[Array, Array]],
    reward: Callable[[Any, Generation, RunningMean], Array],
    *,
    num_steps: int,
    hparams: TrainerHParams | None = None,
) -> tuple[TrainerState, Metrics]:
    """Several steps in one scan; chunks of any length follow the same stream.

    Args:
        trainer: the trainer.
        state: its state.
        sample_prompts: ``sample_prompts(step) -> (prompts [B, P], mask [B, P])``.
        reward: see :func:`trainer_step`.
        num_steps: how many.
        hparams: numbers that people sweep.

    Returns:
        The state after the last step, and metrics with a leading axis of steps.
    """

    def step(state: TrainerState, _: None) -> tuple[TrainerState, Metrics]:
        prompts, mask = sample_prompts(state.step)
        return trainer_step(trainer, state, prompts, mask, reward, hparams=hparams)

    return jax.lax.scan(step, state, length=num_steps)
