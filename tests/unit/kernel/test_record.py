"""Records are strict: what a file says is taken as it is, or refused with every reason at once."""

from __future__ import annotations

import contextlib
import copy
import pickle
from enum import Enum
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmdeploy.errors import ConfigError
from fmdeploy.manifest import Manifest
from fmdeploy.record import Field, Record, RecordError, read_record


class Colour(str, Enum):
    RED = "RED"
    BLUE = "BLUE"


class Part(Record):
    name: str = Field(min_length=1, max_length=5, pattern=r"^[a-z]+$")
    size: int = Field(default=3, ge=0, lt=10)


class Whole(Record):
    colour: Colour
    kind: Literal["a", "b"] = "a"
    ratio: float | None = Field(default=None, gt=0, le=1)
    shape: tuple[int, ...] = ()
    reach: tuple[float, float] = (0.0, 1.0)
    parts: dict[str, Part] = Field(default_factory=dict)
    anything: dict[str, Any] = Field(default_factory=dict)

    def _agree(self) -> None:
        if len(self.parts) > 2:
            raise ValueError("too many parts")


FULL: dict[str, Any] = {"colour": "BLUE", "kind": "b", "ratio": 1, "shape": [1, 2], "reach": [0, 2],
                        "parts": {"x": {"name": "abc", "size": 9}}, "anything": {"deep": [1, {"a": None}]}}


def test_what_a_file_says_comes_back() -> None:
    whole = Whole.model_validate(FULL)
    assert whole.colour is Colour.BLUE
    assert (whole.shape, whole.reach, type(whole.ratio)) == ((1, 2), (0.0, 2.0), float)
    assert whole.parts["x"] == Part(name="abc", size=9)
    assert whole.model_dump(mode="json") == FULL
    assert Whole.model_validate(whole.model_dump()) == whole
    assert "ratio" not in whole.model_dump(exclude={"ratio"})
    assert copy.deepcopy(whole) == pickle.loads(pickle.dumps(whole)) == whole


def test_defaults_are_not_shared_and_nothing_changes() -> None:
    one, other = Whole(colour=Colour.RED), Whole(colour=Colour.RED)
    assert one == other
    assert one.parts is not other.parts
    with pytest.raises(AttributeError, match="does not change"):
        one.kind = "b"  # type: ignore[misc]
    with pytest.raises(AttributeError, match="does not change"):
        del one.kind
    assert one.model_copy(update={"kind": "b"}).kind == "b"
    assert hash(Part(name="a")) == hash(Part(name="a"))


@pytest.mark.parametrize(("change", "message"), [
    ({"colour": "GREEN"}, "'colour': input should be 'RED' or 'BLUE', found 'GREEN'"),
    ({"colour": ["RED"]}, "'colour': input should be"),
    ({"kind": None}, "'kind': input should be 'a' or 'b'"),
    ({"ratio": "1"}, "'ratio': input should be a valid number, found '1'"),
    ({"ratio": True}, "'ratio': input should be a valid number"),
    ({"ratio": 0}, "'ratio': input should be greater than 0"),
    ({"ratio": 1.5}, "'ratio': input should be less than or equal to 1"),
    ({"ratio": float("nan")}, "'ratio': input should be a finite number"),
    ({"ratio": 10**400}, "'ratio': input should be a finite number"),
    ({"shape": [1, 2.0]}, "'shape.1': input should be a valid integer, found 2.0"),
    ({"shape": [False]}, "'shape.0': input should be a valid integer"),
    ({"shape": 3}, "'shape': input should be a valid list"),
    ({"reach": [1]}, "'reach': input should be a valid list of 2"),
    ({"parts": []}, "'parts': input should be a valid dictionary"),
    ({"parts": {"x": 1}}, "'parts.x': input should be a valid dictionary"),
    ({"parts": {"x": {}}}, "'parts.x.name' is required"),
    ({"parts": {"x": {"name": "a\n"}}}, "'parts.x.name': string should match"),
    ({"parts": {"x": {"name": ""}}}, "'parts.x.name': should have at least 1"),
    ({"parts": {"x": {"name": "abcdef"}}}, "'parts.x.name': should have at most 5"),
    ({"parts": {"x": {"name": "a", "size": -1}}}, "'parts.x.size': input should be greater than or equal to 0"),
    ({"parts": {"x": {"name": "a", "size": 10}}}, "'parts.x.size': input should be less than 10"),
    ({"parts": {k: {"name": k} for k in "abc"}}, "'(all)': too many parts"),
    ({"colours": 1}, "unknown key 'colours', did you mean 'colour'?"),
    ({"self": 1}, "unknown key 'self'"),
])
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_record(Whole, {**FULL, **change}, where="here")
    assert message in str(refused.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(RecordError) as refused:
        Whole.model_validate({"kind": 1, "shape": ["x"], "other": 2})
    assert [one.place for one in refused.value.problems] == [("colour",), ("kind",), ("shape", 0), ("other",)]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))


@given(st.dictionaries(st.sampled_from([*FULL, "self", "values", "x"]), JSON))
def test_nothing_but_a_record_error(values: dict[str, Any]) -> None:
    for model in (Whole, Manifest):
        with contextlib.suppress(RecordError):
            found = model.model_validate(values)
            assert model.model_validate(found.model_dump(mode="json")) == found
