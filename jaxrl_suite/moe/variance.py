"""Variance of values over mesh axes: which axes a value may differ along inside a manual ``shard_map``.

Inside ``shard_map(check_vma=True)`` the type of every value says along which mesh axes it varies. A weight that is
replicated over an axis and used there on different tokens must be cast to varying; the transpose of that cast is the
sum of its gradients over the axis. All gradient reductions of this package come from these casts, none is written by
hand, so a missing or doubled reduction is a type error and not a wrong number.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_suite.types import Array


def varying_axes(*values: Any) -> frozenset[str]:
    """Union of the mesh axes along which the leaves of some pytrees vary; empty outside ``shard_map``."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(values):
        axes |= jax.typeof(leaf).mat.varying
    return axes


def vary(tree: Any, axes: Sequence[str] | frozenset[str]) -> Any:
    """Casts every leaf to vary along ``axes`` (those along which it varies already are left alone)."""

    def cast(leaf: Any) -> Array:
        missing = tuple(sorted(frozenset(axes) - varying_axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def vary_like(tree: Any, *references: Any) -> Any:
    """Casts every leaf to vary along every axis along which any leaf of the references varies."""
    return vary(tree, varying_axes(*references))


def unify(*trees: Any) -> tuple[Any, ...]:
    """Casts all leaves of all trees to vary along the union of their axes."""
    axes = varying_axes(*trees)
    return tuple(vary(tree, axes) for tree in trees)


def zeros_like_varying(shape: tuple[int, ...], dtype: jnp.dtype, *references: Any) -> Array:
    """Zeros that vary like the references, as the initial carry of a scan must."""
    return vary_like(jnp.zeros(shape, dtype), *references)


def axis_index(axes: tuple[str, ...]) -> Array:
    """Row-major index of this device along a tuple of axes, int32; 0 for no axes."""
    return jax.lax.axis_index(axes) if axes else jnp.int32(0)


def axis_size(axes: tuple[str, ...]) -> int:
    """Number of devices along a tuple of axes; 1 for no axes."""
    return int(jax.lax.axis_size(axes)) if axes else 1


def sum_over(tree: Any, axes: Sequence[str]) -> Any:
    """Sum over ``axes``, leaves cast to vary along them first; the identity for no axes."""
    return jax.lax.psum(vary(tree, frozenset(axes)), tuple(axes)) if axes else tree


def zeros_of(function: Callable[[], Any]) -> Any:
    """Zeros of the shapes, dtypes and variance that a function returns, without running it."""

    def zeros(spec: Any) -> Array:
        kind = spec.manual_axis_type
        return vary(jnp.zeros(spec.shape, spec.dtype), frozenset() if kind is None else kind.varying)

    return jax.tree.map(zeros, jax.eval_shape(function))
