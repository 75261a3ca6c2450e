"""Settings: a short Python file gives a ConfigDict, and that is built once into frozen dataclasses.

Library code sees dataclasses only, never a ConfigDict or a flag. A setting that does not exist or is of
the wrong type is found while building, and named by its full path.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

T = TypeVar("T")

_SECTION = (Mapping, ConfigDict)


class ConfigError(ValueError):
    """A setting that cannot be; the message is one line, and names it."""


def load_config(location: str) -> ConfigDict:
    """Runs a config file's `get_config`, with the argument that may follow a colon, as in `tiny.py:quick`."""
    path, _, argument = location.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such config file; configs/tiny.py is one that works")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{path}: line {error.lineno} is no Python: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path}: has no function get_config()")
    if argument and not inspect.signature(module.get_config).parameters:
        raise ConfigError(f"{path}: takes no argument, but {argument!r} was given after the colon")
    return module.get_config(argument) if argument else module.get_config()


def to_config_dict(sections: Mapping[str, Any]) -> ConfigDict:
    """Dataclasses as a ConfigDict, so that a config file shows and offers every setting with its default."""
    return ConfigDict(
        {
            name: dataclasses.asdict(section) if dataclasses.is_dataclass(section) else section
            for name, section in sections.items()
        },
        convert_dict=True,
    )


def as_json(settings: Any) -> Any:
    """Settings as they come back from a JSON file: dataclasses as mappings, tuples as lists."""
    return json.loads(json.dumps(settings, default=dataclasses.asdict))


def override(config: ConfigDict, settings: Sequence[str]) -> ConfigDict:
    """Applies `sample.steps=20` and the like, in place.

    Values are read as Python literals, or as text where they are none; types are checked when the
    dataclasses are built.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--config.{path}: give a value, as in --config.{path}=VALUE")
        *parents, name = path.split(".")
        section = config
        for depth, parent in enumerate(parents):
            section = _existing(section, parent, ".".join(parents[:depth]))
            if not isinstance(section, ConfigDict):
                raise ConfigError(f"{'.'.join(parents[: depth + 1])}: is a value, with no settings inside it")
        if isinstance(_existing(section, name, ".".join(parents)), ConfigDict):
            raise ConfigError(f"{path}: is a section; set one of {', '.join(section[name])}")
        with section.ignore_type():
            section[name] = _literal(text)
    return config


def build(kind: type[T], values: Mapping[str, Any] | ConfigDict, path: str) -> T:
    """Builds a frozen dataclass, and those inside it, from a section of a config.

    Args:
        kind: The dataclass.
        values: Its settings; those left out take their defaults.
        path: Where the section lies, for messages.

    Raises:
        ConfigError: A setting does not exist, is of the wrong type, or cannot have its value.
    """
    hints = get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in fields:
            raise ConfigError(_unknown(path, name, fields))
    converted = {name: _convert(hints[name], values[name], f"{path}.{name}") for name in values}
    try:
        return kind(**converted)
    except ValueError as error:  # what a dataclass says of its own settings begins with their names
        raise ConfigError(f"{path}.{error}") from error


def _convert(kind: Any, value: Any, path: str) -> Any:
    """One value as its type asks; whole numbers pass as floats, lists as tuples."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, _SECTION):
            raise ConfigError(f"{path}: wants the settings of {kind.__name__}, not {value!r}")
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
        return float(value)
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    raise ConfigError(f"{path}: wants {kind.__name__}, not {value!r}")


def _convert_union(kind: Any, value: Any, path: str) -> Any:
    """The settings of a dataclass among the choices, or the first choice that takes the value."""
    choices = get_args(kind)
    if isinstance(value, _SECTION):
        choices = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    elif value is None and type(None) in choices:
        return None
    for choice in choices:
        try:
            return _convert(choice, value, path)
        except ConfigError:
            if len(choices) == 1:
                raise
    names = " or ".join("None" if c is type(None) else c.__name__ for c in get_args(kind))
    raise ConfigError(f"{path}: wants {names}, not {value!r}")


def _convert_tuple(kind: Any, value: Any, path: str) -> tuple:
    inner = get_args(kind)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path}: wants several values, as in (1, 2), not {value!r}")
    if inner[-1] is Ellipsis:
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        raise ConfigError(f"{path}: wants {len(inner)} values, not {len(value)}: {value!r}")
    return tuple(_convert(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True)))


def _existing(section: ConfigDict, name: str, path: str) -> Any:
    if name not in section:
        raise ConfigError(_unknown(path, name, list(section)))
    return section[name]


def _unknown(path: str, name: str, known: Sequence[str]) -> str:
    full = f"{path}.{name}" if path else name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
    return f"{full}: no such setting; {hint}"


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
