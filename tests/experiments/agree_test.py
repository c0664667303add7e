"""Comparing an accelerator with the CPU: what can be tested without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cluster import agree


def test_numbers_are_compared_in_units_of_the_largest():
    assert agree.compare({"a": np.array([1.0, 100.0])}, {"a": np.array([2.0, 100.0])}) == (0.01, 0.0)


def test_rounding_noise_beside_large_numbers_is_no_difference():
    difference, _ = agree.compare((np.array([1e3]), np.array(2e-6)), (np.array([1e3]), np.array(1e-6)))
    assert difference == pytest.approx(1e-6)


def test_choices_and_keys_are_counted_apart():
    one, other = (np.array([1, 2, 3, 4]), jax.random.key(0)), (np.array([1, 2, 3, 5]), jax.random.key(0))
    assert agree.compare(one, other) == (0.0, pytest.approx(1 / 6))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_number_that_is_none_is_a_difference(wrong):
    difference, _ = agree.compare(np.array([1.0, wrong]), np.array([1.0, 2.0]))
    assert np.isnan(difference)
    assert agree.compare(np.array([1.0, wrong]), np.array([1.0, wrong]))[0] == 0


def test_a_kernel_that_raises_is_a_failure_with_its_message():
    def fails(x):
        raise TypeError("no such thing here")

    found = agree.agreement("made.up", fails, lambda key: (jnp.ones(2),))
    assert found.failed
    assert found.error == "TypeError: no such thing here"


def test_a_kernel_agrees_with_itself():
    found = agree.agreement("made.up", jnp.sin, lambda key: (jax.random.normal(key, (3,)),))
    assert not found.failed
    assert found.difference == 0


def test_without_an_accelerator_it_says_so(capsys):
    assert agree.main([]) == 2
    assert "no accelerator is here" in capsys.readouterr().err
