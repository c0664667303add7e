import dataclasses
from typing import Literal

import pytest

from jaxrl_suite.config import Config, check, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Config):
    width: int = field(4, help="units")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Config):
    rate: float = field(0.5, help="bits")
    kind: Literal["a", "b"] = field("a", help="kind")
    sizes: tuple[int, ...] = field((1, 2), help="sizes")
    limit: int | None = field(None, help="limit")
    inner: Inner = field(Inner(), help="nested")

    def __post_init__(self):
        super().__post_init__()
        check(self.rate > 0, argument="rate", value=self.rate, rule="must be positive", remedy="Try 0.5")


def test_round_trip_through_json_values_and_hash():
    config = Outer(rate=2.0, sizes=(3,), inner=Inner(width=8))
    again = Outer.from_dict(config.to_dict() | {"sizes": [3]})  # JSON turns tuples into lists
    assert again == config and hash(again) == hash(config)
    assert again.inner.width == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": -1.0}, r"rate=-1.0: must be positive. Try 0.5."),
        ({"rate": "fast"}, r"Outer.rate='fast': must be float"),
        ({"rate": True}, r"Outer.rate=True: must be float"),
        ({"kind": "c"}, r"Outer.kind='c': must be one of a, b"),
        ({"sizes": (1, "x")}, r"Outer.sizes=\(1, 'x'\): must be tuple of int"),
        ({"limit": 0.5}, r"Outer.limit=0.5: must be int or None"),
        ({"speed": 1}, r"Outer='speed': unknown field. Fields: rate, kind"),
    ],
)
def test_errors_name_field_value_and_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        Outer().replace(**changes)


def test_an_integer_is_a_float_but_not_the_other_way_round():
    assert Outer(rate=3).rate == 3
    with pytest.raises(ValueError, match="must be int"):
        Inner(width=1.0)
