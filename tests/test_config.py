"""Settings: what a config file may hold, what the command line may change, and what is refused."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from fantasy_jax.config import ConfigError, build, load_config, override, to_config_dict
from fantasy_jax.diffusion.guidance import ScaleSchedule
from fantasy_jax.pipeline import ModelConfig, SampleConfig

TINY = str(Path(__file__).parent.parent / "configs" / "tiny.py")


@dataclass(frozen=True)
class Inner:
    """A section within a section."""

    rate: float = 0.1
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self):
        if self.rate < 0:
            raise ConfigError(f"rate is {self.rate}; it cannot be negative")


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


def changed(*settings):
    return build(Outer, override(to_config_dict({"outer": Outer()}), settings).outer, "outer")


def test_values_arrive_with_their_types():
    assert changed() == Outer()
    assert changed("outer.steps=7", "outer.inner.rate=2").inner == Inner(rate=2.0)
    assert changed("outer.tile=(3, 4)", "outer.widths=[5, 6, 7]").widths == (5, 6, 7)
    assert changed("outer.name=some text").name == "some text"
    assert changed("outer.fast=True").fast is True
    assert changed("outer.scale=4").scale == 4.0
    assert changed("outer.scale={'rate': 3, 'shape': 'cosine'}").scale == Inner(3.0, "cosine")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("outer.stepz=7", "outer.stepz: no such setting; did you mean steps?"),
        ("other.steps=7", "other: no such setting; did you mean outer?"),
        ("outer.steps=7.5", "outer.steps: wants int, not 7.5"),
        ("outer.steps=True", "outer.steps: wants int, not True"),
        ("outer.steps", "give a value, as in --config.outer.steps=VALUE"),
        ("outer.inner=3", "outer.inner: is a section; set one of rate, shape"),
        ("outer.steps.more=3", "outer.steps: is a value, with no settings inside it"),
        ("outer.inner.rate=-1", "outer.inner.rate is -1.0; it cannot be negative"),
        ("outer.inner.shape=round", "outer.inner.shape: is 'round'; use one of 'linear', 'cosine'"),
        ("outer.tile=(1, 2, 3)", "outer.tile: wants 2 values, not 3"),
        ("outer.tile=4", "outer.tile: wants several values"),
        ("outer.widths=(1, 'a')", "outer.widths[1]: wants int, not 'a'"),
        ("outer.scale=many", "outer.scale: wants float or Inner, not 'many'"),
        ("outer.scale={'rat': 3}", "outer.scale.rat: no such setting; did you mean rate?"),
    ],
)
def test_what_cannot_be_is_named_in_one_line(setting, message):
    with pytest.raises(ConfigError) as caught:
        changed(setting)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "location", "message"),
    [
        (None, "none.py", "no such config file"),
        ("def get_config(:\n", "c.py", "line 1 is no Python"),
        ("x = 1\n", "c.py", "has no function get_config()"),
        ("def get_config():\n    return 1\n", "c.py:big", "takes no argument, but 'big' was given"),
    ],
)
def test_config_files_that_cannot_be_loaded(tmp_path, text, location, message):
    if text is not None:
        (tmp_path / "c.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / location))
    assert message in str(caught.value)


def test_the_argument_of_a_config_file(tmp_path):
    (tmp_path / "c.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(size='small'):\n"
        "    return ConfigDict({'size': size})\n"
    )
    assert load_config(str(tmp_path / "c.py")).size == "small"
    assert load_config(f"{tmp_path / 'c.py'}:large").size == "large"


def test_the_miniature_builds_and_takes_a_schedule():
    config = override(load_config(TINY), ["sample.audio_scale={'start': 1, 'end': 5, 'shape': 'cosine'}"])
    assert build(ModelConfig, config.model, "model").transformer.num_layers == 5
    assert build(SampleConfig, config.sample, "sample").audio_scale == ScaleSchedule(1.0, 5.0, "cosine")
