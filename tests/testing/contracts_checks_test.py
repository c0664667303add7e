"""The checks themselves must fail on an algorithm that breaks the law."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from jaxrl_suite import testing


def example(key):
    return (jax.random.normal(key, (4,)),)


def listed(function, **changes):
    return testing.Algorithm("sample", function, example, (0,), **changes)


def good(x):
    return jnp.sum(x**3)


@jax.custom_jvp
def wrong_derivative(x):
    return jnp.sum(x**3)


wrong_derivative.defjvp(
    lambda primals, tangents: (jnp.sum(primals[0] ** 3), jnp.sum(2.9 * primals[0] ** 2 * tangents[0]))
)


def test_good_algorithm_passes(key, x64):
    for check in (
        testing.check_jit_equals_eager,
        testing.check_vmap_equals_loop,
        testing.check_one_trace,
        testing.check_dtype_kept,
        testing.check_gradients,
    ):
        check(listed(good), key)


def test_wrong_derivative_is_found(key, x64):
    with pytest.raises(AssertionError, match="relative error of grad"):
        testing.check_gradients(listed(wrong_derivative), key)


def test_batch_dependence_is_found(key):
    with pytest.raises(AssertionError):
        testing.check_vmap_equals_loop(listed(lambda x: x * next(_trace_count)), key)


_trace_count = itertools.count(1)  # a value that differs between the trace of the loop and that of the batch


def test_retrace_is_found(key):
    sizes = iter((3, 5))

    def other_shape(_):
        return (jnp.ones(next(sizes)),)

    with pytest.raises(AssertionError):
        testing.check_one_trace(testing.Algorithm("sample", good, other_shape), key)


def test_widened_dtype_is_found(key, x64):
    with pytest.raises(AssertionError, match="float64 out of float32"):
        testing.check_dtype_kept(listed(lambda x: x * jnp.ones((), jnp.float64)), key)


def test_unfolded_keys_are_found_by_chunking():
    def run(state, start, num_steps):
        key = jax.random.fold_in(jax.random.key(0), start)  # one draw a chunk: depends on how the run is cut
        return state + num_steps * jax.random.normal(key)

    with pytest.raises(AssertionError):
        testing.check_chunked_equals_whole(run, jnp.zeros(()), num_steps=4, chunks=(1, 3))


def test_a_state_that_loses_something_is_found():
    with pytest.raises(AssertionError):
        testing.check_save_restore(
            jnp.ones(3), lambda s: s, lambda s, path: s.astype(jnp.bfloat16).astype(jnp.float32) * 2
        )
