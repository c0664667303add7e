"""One table of tolerances, so that no test invents its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# kind -> (float32, float64): absolute and relative tolerance alike.
_TABLE = {
    "exact": (0.0, 0.0),  # the same operations in the same order
    "same": (2e-6, 1e-12),  # the same mathematics compiled differently: jit, vmap, another mesh
    "reference": (1e-5, 1e-10),  # an independent implementation in float64
    "gradient": (2e-3, 1e-6),  # central differences
}


def tolerance(kind: str, dtype: Any = jnp.float32) -> float:
    """Tolerance of a kind of comparison ("exact", "same", "reference", "gradient") at a dtype.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in _TABLE:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(_TABLE)}.")
    return _TABLE[kind][int(jnp.finfo(dtype).bits == 64)]


def assert_close(actual: Any, expected: Any, kind: str = "same", *, scale: float = 1.0) -> None:
    """Asserts that two pytrees agree leaf by leaf within the tolerance of the coarser dtype; integers exactly.

    Args:
        actual: pytree of arrays.
        expected: pytree of the same structure.
        kind: kind of comparison, see :func:`tolerance`.
        scale: widens the tolerance where a test says why (long sums, large magnitudes).
    """
    actual_leaves, actual_tree = jax.tree.flatten(actual)
    expected_leaves, expected_tree = jax.tree.flatten(expected)
    assert actual_tree == expected_tree, f"structures differ: {actual_tree} against {expected_tree}"
    for a, e in zip(actual_leaves, expected_leaves, strict=True):
        if jnp.issubdtype(getattr(a, "dtype", type(a)), jax.dtypes.prng_key):
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        a, e = np.asarray(a), np.asarray(e)
        if not np.issubdtype(a.dtype, np.inexact) and a.dtype.name != "bfloat16":
            np.testing.assert_array_equal(a, e)
            continue
        narrow = a.dtype.itemsize < 8 or e.dtype.itemsize < 8
        bound = scale * tolerance(kind, jnp.float32 if narrow else jnp.float64)
        np.testing.assert_allclose(a, e, rtol=bound, atol=bound)
