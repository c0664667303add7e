"""Linear mixture models: kernels that are linear in an unknown parameter, ``P(s' | s, a) = phi(s' | s, a) . theta``."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from jaxrl_suite.config import check
from jaxrl_suite.distributions import invert_cdf
from jaxrl_suite.mdp.bounds import parameter_bound
from jaxrl_suite.mdp.tabular import TabularMDP, check_successors, tabular_mdp
from jaxrl_suite.types import Array

_MAX_EXACT_SUCCESSORS = 12


class LinearMixtureMDP(struct.PyTreeNode):
    """A linear mixture model over lists of successors: time-homogeneous, with a fixed start and no reward.

    ``P(successors[s, a, j] | s, a) = features[s, a, j] . theta``. Lists that are shorter than N are padded with
    features 0 (and any state); the D base measures may be signed.

    Attributes:
        features: [S, A, N, D], phi of each listed successor.
        successors: int32 [S, A, N].
        theta: [D], the true parameter: simulators and exact evaluation read it, explorers must not.
        nominal: [D], a valid parameter that is known beforehand, the centre of the ridge.
        start: int32 [], first state of each episode.
        norm_bound: [], known bound B on the norm of the true parameter.
        center_bound: [], known bound on its distance to ``nominal``.
    """

    features: Array
    successors: Array
    theta: Array
    nominal: Array
    start: Array
    norm_bound: Array
    center_bound: Array

    @property
    def num_states(self) -> int:
        """Number of states S."""
        return self.features.shape[0]

    @property
    def num_actions(self) -> int:
        """Number of actions A."""
        return self.features.shape[1]

    @property
    def dimension(self) -> int:
        """Number of features D."""
        return self.features.shape[3]

    @property
    def mask(self) -> Array:
        """Which entries of the lists are successors under some parameter: bool [S, A, N]."""
        return jnp.any(self.features != 0, axis=-1)

    def kernel(self, theta: Array | None = None) -> Array:
        """``P_theta`` over the lists, [S, A, N]; the true kernel if ``theta`` is None."""
        theta = self.theta if theta is None else theta
        return jnp.einsum("sajd,d->saj", self.features, theta, precision="highest")

    def tabular(self, reward: Array, discount: float | Array = 0.0) -> TabularMDP:
        """The true process with a reward [S, A] or [H, S, A]."""
        return TabularMDP(self.kernel(), reward, jnp.asarray(discount, self.features.dtype), self.successors)


def integrated_features(mdp: LinearMixtureMDP, values: Array) -> Array:
    """``phi_f(s, a) = sum_{s'} phi(s' | s, a) f(s')``, so that ``[P f](s, a) = phi_f(s, a) . theta``.

    Args:
        mdp: model.
        values: [S], the function f.

    Returns:
        [S, A, D].
    """
    return jnp.einsum("sajd,saj->sad", mdp.features, values[mdp.successors], precision="highest")


def linear_mixture(
    features: ArrayLike,
    successors: ArrayLike,
    theta: ArrayLike,
    *,
    start: int = 0,
    nominal: ArrayLike | None = None,
    normalise: bool = True,
    norm_bound: float | None = None,
    center_bound: float | None = None,
) -> LinearMixtureMDP:
    """Builds and checks a :class:`LinearMixtureMDP`.

    Args:
        features: [S, A, N, D].
        successors: int [S, A, N]; no list names a state twice with features that are not 0.
        theta: [D], true parameter.
        start: first state.
        nominal: [D], a valid parameter known beforehand; the average base measure (uniform on the simplex) if None
            and it is valid, else it must be given.
        normalise: divides the features by the smallest c such that ``||phi_f|| <= 1`` for each f into [0, 1], and
            multiplies the parameters by c.
        norm_bound: known bound on ``|theta|``; what holds for any kernel of this form if None.
        center_bound: known bound on ``|theta - nominal|``; what holds for any kernel of this form if None.

    Returns:
        The model, float dtype as ``features``.

    Raises:
        ValueError: a shape does not fit; a row of the true or nominal kernel is not a distribution (it is named).

    References:
        Zhang, Zhang, Gu, 2023, arXiv 2303.10165, definition of linear mixture MDPs.
    """
    features = np.asarray(features)
    check(
        features.ndim == 4 and features.size > 0,
        argument="features",
        value=features.shape,
        rule="shape must be [S, A, N, D], none of them 0",
    )
    if not np.issubdtype(features.dtype, np.floating):
        features = features.astype(np.float64)  # tables of 0 and 1 are often integers
    successors, theta = np.asarray(successors), np.asarray(theta, features.dtype)
    states, _, _, dimension = features.shape
    check(
        successors.shape == features.shape[:3],
        argument="successors",
        value=successors.shape,
        rule=f"must be features.shape[:3] = {features.shape[:3]}",
    )
    check(theta.shape == (dimension,), argument="theta", value=theta.shape, rule=f"must be [D] = [{dimension}]")
    check(0 <= start < states, argument="start", value=start, rule=f"must be a state in 0..{states - 1}")
    nominal = (
        np.full(dimension, 1.0 / dimension, features.dtype) if nominal is None else np.asarray(nominal, theta.dtype)
    )
    check_successors(successors, states)
    _check_no_repeats(features, successors)
    for name, parameter in (("theta", theta), ("nominal", nominal)):
        try:
            tabular_mdp(features @ parameter, np.zeros(features.shape[:2]), 0.0, successors)
        except ValueError as error:
            raise ValueError(f"{name}: {error}".replace("transition[", "kernel[")) from None
    scale = feature_bound(features) if normalise else 1.0
    return LinearMixtureMDP(
        jnp.asarray(features / scale),
        jnp.asarray(successors, jnp.int32),
        jnp.asarray(theta * scale),
        jnp.asarray(nominal * scale),
        jnp.asarray(start, jnp.int32),
        jnp.asarray(np.asarray(scale * _bound(features, np.zeros(dimension), norm_bound), features.dtype)),
        jnp.asarray(np.asarray(scale * _bound(features, nominal, center_bound), features.dtype)),
    )


def _bound(features: np.ndarray, center: np.ndarray, known: float | None) -> float:
    return parameter_bound(features, center) if known is None else known


def feature_bound(features: np.ndarray) -> float:
    """The normaliser ``max ||phi_f(s, a)||_2`` over (s, a) and f into [0, 1].

    Exact (a maximum over the vertices {0, 1}^N) for lists of up to 12 successors; above, the sufficient bound from
    positive and negative parts, coordinate by coordinate.

    Args:
        features: [S, A, N, D], concrete.

    Returns:
        The bound; features divided by it satisfy ``||phi_f|| <= 1``.
    """
    features = np.asarray(features)
    width = features.shape[2]
    if width <= _MAX_EXACT_SUCCESSORS:
        vertices = ((np.arange(2**width)[:, None] >> np.arange(width)) & 1).astype(features.dtype)
        squares = max(
            float((np.einsum("vj,sajd->vsad", part, features) ** 2).sum(-1).max())
            for part in np.array_split(vertices, max(1, len(vertices) // 64))
        )
        return squares**0.5
    positive, negative = np.maximum(features, 0).sum(2), np.maximum(-features, 0).sum(2)
    return float(np.linalg.norm(np.maximum(positive, negative), axis=-1).max())


def _check_no_repeats(features: np.ndarray, successors: np.ndarray) -> None:
    # Reachability and vertex maxima are taken entry by entry, so a state must not be split over two entries.
    used = np.any(features != 0, axis=-1)
    width = successors.shape[-1]
    entries = np.where(used, successors, -1 - np.arange(width))
    ordered = np.sort(entries, axis=-1)
    repeated = np.any(ordered[..., 1:] == ordered[..., :-1], axis=-1)
    if np.any(repeated):
        state, action = map(int, np.argwhere(repeated)[0])
        raise ValueError(
            f"successors[{state}, {action}]={successors[state, action].tolist()}: a successor is listed twice. "
            "Remedy: add up the features of equal successors."
        )


def step_index(mdp: LinearMixtureMDP, uniform: Array, state: Array, action: Array) -> Array:
    """Draws the position j of the next state in its list, by inversion of one uniform.

    Args:
        mdp: model; the true kernel is sampled.
        uniform: [], in [0, 1).
        state: int [].
        action: int [].

    Returns:
        int32 [], with ``successors[state, action, j]`` the next state.
    """
    return invert_cdf(mdp.features[state, action] @ mdp.theta, uniform)


def simulate(mdp: LinearMixtureMDP, key: jax.Array, policy: Array) -> tuple[Array, Array]:
    """Plays one episode of the true process.

    Args:
        mdp: model.
        key: consumed.
        policy: int [H, S].

    Returns:
        States int32 [H + 1] and actions int32 [H].
    """
    uniforms = jax.random.uniform(key, policy.shape[:1], mdp.features.dtype)

    def step(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        row, uniform = inputs
        action = row[state]
        next_state = mdp.successors[state, action, step_index(mdp, uniform, state, action)]
        return next_state, (next_state, action)

    _, (states, actions) = jax.lax.scan(step, mdp.start, (policy, uniforms))
    return jnp.concatenate([mdp.start[None], states]), actions
