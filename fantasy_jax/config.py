"""Settings: a short Python file returns a ConfigDict, from which frozen dataclasses are built once.

Library code takes dataclasses only, never a ConfigDict or a flag. A setting that does not exist or has the
wrong type is found while building, and the message names its full path. The dataclasses are `Settings`, each
number of which has a range.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

from fantasy_jax.errors import ConfigError

T = TypeVar("T")

_SECTION = (Mapping, ConfigDict)


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number can have; no range has NaN or an infinity.

    Attributes:
        low: Smallest value.
        high: Largest value.
        above: Whether `low` itself is excluded.
        below: Whether `high` itself is excluded.
    """

    low: int | float
    high: int | float
    above: bool = False
    below: bool = False

    def check(self, value: int | float, name: str) -> None:
        """Raises a ConfigError, which begins with `name`, unless the range has the value."""
        inside = self.low <= value <= self.high
        if not inside or (self.above and value == self.low) or (self.below and value == self.high):
            least = f"{'more than' if self.above else 'at least'} {_exact(self.low)}"
            most = f"{'less than' if self.below else 'at most'} {_exact(self.high)}"
            raise ConfigError(f"{name} is {value}; it must be {least} and {most}")


def _exact(limit: int | float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


SEED = Range(0, 2**64 - 1)
NonNegativeInt = Annotated[int, Range(0, 2**31 - 1)]
PositiveInt = Annotated[int, Range(1, 2**31 - 1)]
NonNegativeFloat = Annotated[float, Range(0, 1e9)]
PositiveFloat = Annotated[float, Range(0, 1e9, above=True)]
Factor = Annotated[float, Range(-1000, 1000)]
"""A scale of guidance or of an adapter's condition."""
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]
Width = Annotated[int, Range(1, 2**20)]
"""A size of a network; a matrix of the largest two can still be described, though not held in memory."""
Depth = Annotated[int, Range(1, 1024)]
"""A number of layers."""
Seed = Annotated[int, Range(0, 2**32 - 1)]
"""A seed of NumPy, Grain and JAX alike."""


class Settings:
    """Base class of the sections: frozen dataclasses, each number of which has a `Range`.

    A number is declared as `Annotated[int, Range(...)]`, also inside a union or a tuple. A subclass with a
    number that has no range is a TypeError. A `__post_init__` of a subclass begins with that of its base.

    Raises:
        ConfigError: A number is outside its range; the message begins with the name of the setting.
    """

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        for name, hint in _hints(cls).items():
            if _lacks_range(hint):
                raise TypeError(f"{cls.__name__}.{name} is a number without a Range")

    def __post_init__(self):
        for name, hint in _hints(type(self)).items():
            _check_ranges(hint, getattr(self, name), name)


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}


def _lacks_range(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return not any(isinstance(part, Range) for part in get_args(hint)[1:])
    if get_origin(hint) in (Union, types.UnionType, tuple):
        return any(map(_lacks_range, get_args(hint)))
    return hint in (int, float)


def _check_ranges(hint: Any, value: Any, name: str) -> None:
    if get_origin(hint) in (Union, types.UnionType):
        for choice in get_args(hint):
            _check_ranges(choice, value, name)
    elif get_origin(hint) is tuple and isinstance(value, tuple):
        inner = get_args(hint)
        inner = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
        for i, (each, item) in enumerate(zip(inner, value, strict=False)):
            _check_ranges(each, item, f"{name}.{i}")
    elif get_origin(hint) is Annotated and isinstance(value, int | float):
        for part in get_args(hint)[1:]:
            if isinstance(part, Range):
                part.check(value, name)


def load_config(location: str) -> ConfigDict:
    """Runs `get_config` of a config file, with the argument that follows a colon (`tiny.py:quick`)."""
    path, _, argument = location.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such config file; configs/tiny.py is an example")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    with _running(path):
        spec.loader.exec_module(module)
    if not callable(get_config := getattr(module, "get_config", None)):
        raise ConfigError(f"{path}: has no function get_config()")
    if argument and not inspect.signature(get_config).parameters:
        raise ConfigError(
            f"{path}: get_config() takes no argument, but {argument!r} was given after the colon"
        )
    with _running(path):
        config = get_config(argument) if argument else get_config()
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{path}: get_config() returns {type(config).__name__}; it must return a ConfigDict"
        )
    return config


@contextmanager
def _running(path: str) -> Iterator[None]:
    """Errors of a config file's own code become a ConfigError, with the line where there is one."""
    try:
        yield
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{path}: line {error.lineno} is not valid Python: {error.msg}") from error
    except (Exception, SystemExit) as error:
        file = os.path.abspath(path)
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file
        ]
        where = f"line {lines[-1]} raises" if lines else "raises"
        raise ConfigError(f"{path}: {where} {type(error).__name__}: {error}") from error


def to_config_dict(sections: Mapping[str, Any]) -> ConfigDict:
    """Converts sections to a ConfigDict, so that a config file offers every setting with its default.

    Dataclasses and objects with `to_config()`, which returns a mapping, become ConfigDicts, in tuples too.
    """
    return ConfigDict({name: _to_config(section) for name, section in sections.items()})


def _to_config(value: Any) -> Any:
    if isinstance(settings := _settings(value), _SECTION):
        return ConfigDict({name: _to_config(inner) for name, inner in settings.items()})
    return type(value)(map(_to_config, value)) if type(value) in (list, tuple) else value


