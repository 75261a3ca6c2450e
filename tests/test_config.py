"""Settings: what config files hold, what the command line overrides, and what is refused."""

import importlib
import math
import pkgutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from ml_collections import ConfigDict

import fantasy_jax
from fantasy_jax.config import (
    NonNegativeFloat,
    Settings,
    as_json,
    build,
    load_config,
    override,
    section,
    to_config_dict,
)
from fantasy_jax.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True)
class Inner(Settings):
    """A section within a section."""

    rate: NonNegativeFloat = 0.1
    shape: Literal["linear", "cosine"] = "linear"


class Custom:
    """A section that converts itself."""

    def __init__(self, **sizes: int):
        self.sizes = sizes

    def __eq__(self, other):
        return self.sizes == other.sizes

    def to_config(self) -> dict[str, Any]:
        return {name: Inner(size) for name, size in self.sizes.items()}

    @classmethod
    def from_config(cls, values, path: str) -> "Custom":
        if "small" not in values:
            raise ConfigError(f"{path}.small: is missing")
        return cls(**{name: inner.rate for name, inner in values.items()})


@dataclass(frozen=True)
class Outer:
    """A section."""

    steps: int = 3
    scale: float | Inner = 1.0
    tile: tuple[int, int] = (1, 2)
    widths: tuple[int, ...] = (1,)
    name: str | None = None
    fast: bool = False
    inner: Inner = field(default_factory=Inner)
    stages: tuple[Inner, ...] = (Inner(0.5), Inner(2.0, "cosine"))
    custom: Custom = field(default_factory=lambda: Custom(small=1, large=2))


def changed(*settings):
    return build(Outer, override(to_config_dict({"outer": Outer()}), settings).outer, "outer")


def test_defaults_survive_the_round_trip():
    config = to_config_dict({"outer": Outer(), "weights": "folder", "parts": [Inner()]})
    assert build(Outer, config.outer, "outer") == Outer()
    assert config.weights == "folder"
    assert isinstance(config.outer.inner, ConfigDict)
    assert isinstance(config.outer.stages, tuple)
    assert all(isinstance(stage, ConfigDict) for stage in (*config.outer.stages, *config.parts))
    assert config.outer.stages[1].rate == 2.0
    assert config.outer.custom.large.rate == 2


def test_values_arrive_with_their_types():
    assert changed("outer.steps=7", "outer.inner.rate=2").inner == Inner(rate=2.0)
    assert changed("outer.tile=(3, 4)", "outer.widths=[5, 6, 7]").widths == (5, 6, 7)
    assert changed("outer.name=some text").name == "some text"
    assert changed("outer.fast=True").fast is True
    assert changed("outer.scale=4").scale == 4.0
    assert changed("outer.scale={'rate': 3, 'shape': 'cosine'}").scale == Inner(3.0, "cosine")
    assert changed("outer.custom.large.rate=3").custom == Custom(small=1, large=3)


def test_sections_in_tuples_are_overridden_by_index():
    assert changed("outer.stages.1.rate=3").stages == (Inner(0.5), Inner(3.0, "cosine"))
    assert changed("outer.stages.0.shape=cosine", "outer.stages.1.rate=4").stages == (
        Inner(0.5, "cosine"),
        Inner(4.0, "cosine"),
    )
    assert changed("outer.stages=({'rate': 7},)").stages == (Inner(7.0),)
    assert changed("outer.stages=()").stages == ()
    assert Outer().stages[1].rate == 2.0


def test_a_config_file_may_change_sections_in_tuples():
    config = to_config_dict({"outer": Outer()})
    config.outer.stages[0].rate = 8.0
    assert build(Outer, config.outer, "outer").stages[0] == Inner(8.0)


