"""Laws that every algorithm of the toolkit keeps, as functions that raise AssertionError.

An algorithm is listed once, as an :class:`Algorithm`, and a parametrised test runs each check over the list. The
functions are public, so that an algorithm outside this repository can be held to the same laws.
"""

import functools
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.testing.tolerances import assert_close, tolerance


class Algorithm(NamedTuple):
    """One line of the list of algorithms.

    Attributes:
        name: dotted public name, for the test id.
        function: pure function of arrays (and pytrees of arrays); close over static arguments.
        example: ``example(key) -> arguments``, a tuple of small valid arguments; shapes must not depend on the key.
        differentiable: positions of the arguments with respect to which gradients are checked; empty if none.
        loss: ``loss(outputs) -> scalar`` for the gradient check; the sum of all float leaves by default.
        tangent: ``tangent(key, arguments) -> tangents`` of the differentiable arguments, for functions that are
            defined on a manifold only (a simplex, say); Gaussian by default.
        vmap: whether the function is per instance (batched functions with collectives are not).
    """

    name: str
    function: Callable[..., Any]
    example: Callable[[jax.Array], tuple[Any, ...]]
    differentiable: tuple[int, ...] = ()
    loss: Callable[[Any], jax.Array] | None = None
    tangent: Callable[[jax.Array, tuple[Any, ...]], tuple[Any, ...]] | None = None
    vmap: bool = True


class Loop(NamedTuple):
    """One line of the list of algorithms that run for many steps.

    Attributes:
        name: dotted public name, for the test id.
        init: ``init(key) -> state``, any pytree.
        advance: ``advance(state, start, num_steps) -> state``; step t draws from ``fold_in(key, t)`` of a key in the
            state or of its own.
    """

    name: str
    init: Callable[[jax.Array], Any]
    advance: Callable[[Any, int, int], Any]


def check_jit_equals_eager(algorithm: Algorithm, key: jax.Array) -> None:
    """The compiled function returns what the same operations return one by one."""
    arguments = algorithm.example(key)
    assert_close(_compiled(algorithm.function)(*arguments), algorithm.function(*arguments), "same", scale=10)


def check_vmap_equals_loop(algorithm: Algorithm, key: jax.Array, *, batch: int = 3) -> None:
    """``vmap`` over instances equals a loop over them."""
    instances = [algorithm.example(k) for k in jax.random.split(key, batch)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *instances)
    loop = [_compiled(algorithm.function)(*arguments) for arguments in instances]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    assert_close(jax.jit(jax.vmap(algorithm.function))(*stacked), expected, "same", scale=10)


def check_one_trace(algorithm: Algorithm, key: jax.Array) -> None:
    """Other values of the same shapes do not trace again."""
    first, second = (algorithm.example(k) for k in jax.random.split(key))
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(algorithm.function, n=1))
    counted.trace(*first)
    counted.trace(*second)
    chex.clear_trace_counter()


