"""Options: what is allowed, how text and JSON become values, and what differs."""
from dataclasses import dataclass

import pytest

from nioodd.core.errors import NiooddError
from nioodd.core.options import (
    check_options,
    differences,
    field_docs,
    from_dict,
    option,
    settings,
    to_dict,
    with_values,
)


@dataclass(frozen=True)
class Bake:
    minutes: int = option(40, "time in the oven", low=1, high=180)
    share: float = option(0.5, "of butter", low=0.0, high=1.0)
    heat: str = option("medium", "of the oven", ("low", "medium", "high"))
    fan: bool = option(False, "whether it runs")
    nuts: tuple[str, ...] = option(("almond",), "kinds of nuts")

    def __post_init__(self): check_options(self)


def fails(call, says):
    with pytest.raises(NiooddError) as e: call()
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("values, says", [
    (dict(minutes=0), "minutes is 0; expected 1 to 180: time in the oven"),
    (dict(minutes=2.0), "minutes is 2.0; expected int"),
    (dict(minutes=True), "minutes is True; expected int"),
    (dict(share=True), "share is True; expected float"),
    (dict(share=float("nan")), "share is nan; expected 0.0 to 1.0"),
    (dict(fan=1), "fan is 1; expected bool"),
    (dict(heat="hot"), "heat is 'hot'; expected one of low, medium, high: of the oven"),
    (dict(nuts="almond"), "nuts is 'almond'; expected tuple"),
    (dict(nuts=["almond"]), "expected tuple"),
])
def test_what_is_not_allowed(values, says): fails(lambda: Bake(**values), says)


def test_what_is_allowed():
    assert Bake(share=1).share == 1  # a whole number where a float is expected
    assert Bake(minutes=180, heat="low", fan=True, nuts=())


@pytest.mark.parametrize("text, name, value", [
    ("minutes=7", "minutes", 7),
    (" minutes = 7 ", "minutes", 7),
    ("share=1e-1", "share", 0.1),
    ("fan=Yes", "fan", True),
    ("fan=0", "fan", False),
    ("nuts=", "nuts", ()),
    ("nuts= a, b ,", "nuts", ("a", "b")),
    ("heat=low", "heat", "low"),
])
def test_text_becomes_a_value(text, name, value): assert getattr(with_values(Bake(), [text]), name) == value


@pytest.mark.parametrize("text, says", [
    ("minuts=1", "unknown option 'minuts'; did you mean 'minutes'"),
    ("minutes=soon", "--set minutes=soon: expected int"),
    ("fan=perhaps", "--set fan=perhaps: expected bool"),
    ("heat", "expected OPTION=VALUE"),
    ("minutes=0", "minutes is 0"),
])
def test_text_that_is_no_value(text, says): fails(lambda: with_values(Bake(), [text]), says)


def test_json_and_back():
    cake = Bake(35, nuts=("walnut", "pecan"))
    assert to_dict(cake)["nuts"] == ["walnut", "pecan"] and from_dict(Bake, to_dict(cake)) == cake
    fails(lambda: from_dict(Bake, to_dict(cake) | dict(salt=1)), "unknown option 'salt'")
    fails(lambda: from_dict(Bake, {k: v for k, v in to_dict(cake).items() if k != "fan"}), "lack fan")


def test_differences_and_settings():
    cake = Bake(35, fan=True, nuts=("walnut", "pecan"))
    assert differences(Bake(), cake)[:2] == ["minutes: 40 → 35", "fan: False → True"]
    assert settings(cake, Bake()) == ["minutes=35", "fan=True", "nuts=walnut,pecan"]
    assert with_values(Bake(), settings(cake, Bake())) == cake and not differences(cake, cake)


def test_every_option_is_documented():
    rows = field_docs(Bake())
    assert [name for name, _, _ in rows] == ["minutes", "share", "heat", "fan", "nuts"]
    assert rows[2] == ("heat", "medium", "of the oven (low, medium, high)") and rows[4][1] == "almond"
