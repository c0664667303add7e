"""FLOPs of any JAX function from its jaxpr: shapes of products times lengths of loops.

XLA's own cost analysis counts the body of a loop once; here a scan counts as often as it runs, the body of a
``shard_map`` on every device of its mesh, and what a backward pass recomputes again, since it stands in the jaxpr.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core


class FlopCount(NamedTuple):
    """What a program computes in matrix products.

    Attributes:
        total: FLOPs over all devices, a multiply-add is two.
        unknown_loops: while loops whose number of turns is not in the jaxpr; their bodies count once.
        product_bytes: what those products read and write, over all devices, each operand and result once: the least
            that must pass through device memory unless one product's result stays in a cache for the next.
    """

    total: float
    unknown_loops: int
    product_bytes: float = 0.0


def count_flops(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> FlopCount:
    """FLOPs of products and convolutions of a function, traced at the shapes of its arguments.

    >>> import jax.numpy as jnp
    >>> def power(x):
    ...     return jax.lax.scan(lambda y, _: (y @ x, None), x, length=7)[0]
    >>> count_flops(power, jax.ShapeDtypeStruct((10, 10), jnp.float32)).total
    14000.0
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments, **keywords).jaxpr)


def jaxpr_flops(jaxpr: Any) -> FlopCount:
    """FLOPs of a jaxpr; of a conditional the costlier branch."""
    total, unknown, moved = 0.0, 0, 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name in _PRODUCTS:
            total += _PRODUCTS[name](equation)
            moved += _bytes((*equation.invars, *equation.outvars))
            continue
        inner = [jaxpr_flops(body) for body in _bodies(parameters)]
        if not inner:
            continue
        if name == "cond":
            inner = [max(inner)]
        times = 1.0
        if name == "scan":
            times = float(parameters["length"])
        elif name == "shard_map":
            times = float(math.prod(parameters["mesh"].shape.values()))
        elif name == "while":
            unknown += 1
        total += times * sum(count.total for count in inner)
        unknown += sum(count.unknown_loops for count in inner)
        moved += times * sum(count.product_bytes for count in inner)
    return FlopCount(total, unknown, moved)


def _bodies(parameters: dict[str, Any]) -> Iterator[Any]:
    """Jaxprs inside an equation, each once: a custom derivative's rules are functions and stay outside."""
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _bytes(variables: Iterable[Any]) -> float:
    return float(sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in variables))


def _dot_general(equation: Any) -> float:
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    shared = math.prod(left[d] for d in (*contracted, *batched))
    batch = math.prod(left[d] for d in batched)
    # left · right counts contracted and batched dimensions twice, the product needs them once.
    return 2.0 * math.prod(left) * math.prod(right) / max(1, shared) if batch else 0.0


def _ragged_dot(equation: Any) -> float:
    rows, weights = (variable.aval.shape for variable in equation.invars[:2])
    return 2.0 * math.prod(rows) * weights[-1]


def _convolution(equation: Any) -> float:
    spec = equation.params["dimension_numbers"].rhs_spec
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(kernel) / kernel[spec[0]]


_PRODUCTS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot_general,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}
