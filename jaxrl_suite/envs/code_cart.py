"""A cart-pole for coding games: the pole must stay up while the pushes spell a message.

Physics of Barto, Sutton and Anderson (1983): a cart on a rail, a pole on a hinge, a push of fixed force to the left or
right every 0.02 s, Euler steps; the episode fails when the pole leans more than 12 degrees or the cart leaves the
rail's 2.4 m.

The base policy is soft one-step lookahead on the cost-to-go s'Ps of the linear-quadratic regulator at rest,

    pi(a | s) proportional to exp(-next(s, a)' P next(s, a) / temperature):

hot, it is nearly a coin and the pole falls; cold, it balances and nearly every push is forced.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrl_suite.config import Config, check, field
from jaxrl_suite.types import Array, PRNGKey

_GRAVITY, _CART, _POLE, _HALF_LENGTH, _SECONDS = 9.8, 1.0, 0.1, 0.5, 0.02  # m/s^2, kg, kg, m, s
LARGEST_ANGLE, LARGEST_POSITION = 12 * np.pi / 180, 2.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeCartConfig(Config):
    """Force and cost weights."""

    force: float = field(10.0, help="force of a push, newton")
    position_cost: float = field(1.0, help="weight of the squared position, 1/m^2")
    angle_cost: float = field(10.0, help="weight of the squared angle, 1/rad^2")
    push_cost: float = field(0.001, help="weight of the squared force in the regulator, 1/N^2")
    temperature: float = field(0.2, help="temperature of the base policy, in units of the cost to go")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("force", "position_cost", "angle_cost", "push_cost", "temperature"):
            value = getattr(self, name)
            check(value > 0, argument=name, value=value, rule="must be positive")


class CodeCart(struct.PyTreeNode):
    """The cart-pole as arrays.

    Attributes:
        cost_to_go: [4, 4], P.
        force: [], newton.
        temperature: [], of the base policy.
    """

    cost_to_go: Array
    force: Array
    temperature: Array


def code_cart(config: CodeCartConfig) -> CodeCart:
    """Builds the cart-pole and its regulator, by iterating the Riccati equation of the linearised steps.

    >>> cart = code_cart(CodeCartConfig())
    >>> bool(jnp.all(jnp.linalg.eigvalsh(cart.cost_to_go) > 0))
    True
    """
    rest = jnp.zeros((4,))
    a, b = (np.asarray(x, float) for x in jax.jacfwd(_physics, argnums=(0, 1))(rest, jnp.zeros(())))
    b = b[:, None]
    weights = np.diag([config.position_cost, 0.1, config.angle_cost, 0.1])
    cost = weights.copy()
    for _ in range(5000):
        gain = np.linalg.solve(b.T @ cost @ b + config.push_cost, b.T @ cost @ a)
        cost = weights + a.T @ cost @ (a - b @ gain)
    dtype = jnp.result_type(float)
    numbers = (config.force, config.temperature)
    return CodeCart(jnp.asarray((cost + cost.T) / 2, dtype), *(jnp.asarray(number, dtype) for number in numbers))


def _physics(state: Array, force: Array) -> Array:
    """State [4] (position, velocity, angle, angular velocity) 0.02 s later."""
    _, velocity, angle, spin = state
    total, sine, cosine = _CART + _POLE, jnp.sin(angle), jnp.cos(angle)
    push = (force + _POLE * _HALF_LENGTH * spin**2 * sine) / total
    angular = (_GRAVITY * sine - cosine * push) / (_HALF_LENGTH * (4 / 3 - _POLE * cosine**2 / total))
    linear = push - _POLE * _HALF_LENGTH * angular * cosine / total
    return state + _SECONDS * jnp.stack([velocity, linear, spin, angular])


def step(cart: CodeCart, state: Array, action: Array) -> Array:
    """State ``[4]`` after a push to the left (0) or right (1)."""
    return _physics(state, jnp.where(action == 1, cart.force, -cart.force))


def next_state(key: PRNGKey, cart: CodeCart, state: Array, action: Array) -> Array:
    """As :func:`step`, as games call it; nothing is random."""
    del key
    return step(cart, state, action)


def reset(key: PRNGKey, cart: CodeCart) -> Array:
    """A state near rest, uniform in +-0.05. The key is consumed."""
    return jax.random.uniform(key, (4,), cart.force.dtype, minval=-0.05, maxval=0.05)


def failed(cart: CodeCart, state: Array) -> Array:
    """bool [], whether the pole has fallen or the cart has left the rail."""
    del cart
    return (jnp.abs(state[0]) > LARGEST_POSITION) | (jnp.abs(state[2]) > LARGEST_ANGLE)


def policy(cart: CodeCart, state: Array) -> Array:
    """Probabilities [2] of the pushes."""
    after = jnp.stack([step(cart, state, jnp.asarray(action)) for action in (0, 1)])
    return jax.nn.softmax(-jnp.einsum("ai,ij,aj->a", after, cart.cost_to_go, after) / cart.temperature)
