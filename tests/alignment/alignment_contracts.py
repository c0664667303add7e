"""The algorithms of the package for the list of contracts. Import ``ALGORITHMS``; each entry is one line there."""

import jax
import jax.numpy as jnp
import optax

from experiments.alignment.bit_policy import BitSampling, bit_policy
from jaxrl_suite import alignment, pareto
from jaxrl_suite.alignment import LossConfig
from jaxrl_suite.envs import tied_bits
from jaxrl_suite.testing import Algorithm, Loop

MASK = [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def arrays(*shapes):
    """Standard normal arrays, one key each."""

    def example(key):
        keys = jax.random.split(key, len(shapes))
        return tuple(jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))

    return example


def square(outputs):
    """A loss that does not vanish for advantages, whose plain sum is zero."""
    return sum(jnp.sum(jnp.sin(leaf + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)))
               for leaf in jax.tree.leaves(outputs))  # fmt: skip


def surrogate(**options):
    config = LossConfig(**options)

    def function(log_probs, old, advantages, reference):
        mask = jnp.array(MASK, bool)
        return alignment.policy_loss(
            log_probs, old, advantages, mask, config, reference_log_probs=reference, kl_coefficient=0.3
        )[0]

    return function


LOSS = arrays((3, 4), (3, 4), (3,), (3, 4))
SURROGATES = {
    "ppo": {},
    "gspo": {"ratio_level": "sequence"},
    "gspo_token": {"ratio_level": "sequence_token", "kl_kind": "none"},
    "cispo": {"surrogate": "cispo"},
    "plain_k2_sum": {"surrogate": "plain", "kl_kind": "k2", "aggregation": "sequence_mean_token_sum"},
}
# "sequence_token" and "cispo" stop gradients on purpose, so their derivative is not that of their value.
CHECKED = ("ppo", "gspo", "plain_k2_sum")

ALGORITHMS = [
    *[
        Algorithm(f"alignment.{name}_advantages", getattr(alignment, f"{name}_advantages"), arrays((5,)),
                  differentiable=(0,), loss=square)
        for name in ("grpo", "dr_grpo", "rloo")
    ],
    Algorithm("alignment.reinforce_advantages",
              lambda r: alignment.reinforce_advantages(r, jnp.array(MASK, bool)), arrays((3,)),
              differentiable=(0,), loss=square),
    Algorithm("alignment.gdpo_advantages", alignment.gdpo_advantages, arrays((2, 3, 4), (2,)),
              differentiable=(0, 1), loss=square),
    Algorithm("alignment.mo_grpo_advantages", alignment.mo_grpo_advantages, arrays((2, 3, 4), (2,)),
              differentiable=(0, 1), loss=square),
    *[
        Algorithm(f"alignment.combined_advantages[{kind}]",
                  lambda r, w, kind=kind: alignment.combined_advantages(
                      "rloo", r, w, jnp.ones((3, 4, 2), bool), combine=kind, gain=2.0),
                  arrays((2, 3, 4), (2,)), differentiable=(0, 1), loss=square)
        for kind in ("reward", "advantage")
    ],
    Algorithm("alignment.soft_min_rewards", lambda r: alignment.soft_min_rewards(r, temperature=0.5), arrays((3, 4)),
              differentiable=(0,)),
    *[
        Algorithm(f"alignment.kl_estimate[{kind}]", lambda p, q, kind=kind: alignment.kl_estimate(p, q, kind),
                  arrays((4,), (4,)), differentiable=(0, 1) if kind in ("k1", "k2", "k3") else ())
        for kind in ("k1", "abs", "k2", "k3", "k3+")
    ],
    *[
        Algorithm(f"alignment.policy_loss[{name}]", surrogate(**options), LOSS,
                  differentiable=(0, 2) if name in CHECKED else ())
        for name, options in SURROGATES.items()
    ],
    Algorithm("alignment.update_running_mean",
              lambda mean, values: alignment.update_running_mean(
                  alignment.RunningMean(mean, jnp.array(7, jnp.int32)), values).mean,
              arrays((), (6,)), differentiable=(0, 1)),
]  # fmt: skip


# The whole trainer: parameters, optimiser, archive of the weight rule, log-weights, running mean, key.
_TRAINER = alignment.Trainer(
    policy=bit_policy(2, autoregressive=True),
    config=alignment.TrainerConfig(group_size=8),
    loss=LossConfig(kl_kind="none"),
    rule=pareto.hypervolume_gain_weights(jnp.array([0.5, 0.5]), capacity=3),
    optimizer=optax.adam(0.1),
    sampling=BitSampling,
)


def _init(key):
    return alignment.init_trainer(key, _TRAINER, {"theta": jnp.array([0.3, -0.2, 0.5])}, num_objectives=2)


@jax.jit
def _step(state):
    prompts, mask = jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1), bool)
    return alignment.trainer_step(
        _TRAINER, state, prompts, mask, lambda params, generation, lengths: tied_bits.rewards(generation.tokens).T
    )[0]


def _advance(state, start, num_steps):
    for _ in range(num_steps):  # the state knows its step
        state = _step(state)
    return state


LOOPS = [Loop("alignment.trainer", _init, _advance)]