@pytest.mark.parametrize(
    ("setting", "start"),
    [
        ("outer.stepz=7", "outer.stepz: no such setting; did you mean steps?"),
        ("other.steps=7", "other: no such setting; did you mean outer?"),
        ("outer.steps=7.5", "outer.steps: "),
        ("outer.steps=True", "outer.steps: "),
        ("outer.steps", "--config.outer.steps: "),
        ("outer.inner=3", "outer.inner: "),
        ("outer.steps.more=3", "outer.steps: "),
        ("outer.inner.rate=-1", "outer.inner.rate is -1.0"),
        ("outer.inner.shape=round", "outer.inner.shape: "),
        ("outer.tile=(1, 2, 3)", "outer.tile: "),
        ("outer.tile=4", "outer.tile: "),
        ("outer.tile.0=4", "outer.tile: "),
        ("outer.widths=(1, 'a')", "outer.widths.1: "),
        ("outer.scale=many", "outer.scale: "),
        ("outer.scale={'rat': 3}", "outer.scale.rat: no such setting; did you mean rate?"),
        ("outer.stages=3", "outer.stages: "),
        ("outer.stages=(3,)", "outer.stages.0: "),
        ("outer.stages.1=3", "outer.stages.1: "),
        ("outer.stages.2.rate=3", "outer.stages.2: "),
        ("outer.stages.-1.rate=3", "outer.stages.-1: "),
        ("outer.stages.rate=3", "outer.stages.rate: "),
        ("outer.stages.1.rat=3", "outer.stages.1.rat: no such setting; did you mean rate?"),
        ("outer.stages.1.rate=fast", "outer.stages.1.rate: "),
        ("outer.stages.1.rate=-1", "outer.stages.1.rate is -1.0"),
        ("outer.stages.1.rate.more=1", "outer.stages.1.rate: "),
        ("outer.custom.tiny.rate=1", "outer.custom.tiny: "),
    ],
)
def test_config_error_names_the_full_path(setting, start):
    with pytest.raises(ConfigError) as caught:
        changed(setting)
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_config_error_of_a_section_that_converts_itself():
    with pytest.raises(ConfigError, match=r"^outer\.custom\.small"):
        build(Outer, {"custom": {"large": Inner()}}, "outer")
    with pytest.raises(ConfigError, match=r"^outer\.custom"):
        build(Outer, {"custom": 3}, "outer")
    with pytest.raises(ConfigError, match=r"^model\.small"):
        build(Custom, {}, "model")


def test_json_of_settings():
    settings = {"outer": Outer(), "custom": (Custom(a=1),), "seed": 0}
    assert as_json(settings) == {
        "outer": {
            "steps": 3,
            "scale": 1.0,
            "tile": [1, 2],
            "widths": [1],
            "name": None,
            "fast": False,
            "inner": {"rate": 0.1, "shape": "linear"},
            "stages": [{"rate": 0.5, "shape": "linear"}, {"rate": 2.0, "shape": "cosine"}],
            "custom": {"small": {"rate": 1, "shape": "linear"}, "large": {"rate": 2, "shape": "linear"}},
        },
        "custom": [{"a": {"rate": 1, "shape": "linear"}}],
        "seed": 0,
    }
    assert as_json(to_config_dict({"outer": Outer()}).outer) == as_json(Outer())
    with pytest.raises(TypeError):
        as_json({"folder": Path()})


