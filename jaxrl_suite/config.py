"""Base class of all configurations: frozen, keyword-only, hashable dataclasses with help texts.

A configuration is static under jit; floats that people sweep belong into a NamedTuple of traced hyperparameters.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Self, cast

import jax
import jax.numpy as jnp


def field(default: Any, *, help: str) -> Any:
    """A dataclass field with a help text, which becomes the text of its command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help})


def check(condition: bool, *, argument: str, value: Any, rule: str, remedy: str = "") -> None:
    """Raises a ValueError that names argument, value, rule and remedy unless ``condition`` holds.

    >>> check(3 > 0, argument="rate", value=3, rule="must be positive")
    """
    if not condition:
        raise ValueError(f"{argument}={value!r}: {rule}." + (f" {remedy}." if remedy else ""))


def check_count(least: int, *, most: int | None = None, why: str = "", **counts: Any) -> None:
    """Refuses what is no whole number from ``least`` on, at most ``most``; for numbers known before anything is traced.

    >>> check_count(1, horizon=3)
    >>> check_count(1, most=4, size=2.5, why=": all are listed")
    Traceback (most recent call last):
    ValueError: size=2.5: must be a whole number in 1..4: all are listed.
    """
    span = f"of at least {least}" if most is None else f"in {least}..{most}"
    for argument, value in counts.items():
        fits = isinstance(value, Integral) and int(value) >= least and (most is None or int(value) <= most)
        check(fits, argument=argument, value=value, rule=f"must be a whole number {span}{why}")


def as_array(argument: str, value: Any, rule: str = "must be an array of numbers") -> jax.Array:
    """The value as an array of its own type. What holds no real numbers is refused, text among it.

    Args:
        argument: what the caller calls the value.
        value: array, number or list, whose entries may be traced.
        rule: what is said of another.

    Raises:
        ValueError: no real numbers.

    >>> as_array("p", "0.5")
    Traceback (most recent call last):
    ValueError: p='0.5': must be an array of numbers.
    """
    try:
        array = None if value is None or isinstance(value, str) else jnp.asarray(value)
    except (TypeError, ValueError):  # a dict, text in a list, rows of unequal length
        array = None
    kinds = (jnp.floating, jnp.integer, jnp.bool_)  # complex numbers and keys are none of them
    real = array is not None and any(jnp.issubdtype(array.dtype, kind) for kind in kinds)
    check(real, argument=argument, value=value if array is None else array.dtype.name, rule=rule)
    return cast(jax.Array, array)


_SAID = {
    "(0, inf]": "must be positive",
    "[0, inf]": "must not be negative",
    "[0, inf)": "must be finite and not negative",
}


def as_number(
    argument: str, value: Any, dtype: Any, *, interval: str = "", rule: str = "must be a number"
) -> jax.Array:
    """A setting as an array without axes, inside an interval where its value is known: not inside jit.

    Args:
        argument: what the caller calls the setting.
        value: number.
        dtype: of the result.
        interval: as in ``"[0, 1)"``; any number by default.
        rule: what is said of what is no number.

    Raises:
        ValueError: no number, several, or outside.

    >>> as_number("decay", 1.0, jnp.float32, interval="[0, 1)")
    Traceback (most recent call last):
    ValueError: decay=1.0: must lie in [0, 1).
    """
    array = as_array(argument, value, rule)
    remedy = "Use vmap for several"
    check(array.ndim == 0, argument=argument, value=array.shape, rule="must be a single number", remedy=remedy)
    array = array.astype(dtype)
    if interval and not isinstance(array, jax.core.Tracer):
        low, high = map(float, interval[1:-1].split(","))
        number = float(array)
        fits = (low <= number if interval[0] == "[" else low < number) and (
            number <= high if interval[-1] == "]" else number < high
        )
        check(fits, argument=argument, value=value, rule=_SAID.get(interval, f"must lie in {interval}"))
    return array


def check_key(key: Any) -> None:
    """Refuses what is no random key, such as a bare seed or another argument in its place.

    >>> check_key(jax.random.key(0))
    """
    dtype = getattr(key, "dtype", None)
    ok = dtype is not None and (jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32)
    shown = key if isinstance(key, int | float) else type(key).__name__
    check(ok, argument="key", value=shown, rule="must be a random key", remedy="Write jax.random.key(0)")


def type_name(annotation: Any) -> str:
    """A readable name of a type annotation.

    >>> type_name(int | None)
    'int or None'
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is tuple:
        return f"tuple of {type_name(arguments[0])}" if arguments else "tuple"
    if annotation is type(None):
        return "None"
    return getattr(annotation, "__name__", str(annotation))


def matches(value: Any, annotation: Any) -> bool:
    """Whether a value fits an annotation made of int, float, bool, str, None, Literal, unions and tuples."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(matches(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(matches, value, arguments))
    if annotation is Any:
        return True
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation) if isinstance(annotation, type) else True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of configurations. Subclasses are ``@dataclasses.dataclass(frozen=True, kw_only=True)``.

    ``__post_init__`` checks the type of every field; a subclass that overrides it calls ``super().__post_init__()``
    and then checks its own rules with :func:`check`.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value, annotation = getattr(self, item.name), hints[item.name]
            if isinstance(value, list):  # JSON has no tuples
                value = tuple(tuple(part) if isinstance(part, list) else part for part in value)
                object.__setattr__(self, item.name, value)
            name = f"{type(self).__name__}.{item.name}"
            check(matches(value, annotation), argument=name, value=value, rule=f"must be {type_name(annotation)}")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again.

        Raises:
            ValueError: a name is not a field, or a value breaks a rule.
        """
        _check_names(type(self), changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON; nested configurations become dicts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: a name is not a field, or a value breaks a rule.
        """
        _check_names(cls, values)
        hints = typing.get_type_hints(cls)
        return cls(
            **{
                name: hints[name].from_dict(value) if isinstance(value, Mapping) and _is_config(hints[name]) else value
                for name, value in values.items()
            }
        )


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _check_names(cls: type[Config], values: Mapping[str, Any]) -> None:
    known = [item.name for item in dataclasses.fields(cls)]
    for name in values:
        check(
            name in known, argument=cls.__name__, value=name, rule="unknown field", remedy=f"Fields: {', '.join(known)}"
        )
