"""Frozen, strict records of the few files that a device reads: manifest, io.json, statistics, budgets.

    class Entry(Record):
        sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
        size: int = Field(ge=0)

They look like pydantic models, with the same names for the same things, and configurations are pydantic models. But
importing pydantic and building its schemas took as long as importing ONNX Runtime, at every start of a runtime and at
every restart of a worker. So what a device reads is checked by these lines, and pydantic stays with the command line.
Nothing is cast, but for integers where a float is wanted and lists where a tuple is: JSON knows no better.
"""

from __future__ import annotations

import math
import operator
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, Union

from fmdeploy.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self, dataclass_transform
else:  # typing has it since 3.11, and it does nothing at run time

    def dataclass_transform(**_: object) -> Callable[[type], type]:
        """Return what leaves a class as it is."""
        return lambda cls: cls


class Problem(NamedTuple):
    """What is wrong with one value, and where it stands."""

    place: tuple[str | int, ...]
    text: str
    value: object = None


class RecordError(ValueError):
    """Values that are no record; `problems` are all of them."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, one.place))}: {one.text}" for one in problems))
        self.problems = problems


class Rule(NamedTuple):
    """What holds for a field beyond its type."""

    default: Any = ...
    default_factory: Callable[[], Any] | None = None
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    pattern: str | None = None

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is ... and self.default_factory is None

    def initial(self) -> Any:
        """The default."""
        return self.default if self.default_factory is None else self.default_factory()

    def broken(self, value: Any) -> str | None:
        """Say which rule a value of the right type breaks."""
        if isinstance(value, (int, float)):
            return self._broken_number(value)
        if isinstance(value, (str, tuple)):
            if self.min_length is not None and len(value) < self.min_length:
                return f"should have at least {self.min_length} items or characters"
            if self.max_length is not None and len(value) > self.max_length:
                return f"should have at most {self.max_length} items or characters"
        if isinstance(value, str) and self.pattern is not None and not re.fullmatch(self.pattern, value):
            return f"string should match pattern '{self.pattern}'"
        return None

    def _broken_number(self, value: float) -> str | None:
        for limit, holds, words in (
            (self.ge, operator.ge, "greater than or equal to"), (self.gt, operator.gt, "greater than"),
            (self.le, operator.le, "less than or equal to"), (self.lt, operator.lt, "less than"),
        ):
            if limit is not None and not holds(value, limit):
                return f"input should be {words} {limit:g}"
        return None


def Field(  # noqa: N802 - pydantic's name for the same thing
    default: Any = ..., *, default_factory: Callable[[], Any] | None = None, description: str = "",
    ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None,
    min_length: int | None = None, max_length: int | None = None, pattern: str | None = None,
) -> Any:
    """A field with rules; the description is for readers of the source."""
    return Rule(default, default_factory, ge, gt, le, lt, min_length, max_length, pattern)


Dumped = Literal["python", "json"]
# A check takes a value, its place and the list that it adds problems to; it returns the value as it is kept.
Check = Callable[[Any, tuple[str | int, ...], list[Problem]], Any]
Schema = dict[str, tuple[Check, Rule]]
_SCHEMAS: dict[type[Record], Schema] = {}


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class Record:
    """Base of all records: annotated names are fields. A subclass may add rules that concern several in `_agree`."""

    forbids_unknown: ClassVar[bool] = True
    """Whether an unknown key is an error; otherwise it is ignored: written by a newer version."""

    def __init__(self, /, **values: Any) -> None:
        """Check the values and keep them.

        Raises:
            RecordError: Anything about them is wrong; it says everything that is.
        """
        problems: list[Problem] = []
        self.__dict__.update(_checked(type(self), values, (), problems))
        if not problems:
            try:
                self._agree()
            except ValueError as error:
                problems.append(Problem((), str(error), values))
        if problems:
            raise RecordError(problems)

    def _agree(self) -> None:
        """Raise ValueError where the values contradict each other."""

    @classmethod
    def model_validate(cls, values: Mapping[str, Any]) -> Self:
        """Make a record of plain JSON values.

        Raises:
            RecordError: They are not one.
        """
        return cls(**values)

    def model_dump(self, *, mode: Dumped = "python", exclude: Collection[str] = ()) -> dict[str, Any]:
        """Return a dict of plain values; tuples are lists in the mode "json"."""
        return {name: _plain(self.__dict__[name], mode) for name in _schema(type(self)) if name not in exclude}

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """Return a copy with other values, which are not checked."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, **update)
        return other

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a {type(self).__name__} does not change")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} does not change")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


RecordT = TypeVar("RecordT", bound=Record)


def read_record(model: type[RecordT], values: Mapping[str, Any], *, where: object) -> RecordT:
    """Make a record of what a file holds.

    Raises:
        ConfigError: With every problem in one line.
    """
    try:
        return model.model_validate(values)
    except RecordError as error:
        raise ConfigError("; ".join(_lines(model, error)), where=where) from error


def _lines(model: type[Record], error: RecordError) -> Iterator[str]:
    for place, text, value in error.problems:
        key = ".".join(map(str, place)) or "(all)"
        if text == UNKNOWN:
            yield f"unknown key {key!r}{_closest(model, str(place[-1]))}"
        elif text == REQUIRED:
            yield f"{key!r} is required"
        else:
            yield f"{key!r}: {text}, found {value!r}"


