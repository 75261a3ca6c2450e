"""A generated clip: its frames are decoded when they are needed, and pass into the mp4 one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.fantasy_talking_14b import small_model
from fantasy_jax import media
from fantasy_jax.errors import MediaError
from fantasy_jax.models.tiling import split_tiles
from fantasy_jax.pipelines import base
from fantasy_jax.pipelines.base import Pipeline
from fantasy_jax.pipelines.config import PipelineConfig
from fantasy_jax.pipelines.output import VideoOutput
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.sharding import MeshConfig
from fantasy_jax.system.networks import random_networks
from fantasy_jax.system.streaming import DecodingPlan
from fantasy_jax.video import VideoConfig

LATENTS = jnp.zeros((1, 6, 4, 8, 16))
FRAMES = np.random.default_rng(0).integers(0, 255, (21, 32, 64, 3), np.uint8)


class Counter:
    """Yields the frames, and counts how often and how far they are decoded."""

    def __init__(self):
        self.begun, self.decoded = 0, 0

    def __call__(self):
        self.begun += 1
        for frame in FRAMES:
            self.decoded += 1
            yield frame


def test_size_and_length_are_known_before_frames_are_decoded():
    decode = Counter()
    output = VideoOutput(decode, LATENTS, 21, 25)
    assert (output.num_frames, output.height, output.width, output.seconds) == (21, 32, 64, 0.84)
    stream = output.stream_frames()
    assert np.array_equal(next(stream), FRAMES[0])
    assert (decode.begun, decode.decoded) == (1, 1)


def test_frames_after_the_end_are_left_out(tmp_path):
    output = VideoOutput(Counter(), LATENTS, 19, 25)
    assert np.array_equal(list(output.stream_frames()), FRAMES[:19])
    assert np.array_equal(output.frames, FRAMES[:19])
    output.save(tmp_path / "v.mp4")
    assert len(media.read_video(tmp_path / "v.mp4")[0]) == 19


def test_a_clip_and_its_sheet_are_written_while_it_is_decoded_once(tmp_path):
    decode = Counter()
    output = VideoOutput(decode, LATENTS, 21, 25, np.zeros(16_000, np.float32))
    output.save(tmp_path / "v.mp4", sheet=tmp_path / "v.png")
    assert decode.begun == 1
    assert media.read_video(tmp_path / "v.mp4")[0].shape == FRAMES.shape
    assert media.probe_video(tmp_path / "v.mp4").has_audio
    assert media.read_image(tmp_path / "v.png").size == (6 * 194, 2 * 116)
    assert np.array_equal(output.frames, FRAMES)
    assert output.frames is output.frames
    assert np.array_equal(list(output.stream_frames()), FRAMES)
    output.save(tmp_path / "again.mp4")
    assert decode.begun == 2  # for `frames`, which are kept
    assert media.read_video(tmp_path / "again.mp4")[0].shape == FRAMES.shape


def test_a_mesh_decodes_and_is_not_set_for_the_caller(monkeypatch, capsys):
    class Decoder:
        def __init__(self, vae, **settings):
            assert settings == {"tiling": "auto", "tile": (30, 52), "stride": (15, 26)}

        def plan(self, latents):
            return DecodingPlan(split_tiles(latents.shape[2:4], (2, 8), (2, 8), 8), 1)

        def chunks(self, latents):
            return [slice(0, 1), slice(1, 3), slice(3, 6)]

        def __call__(self, latents):
            assert jax.sharding.get_abstract_mesh().shape["context"] == 2
            assert latents.sharding.is_fully_replicated
            for index in range(latents.shape[1]):
                yield np.full((4, 32, 64, 3), float(latents[0, index, 0, 0, 0]), np.uint8)

    monkeypatch.setattr(base, "StreamingDecoder", Decoder)
    networks = random_networks(small_model(), byte_tokenizer())
    networks = networks.replace(**{slot: nnx.Module() for slot in networks})
    config = PipelineConfig(mesh=MeshConfig(fsdp=1, context=2))
    pipeline = Pipeline(networks, VideoConfig(height=32, width=64), config)
    latents = LATENTS + jnp.arange(6.0).reshape(6, 1, 1, 1)
    output = VideoOutput(partial(pipeline._decode, latents, config, progress=True), latents, 24, 25)
    shades = []
    for frame in output.stream_frames():
        assert jax.sharding.get_abstract_mesh().empty
        shades.append(frame.mean())
    assert shades == [shade for shade in range(6) for _ in range(4)]
    assert "Decoding in 2 tiles: 100%" in capsys.readouterr().err


def test_a_clip_whose_sound_cannot_be_read_is_not_decoded(tmp_path):
    decode = Counter()
    with pytest.raises(MediaError, match=r"none\.wav"):
        VideoOutput(decode, LATENTS, 21, 25, "none.wav").save(tmp_path / "v.mp4", sheet=tmp_path / "v.png")
    assert decode.decoded <= 1
    assert not list(tmp_path.iterdir())
