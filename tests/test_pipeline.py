"""The Python API: `FantasyTalkingPipeline`."""

import gc
import inspect
import weakref
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_networks
from PIL import Image

from configs.fantasy_talking_14b import small_model
from fantasy_jax import FantasyTalkingPipeline
from fantasy_jax.errors import ConfigError, MediaError, WeightsError
from fantasy_jax.media import read_video
from fantasy_jax.pipelines import base
from fantasy_jax.pipelines.base import as_image, as_waveform
from fantasy_jax.pipelines.config import SampleConfig, read_pipeline, write_pipeline
from fantasy_jax.pipelines.output import VideoOutput
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.sharding import MeshConfig
from fantasy_jax.system.networks import RandomLoader, random_networks
from fantasy_jax.video import VideoConfig

VIDEO = VideoConfig(height=32, width=32, num_frames=5)
STEPS = SampleConfig(num_inference_steps=2, max_seconds=0.2)  # one window


def portrait():
    return np.random.default_rng(0).integers(0, 255, (40, 32, 3), np.uint8)


def speech(seconds=1.0, rate=16_000):
    return (0.1 * np.sin(np.arange(int(seconds * rate)) / 10)).astype(np.float32)


@pytest.fixture(scope="module")
def pipeline():
    return FantasyTalkingPipeline(small_networks(small_model()), VIDEO, STEPS, keep="all")


@pytest.mark.slow
def test_the_bundled_miniature_makes_a_clip(tmp_path):
    pipeline = FantasyTalkingPipeline.from_pretrained()
    steps = []
    out = pipeline(
        Image.fromarray(portrait()), speech(0.6), num_inference_steps=3, callback_on_step_end=steps.append
    )
    assert out.frames.shape[1:] == (64, 64, 3)
    assert out.frames.dtype == np.uint8
    assert out.latents.shape == (1, 5, 8, 8, 32)
    assert out.fps == 25
    assert [(x.stage, x.step, x.num_steps) for x in steps] == [("Transformer", i, 3) for i in (1, 2, 3)]
    assert steps[0].seconds_left is None
    assert steps[2].seconds_left == 0
    assert np.array_equal(steps[2].latents, out.latents)
    out.save(tmp_path / "talk.mp4")
    assert read_video(tmp_path / "talk.mp4")[0].shape == out.frames.shape


def test_the_time_left_is_that_of_the_steps_that_are_sampled(monkeypatch):
    times, seen = iter([0.0, 2.0, 5.0]), []
    monkeypatch.setattr(base, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    report = base._progress(seen.append, 10, preview=lambda predicted: VideoOutput(list, predicted, 1, 25))
    latents = jnp.zeros((1, 1, 1, 1, 1))
    for step in (6, 7, 8):  # as with a strength below 1
        report(step, latents, latents)
    assert [x.seconds_left for x in seen] == [None, 2 * 2.0, 2.5]


@pytest.mark.slow
def test_calls_are_repeatable_and_settings_matter(pipeline):
    first = pipeline(portrait(), speech(), seed=1)
    again = pipeline(portrait(), speech(), seed=1)
    assert np.array_equal(first.latents, again.latents)
    assert not np.array_equal(first.latents, pipeline(portrait(), speech(), seed=2).latents)
    longer = pipeline(portrait(), speech(), seed=1, num_inference_steps=3)
    assert not np.array_equal(first.latents, longer.latents)
    stereo = np.stack([speech(rate=32_000)] * 2, axis=1)
    assert pipeline(portrait(), stereo, sampling_rate=32_000).frames.shape == first.frames.shape


class Recorder:
    """Counts what is loaded, and which networks are in memory when the transformer is."""

    def __init__(self):
        self.load, self.loaded, self.alive = RandomLoader(), [], {}

    def __call__(self, component, config, dtype, mesh):
        if component.slot == "transformer":
            gc.collect()
            self.alive_with_transformer = {name for name, network in self.alive.items() if network()}
        self.loaded.append(component.slot)
        network = self.load(component, config, dtype, mesh)
        self.alive[component.slot] = weakref.ref(network)
        return network


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "twice"), [("all", 0), ("transformer", 4), ("none", 6)])
def test_networks_stay_in_memory_as_asked(keep, twice):
    networks = random_networks(small_model(), byte_tokenizer())
    networks._loader = recorder = Recorder()
    pipeline = FantasyTalkingPipeline(networks, VIDEO, STEPS, keep=keep)
    pipeline(portrait(), speech())
    assert sorted(recorder.loaded) == sorted(small_model().networks)
    pipeline(portrait(), speech())
    assert len(recorder.loaded) == len(small_model().networks) + twice
    if keep == "none":
        assert recorder.alive_with_transformer == set()


@pytest.mark.parametrize(
    "image", [None, 3, np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), "none.png", __file__]
)
def test_an_image_that_is_none_is_refused(pipeline, image):
    with pytest.raises(MediaError):
        inspect.unwrap(as_image)(image)  # as users call it: without the run-time check of types
    if not isinstance(image, int | None):
        with pytest.raises(MediaError):
            pipeline(image, speech())


@pytest.mark.parametrize(
    "audio",
    [
        None,
        np.zeros(100, np.int16),
        np.zeros(0, np.float32),
        np.full(100, np.nan, np.float32),
        np.zeros((2, 2, 2), np.float32),
        "none.wav",
        __file__,
    ],
)
def test_audio_that_is_none_is_refused(pipeline, audio):
    with pytest.raises(MediaError):
        inspect.unwrap(as_waveform)(audio)
    if audio is not None:
        with pytest.raises(MediaError):
            pipeline(portrait(), audio)


def test_settings_out_of_range_are_refused(pipeline):
    with pytest.raises(ConfigError, match="num_inference_steps"):
        pipeline(portrait(), speech(), num_inference_steps=0)
    networks = pipeline.networks
    with pytest.raises(ConfigError, match="face_motion"):
        FantasyTalkingPipeline(networks, VIDEO, SampleConfig(face_motion=1.0))
    on_two = SampleConfig(weights_memory="host", mesh=MeshConfig(fsdp=2))
    with pytest.raises(ConfigError, match="weights_memory"):
        FantasyTalkingPipeline(networks, VIDEO, on_two)
    without_audio = small_model().replace(audio_adapter=None)
    with pytest.raises(ConfigError, match="audio_adapter"):
        FantasyTalkingPipeline(random_networks(without_audio, byte_tokenizer()), VIDEO, STEPS)


def test_a_store_of_another_pipeline_is_refused(tmp_path):
    write_pipeline(tmp_path, "OtherPipeline", VIDEO, STEPS)
    with pytest.raises(WeightsError, match="OtherPipeline"):
        FantasyTalkingPipeline.from_pretrained(tmp_path)
    (tmp_path / "pipeline.json").write_text("{")
    with pytest.raises(WeightsError, match="damaged"):
        FantasyTalkingPipeline.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="none"):
        FantasyTalkingPipeline.from_pretrained(tmp_path / "none")


def test_the_settings_of_a_store_are_read_back(tmp_path):
    write_pipeline(tmp_path, "FantasyTalkingPipeline", VIDEO, STEPS)
    pipeline = ("FantasyTalkingPipeline", SampleConfig)
    assert read_pipeline(tmp_path, *pipeline) == (VIDEO, STEPS)
    assert read_pipeline(tmp_path / "none", *pipeline) == (VideoConfig(), SampleConfig())