def _closest(model: type[Record], key: str) -> str:
    import difflib  # only errors need it

    known = _schema(model)
    near = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})"


UNKNOWN, REQUIRED = "extra inputs are not permitted", "field required"


def _schema(model: type[Record]) -> Schema:
    """Checks and rules of every field; built when the first record of a kind is made."""
    known = _SCHEMAS.get(model)
    if known is None:
        known = _SCHEMAS[model] = {}
        for name, hint in typing.get_type_hints(model, include_extras=True).items():
            if typing.get_origin(hint) is not ClassVar:
                default = getattr(model, name, ...)
                rule = default if isinstance(default, Rule) else Rule(default)
                known[name] = _check_of(hint, rule), rule
    return known


def _checked(
    model: type[Record], values: Mapping[str, Any], place: tuple[str | int, ...], problems: list[Problem]
) -> dict[str, Any]:
    schema, kept = _schema(model), {}
    for name, (check, rule) in schema.items():
        if name in values:
            kept[name] = check(values[name], (*place, name), problems)
        elif rule.is_required:
            problems.append(Problem((*place, name), REQUIRED, values))
        else:
            kept[name] = rule.initial()
    if model.forbids_unknown:
        problems += [Problem((*place, name), UNKNOWN, values[name]) for name in values if name not in schema]
    return kept


def _plain(value: Any, mode: Dumped) -> Any:
    if isinstance(value, Record):
        return value.model_dump(mode=mode)
    if isinstance(value, dict):
        return {key: _plain(one, mode) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        plain = [_plain(one, mode) for one in value]
        return plain if mode == "json" or isinstance(value, list) else tuple(plain)
    return value.value if mode == "json" and isinstance(value, Enum) else value


def _check_of(hint: Any, rule: Rule) -> Check:
    """The check of one type, with the rules for its values."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _optional(next(one for one in arguments if one is not type(None)), rule)
    if origin is tuple:
        return _tuple(arguments, rule)
    if origin is dict:
        return _mapping(arguments[1])
    if origin is Literal:
        return _one_of({value: value for value in arguments})
    if hint is Any:
        return lambda value, place, problems: value
    if issubclass(hint, Record):
        return _record(hint)
    if issubclass(hint, Enum):
        return _one_of({member.value: member for member in hint})
    return _scalar(hint, rule)


WORDS: dict[type, str] = {str: "a valid string", int: "a valid integer", float: "a valid number"}


def _scalar(kind: type, rule: Rule) -> Check:
    kinds = (int, float) if kind is float else (kind,)

    def check(value: Any, place: tuple[str | int, ...], problems: list[Problem]) -> Any:
        if not isinstance(value, kinds) or isinstance(value, bool):
            problems.append(Problem(place, f"input should be {WORDS[kind]}", value))
            return value
        if kind is float:
            value = _finite(value, place, problems)
        if why := rule.broken(value):
            problems.append(Problem(place, why, value))
        return value

    return check


def _finite(value: Any, place: tuple[str | int, ...], problems: list[Problem]) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        problems.append(Problem(place, "input should be a finite number", value))
    return number


def _optional(inner: Any, rule: Rule) -> Check:
    check = _check_of(inner, rule)
    return lambda value, place, problems: None if value is None else check(value, place, problems)


def _tuple(arguments: tuple[Any, ...], rule: Rule) -> Check:
    size = None if arguments[-1] is Ellipsis else len(arguments)
    one = _check_of(arguments[0], Rule())  # the tuples here hold one type

    def check(value: Any, place: tuple[str | int, ...], problems: list[Problem]) -> Any:
        if not isinstance(value, (list, tuple)) or (size is not None and len(value) != size):
            problems.append(Problem(place, f"input should be a valid list{f' of {size}' if size else ''}", value))
            return value
        kept = tuple(one(item, (*place, number), problems) for number, item in enumerate(value))
        if why := rule.broken(kept):
            problems.append(Problem(place, why, value))
        return kept

    return check


def _mapping(inner: Any) -> Check:
    def check(value: Any, place: tuple[str | int, ...], problems: list[Problem]) -> Any:
        if not isinstance(value, dict):
            problems.append(Problem(place, "input should be a valid dictionary", value))
            return value
        kept = {}
        for key, one in value.items():
            if not isinstance(key, str):
                problems.append(Problem((*place, str(key)), "keys should be strings", key))
            kept[key] = checked(one, (*place, key), problems)
        return kept

    checked = _check_of(inner, Rule())
    return check


def _one_of(choices: dict[Any, Any]) -> Check:
    words = [repr(choice) for choice in choices]
    text = f"input should be {' or '.join(filter(None, (', '.join(words[:-1]), words[-1])))}"

    def check(value: Any, place: tuple[str | int, ...], problems: list[Problem]) -> Any:
        if isinstance(value, (str, int)) and value in choices:  # what JSON has: a list has no hash
            return choices[value]
        problems.append(Problem(place, text, value))
        return value

    return check


def _record(model: type[Record]) -> Check:
    def check(value: Any, place: tuple[str | int, ...], problems: list[Problem]) -> Any:
        if isinstance(value, model):
            return value
        if not isinstance(value, dict):
            problems.append(Problem(place, "input should be a valid dictionary", value))
            return value
        try:
            return model(**value)
        except RecordError as error:
            problems += [Problem((*place, *one.place), one.text, one.value) for one in error.problems]
            return value

    return check