def as_json(settings: Any) -> Any:
    """Converts settings to what a JSON file of them gives: dataclasses become dicts, tuples become lists."""

    def default(value: Any) -> Any:
        if isinstance(inner := _settings(value), _SECTION):
            return dict(inner)
        raise TypeError(f"{type(value).__name__} is not a setting")

    return json.loads(json.dumps(settings, default=default))


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yields path and both values of every setting that differs; a setting that one side lacks is None."""
    for key in (*one, *(key for key in other if key not in one)):
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from differences(mine, theirs, f"{path}{key}.")
        elif mine != theirs:
            yield f"{path}{key}", mine, theirs


def _settings(value: Any) -> Any:
    """Returns the fields of a dataclass or of an object with `to_config()`, and any other value as it is."""
    if isinstance(value, type):
        return value
    if hasattr(value, "to_config"):
        return value.to_config()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def override(config: ConfigDict, settings: Sequence[str]) -> ConfigDict:
    """Applies settings such as `train.loop.seed=1` and `train.stages.0.num_steps=100` in place.

    Values are parsed as Python literals, or taken as text if they are none; types are checked when the
    dataclasses are built.

    Raises:
        ConfigError: A setting does not exist or is a section.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--config.{path}: has no value; use --config.{path}=VALUE")
        if not all(path.split(".")):
            raise ConfigError(f"--config.{path}: is not the name of a setting")
        *parents, name = path.split(".")
        section = config
        for depth, parent in enumerate(parents):
            section = _member(section, parent, ".".join(parents[:depth]))
        value = _member(section, name, ".".join(parents))
        if isinstance(value, ConfigDict):
            raise ConfigError(f"{path}: is a section; set one of {', '.join(value)}")
        try:
            with section.ignore_type():
                section[name] = _literal(text)
        except (ArithmeticError, TypeError, ValueError) as error:  # such as a dict with other keys than names
            raise ConfigError(f"{path}: cannot be {text:.60} ({error})") from error
    return config


def _member(section: Any, name: str, path: str) -> Any:
    """Returns a setting of a section, or a section of a tuple of sections by its index."""
    if isinstance(section, ConfigDict):
        if name not in section:
            raise ConfigError(_unknown(path, name, list(section)))
        return section[name]
    if not _is_sections(section):
        raise ConfigError(f"{path}: is a value without settings inside")
    if not name.isdecimal() or int(name) >= len(section):
        raise ConfigError(_unknown(path, name, list(map(str, range(len(section))))))
    return section[int(name)]


def _is_sections(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, ConfigDict) for item in value)


def build(kind: type[T], values: Any, path: str) -> T:
    """Builds a frozen dataclass, and those inside it, from a section of a config.

    Args:
        kind: The dataclass, or a class with a class method `from_config(values, path)`.
        values: Its settings, a mapping or a ConfigDict; omitted ones take their defaults.
        path: Path of the section, for messages.

    Raises:
        ConfigError: A setting does not exist, has the wrong type or an invalid value.
    """
    if not isinstance(values, _SECTION):
        raise ConfigError(f"{path}: must hold the settings of {kind.__name__}, not {values!r}")
    if hasattr(kind, "from_config"):
        return kind.from_config(dict(values), path)
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ConfigError(_unknown(path, name, list(fields)))
    converted = {name: _convert(hints[name], values[name], f"{path}.{name}") for name in values}
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}.{name}: is missing; {kind.__name__} needs it")
    try:
        return kind(**converted)
    except ValueError as error:  # messages of a dataclass about its settings begin with their names
        raise ConfigError(f"{path}.{error}") from error


def section(kind: type[T], config: ConfigDict, name: str) -> T:
    """Builds the section of this name of a whole config (`build`); ConfigError, too, if there is none."""
    if name not in config:
        raise ConfigError(f"{name}: is missing; the config needs such a section")
    return build(kind, config[name], name)


def _is_section_type(kind: Any) -> bool:
    return isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "from_config"))


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Converts a value to its annotated type; integers pass as floats, lists as tuples."""
    if _is_section_type(kind):
        return build(kind, value, path)
    if get_origin(kind) in (Union, types.UnionType):
        return _convert_union(kind, value, path)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ConfigError(f"{path}: is {value!r}; use one of {', '.join(map(repr, get_args(kind)))}")
    if get_origin(kind) is tuple:
        return _convert_tuple(kind, value, path)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{path}: is too large for a number with a decimal point") from None
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    raise ConfigError(f"{path}: must be {kind.__name__}, not {value!r}")


def _convert_union(kind: Any, value: Any, path: str) -> Any:
    """Converts to the section among the choices, or to the first choice that takes the value."""
    choices = get_args(kind)
    if isinstance(value, _SECTION):
        choices = [choice for choice in choices if _is_section_type(choice)]
    elif value is None and type(None) in choices:
        return None
    else:
        choices = [choice for choice in choices if choice is not type(None)]
    for choice in choices:
        try:
            return _convert(choice, value, path)
        except ConfigError:
            if len(choices) == 1:
                raise
    names = " or ".join("None" if c is type(None) else c.__name__ for c in get_args(kind))
    raise ConfigError(f"{path}: must be {names}, not {value!r}")


def _convert_tuple(kind: Any, value: Any, path: str) -> tuple:
    inner = get_args(kind)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path}: must be several values, as in (1, 2), not {value!r}")
    if inner[-1] is Ellipsis:
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        raise ConfigError(f"{path}: must be {len(inner)} values, not {len(value)}: {value!r}")
    return tuple(_convert(k, v, f"{path}.{i}") for i, (k, v) in enumerate(zip(inner, value, strict=True)))


def _unknown(path: str, name: str, known: Sequence[str]) -> str:
    full = f"{path}.{name}" if path else name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
    return f"{full}: no such setting; {hint}"


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
        repr(value)  # Python does not print integers of thousands of digits
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    return value