@functools.lru_cache(maxsize=8)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for all checks of an algorithm: compiling is most of their time."""
    return jax.jit(function)


def check_dtype_kept(algorithm: Algorithm, key: jax.Array) -> None:
    """Float outputs have the dtype of the widest float input; checked abstractly for float32 and, with x64, float64."""
    arguments = algorithm.example(key)
    widths = [jnp.float32, jnp.float64] if _has_float64() else [jnp.float32]
    for dtype in widths:
        cast = jax.tree.map(lambda x, d=dtype: jnp.asarray(x).astype(d) if _is_float(x) else x, arguments)
        for leaf in jax.tree.leaves(jax.eval_shape(algorithm.function, *cast)):
            if _is_float(leaf):
                assert leaf.dtype == dtype, f"{algorithm.name}: {leaf.dtype} out of {np.dtype(dtype)} inputs"


def relative_gradient_error(algorithm: Algorithm, key: jax.Array, *, step: float = 1e-6) -> dict[str, float]:
    """Reverse, forward and vmapped derivatives against central differences along random directions.

    Args:
        algorithm: with ``differentiable`` set.
        key: consumed.
        step: step of the central difference, meant for float64.

    Returns:
        Largest relative error under the keys "grad", "jvp" and "vmap".
    """
    example_key, tangent_key = jax.random.split(key)
    arguments = algorithm.example(example_key)
    positions = algorithm.differentiable
    loss = algorithm.loss or _sum_of_floats

    def scalar(*varied: Any) -> jax.Array:
        full = list(arguments)
        for position, value in zip(positions, varied, strict=True):
            full[position] = value
        return loss(algorithm.function(*full))

    point = tuple(arguments[position] for position in positions)
    make_tangent = algorithm.tangent or _gaussian_tangent
    directions = [make_tangent(k, point) for k in jax.random.split(tangent_key, 3)]
    evaluate = jax.jit(scalar)
    numeric = np.array(
        [(evaluate(*_shift(point, d, step)) - evaluate(*_shift(point, d, -step))) / (2 * step) for d in directions]
    )
    gradient_function = jax.grad(scalar, argnums=tuple(range(len(positions))))
    gradient = jax.jit(gradient_function)(*point)
    reverse = np.array([_inner(gradient, d) for d in directions])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
    forward = np.asarray(jax.jit(jax.vmap(lambda d: jax.jvp(scalar, point, d)[1]))(stacked))
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[_shift(point, d, 1e-3 * step) for d in directions])
    vmapped = jax.jit(jax.vmap(gradient_function))(*batch)
    mapped = np.array([_inner(jax.tree.map(lambda x, i=i: x[i], vmapped), d) for i, d in enumerate(directions)])
    scale = np.maximum(np.abs(numeric), 1e-3 * max(1.0, float(np.max(np.abs(numeric)))))
    return {
        "grad": float(np.max(np.abs(reverse - numeric) / scale)),
        "jvp": float(np.max(np.abs(forward - numeric) / scale)),
        "vmap": float(np.max(np.abs(mapped - numeric) / scale)),
    }


def check_gradients(algorithm: Algorithm, key: jax.Array, *, step: float = 1e-6, bound: float | None = None) -> None:
    """``grad``, ``jvp`` and ``vmap(grad)`` agree with central differences in float64.

    Args:
        algorithm: with ``differentiable`` set.
        key: consumed.
        step: step of the central difference.
        bound: largest relative error allowed; the table's "gradient" entry by default.
    """
    assert _has_float64(), "finite differences need float64: run with JAX_ENABLE_X64=1"
    bound = tolerance("gradient", jnp.float64) if bound is None else bound
    for kind, error in relative_gradient_error(algorithm, key, step=step).items():
        assert error <= bound, f"{algorithm.name}: relative error of {kind} is {error:.2e}, above {bound:.0e}"


def check_chunked_equals_whole(
    run: Callable[[Any, int, int], Any], state: Any, *, num_steps: int, chunks: tuple[int, ...]
) -> None:
    """A run cut into chunks ends in the same state as one that was not cut, bit for bit.

    Args:
        run: ``run(state, start, num_steps) -> state``; step t draws from ``fold_in(key, t)``.
        state: initial state.
        num_steps: length of the whole run.
        chunks: lengths that sum to ``num_steps``.
    """
    assert sum(chunks) == num_steps, f"chunks {chunks} do not sum to {num_steps}"
    whole, start = run(state, 0, num_steps), 0
    for length in chunks:
        state = run(state, start, length)
        start += length
    assert_close(state, whole, "exact")


def check_save_restore(state: Any, advance: Callable[[Any], Any], save_restore: Callable[[Any, Path], Any]) -> None:
    """A state that went through a checkpoint continues like the one that did not, bit for bit.

    Args:
        state: any state.
        advance: ``advance(state) -> state``.
        save_restore: ``save_restore(state, path) -> state``, writes and reads a checkpoint.
    """
    with tempfile.TemporaryDirectory() as folder:
        restored = save_restore(state, Path(folder) / "checkpoint")
    assert_close(restored, state, "exact")
    assert_close(advance(restored), advance(state), "exact")


def public_names_without_docstring(module: Any) -> list[str]:
    """Names in ``__all__`` of a package whose function or class has no docstring."""
    return [name for name in module.__all__ if not inspect.getdoc(getattr(module, name))]


def _has_float64() -> bool:
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _sum_of_floats(outputs: Any) -> jax.Array:
    return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(outputs) if _is_float(leaf)), start=jnp.zeros(()))


def _gaussian_tangent(key: jax.Array, point: tuple[Any, ...]) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten(point)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def _shift(point: Any, direction: Any, step: float) -> Any:
    return jax.tree.map(lambda x, d: x + step * d, point, direction)


def _inner(a: Any, b: Any) -> float:
    return float(sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))