@pytest.mark.parametrize(
    ("text", "location"),
    [
        (None, "none.py"),
        ("def get_config(:\n", "c.py"),
        ("x = 1\n", "c.py"),
        ("def get_config():\n    return 1\n", "c.py:big"),
        ("", "c.py"),
        ("get_config = 3\n", "c.py"),
        ("def get_config():\n    pass\n", "c.py"),
        ("def get_config():\n    return {'task': 'talking'}\n", "c.py"),
        ("def get_config():\n    return 1 / 0\n", "c.py"),
        ("import nothing_of_this_name\n", "c.py"),
        ("raise SystemExit(3)\n", "c.py"),
        ("def get_config(size):\n    return size\n", "c.py"),
        ("x = '\0'\n", "c.py"),
    ],
)
def test_config_error_for_config_files(tmp_path, text, location):
    if text is not None:
        (tmp_path / "c.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / location))
    assert str(caught.value).startswith(str(tmp_path / location.partition(":")[0]))
    assert "\n" not in str(caught.value)


def test_the_argument_of_a_config_file(tmp_path):
    (tmp_path / "c.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(size='small'):\n"
        "    return ConfigDict({'size': size})\n"
    )
    assert load_config(str(tmp_path / "c.py")).size == "small"
    assert load_config(f"{tmp_path / 'c.py'}:large").size == "large"


def test_the_miniature_builds_and_takes_a_schedule():
    from fantasy_jax.diffusion.guidance import ScaleSchedule
    from fantasy_jax.pipelines.talking import SampleConfig
    from fantasy_jax.system.model import ModelConfig

    schedule = "sample.audio_guidance_scale={'start': 1, 'end': 5, 'shape': 'cosine'}"
    config = override(load_config(str(CONFIGS / "tiny.py")), [schedule])
    assert build(ModelConfig, config.model, "model").transformer.num_layers == 5
    sample = build(SampleConfig, config.sample, "sample")
    assert sample.audio_guidance_scale == ScaleSchedule(1.0, 5.0, "cosine")


def test_the_line_of_a_config_file_that_raises_is_named(tmp_path):
    (tmp_path / "c.py").write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match=r"c\.py: line 2 raises ZeroDivisionError"):
        load_config(str(tmp_path / "c.py"))


def test_a_section_that_is_missing_is_named():
    config = ConfigDict({"video": 3})
    with pytest.raises(ConfigError, match=r"^model: "):
        section(Inner, config, "model")
    with pytest.raises(ConfigError, match=r"^video: "):
        section(Inner, config, "video")


def all_settings():
    """Every section's class of the package."""
    for module in pkgutil.walk_packages(fantasy_jax.__path__, "fantasy_jax."):
        if not module.name.endswith((".beam", "__main__")):  # the first needs Apache Beam
            importlib.import_module(module.name)
    found = [Settings]
    for kind in found:
        found += [x for x in kind.__subclasses__() if x.__module__.startswith("fantasy_jax")]
    return found[1:]


def numbers(hint):
    """Makes values of a setting of a number: the setting itself, or tuples of it."""
    if get_origin(hint) is Annotated:
        return [lambda number: number]
    if get_origin(hint) is tuple:
        inner = [x for x in get_args(hint) if x is not Ellipsis]
        return [
            lambda number, i=i, make=make: (
                (0,) * i + (make(number),) if get_args(hint)[-1] is not Ellipsis else (make(number),)
            )
            for i, x in enumerate(inner)
            for make in numbers(x)
        ]
    return [make for x in get_args(hint) for make in numbers(x)]


def test_every_number_of_every_section_has_a_range():
    kinds = all_settings()
    assert len(kinds) > 30
    needed = {"start": 1.0, "end": 1.0, "num_steps": 1, "batch_size": 1, "optimizer": {}, "path": "x"}
    needed |= {"shift": 5.0, "branches": ((),), "ratios": ((1.0,),)}
    checked = 0
    for kind in kinds:
        needs = {x.name: needed[x.name] for x in fields(kind) if x.default is x.default_factory}
        for name, hint in get_type_hints(kind, include_extras=True).items():
            for make in numbers(hint):
                checked += 1
                for value in (math.nan, math.inf, -math.inf, -(10**9), 10**400):
                    with pytest.raises(ConfigError) as caught:
                        build(kind, needs | {name: make(value)}, "x")
                    assert str(caught.value).startswith(f"x.{name}"), kind
                    assert "\n" not in str(caught.value)
    assert checked > 150


def test_settings_of_the_package_are_checked():
    """No dataclass of settings is left out: whatever a section holds is a section, too."""
    for kind in all_settings():
        for each in fields(kind):
            for hint in (each.type, *get_args(each.type)):
                if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
                    assert issubclass(hint, Settings), (kind, each.name)


def test_a_number_without_a_range_cannot_be_declared():
    for hint in (int, float, int | None, tuple[float, ...], Annotated[int, "many"]):
        with pytest.raises(TypeError, match="size"):
            type("Unchecked", (Settings,), {"__annotations__": {"size": hint}})
