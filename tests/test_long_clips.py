"""Clips of several windows, and streams, from the pipelines; and the measurement of long clips."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_networks
from test_pipeline import portrait, small_model, speech

from fantasy_jax import FantasyTalkingPipeline, media
from fantasy_jax.diffusion.magcache import Calibration
from fantasy_jax.diffusion.windows import WindowSchedule
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.miniature import long_clips
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.pipelines.stream import Blocks
from fantasy_jax.system.encoders import AUDIO_CONTEXT, AUDIO_PIECE, encode_audio
from fantasy_jax.video import FEATURE_HOP, VideoConfig

WINDOW = VideoConfig(height=32, width=32, num_frames=17, fps=23)
SETTINGS = SampleConfig(num_inference_steps=2, overlap=2, windows_per_device=4)


@pytest.fixture(scope="module")
def pipeline():
    return FantasyTalkingPipeline(small_networks(small_model()), WINDOW, SETTINGS, keep="all")


@pytest.mark.slow
def test_the_clip_lasts_as_long_as_the_sound(pipeline, tmp_path):
    out = pipeline(portrait(), speech(1.5))
    assert out.latents.shape[1] == 10  # 37 frames
    assert out.num_frames == len(out.frames) == 35
    assert abs(out.seconds - 1.5) <= 1 / 23
    out.save(tmp_path / "long.mp4")
    assert len(media.read_video(tmp_path / "long.mp4")[0]) == 35
    assert media.audio_seconds(tmp_path / "long.mp4") == pytest.approx(out.seconds, abs=0.05)


@pytest.mark.slow
def test_max_seconds_shorten_the_clip(pipeline, tmp_path):
    settings = {**vars(SETTINGS), "max_seconds": 0.5}
    short = FantasyTalkingPipeline(pipeline.networks, WINDOW, SampleConfig(**settings), keep="all")
    media.write_audio(tmp_path / "a.wav", (30_000 * speech(5.0)).astype(np.int16), 16_000)
    assert short(portrait(), tmp_path / "a.wav").num_frames == 13
    with pytest.raises(MediaError, match=r"lasts 0\.40 s, less than the 0\.5 s of --seconds"):
        short(portrait(), speech(0.4))


def test_an_overlap_that_does_not_fit_is_found_before_any_work(pipeline):
    settings = {**vars(SETTINGS), "overlap": 4}
    wrong = FantasyTalkingPipeline(pipeline.networks, WINDOW, SampleConfig(**settings))
    with pytest.raises(ConfigError, match=r"^overlap is 4;"):
        wrong(portrait(), speech(1.5))


def test_attention_to_the_whole_audio_is_for_single_windows():
    config = SampleConfig(audio_attention="clip", overlap=2)
    assert config.windows(WINDOW.for_seconds(0.5), WINDOW) is None
    with pytest.raises(ConfigError, match=r"^audio_attention is 'clip', .* single window of 0\.74 s"):
        config.windows(WINDOW.for_seconds(1.0), WINDOW)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_config_error_for_max_seconds(seconds):
    with pytest.raises(ConfigError, match=r"^max_seconds is"):
        SampleConfig(max_seconds=seconds)


@pytest.mark.slow
def test_long_audio_is_encoded_in_pieces(pipeline):
    encoder = pipeline.networks["speech_encoder"]
    count = 2 * AUDIO_PIECE + 123
    sound = np.random.default_rng(0).standard_normal(count * FEATURE_HOP + 80).astype(np.float32)
    features = np.asarray(encode_audio(encoder, sound))
    assert features.shape[1] == count
    # A piece alone, with its context: the second one, whose features lie in its middle.
    first = AUDIO_PIECE - AUDIO_CONTEXT
    longest = AUDIO_PIECE + 2 * AUDIO_CONTEXT
    normalised = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
    piece = normalised[first * FEATURE_HOP :][: (longest - 1) * FEATURE_HOP + 400]
    alone = np.asarray(encoder(jnp.asarray(piece)[None]))[:, AUDIO_CONTEXT:-AUDIO_CONTEXT]
    np.testing.assert_allclose(features[:, AUDIO_PIECE : 2 * AUDIO_PIECE], alone, atol=1e-4)


# Streams


def test_blocks_follow_each_other():
    blocks = Blocks(VideoConfig(), SampleConfig())
    assert (blocks.schedule.num_frames, blocks.held, blocks.new) == (21, 6, 15)
    assert blocks.latency == pytest.approx(60 / 23)
    several = Blocks(VideoConfig(), SampleConfig(), windows=3)
    assert (several.schedule.num_frames, several.schedule.count, several.new) == (51, 3, 45)
    assert several.latency == pytest.approx(3 * 60 / 23)
    first, later = blocks.samples(0), blocks.samples(1)
    assert first == (0, int(81 / 23 * 16_000))
    assert later[0] == pytest.approx(60 / 23 * 16_000, abs=FEATURE_HOP)


@pytest.mark.slow
def test_a_stream_begins_like_a_clip_and_ends_with_the_sound(pipeline, monkeypatch):
    sound = speech(2.0)
    chunks = np.split(sound, [100, 5000, 20_000])
    stream = pipeline.stream(portrait(), chunks, seed=3)
    blocks = list(stream)
    assert [len(block) for block in blocks] == [9, 8, 8, 8, 13]
    assert stream.latency == pytest.approx(8 / 23)
    # Pieces of another size give as many frames, and so does a stream whose residuals are measured.
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "calibration", Calibration())
        again = np.concatenate(list(pipeline.stream(portrait(), [sound], seed=3)))
        measured = pipeline.calibration.curve(pipeline.config.shift, pipeline.config.guidance)
    assert again.shape == (46, 32, 32, 3)
    assert 0.5 < min(map(min, measured.ratios)) < max(map(max, measured.ratios)) < 2
    first = sound[: int(17 / 23 * 16_000)]
    single = pipeline(portrait(), first, seed=3).frames.astype(int)
    streamed = np.concatenate(list(pipeline.stream(portrait(), [first], seed=3)))
    assert len(streamed) == 17
    # The first block, up to what the next one cross-fades into; mean and variance are summed in float64.
    assert np.abs(streamed - single)[:9].max() <= 1


@pytest.mark.slow
def test_a_stream_reads_no_further_than_it_must(pipeline):
    read = []

    def microphone():
        for i in range(100):
            read.append(i)
            yield speech(0.1)

    frames = iter(pipeline.stream(portrait(), microphone()))
    assert len(next(frames)) == 9
    assert len(read) == 8  # 0.8 of 0.74 seconds


def test_a_stream_without_sound_is_an_error(pipeline):
    with pytest.raises(MediaError, match="ended without a sample"):
        list(pipeline.stream(portrait(), []))


# The measurement


def test_seams_are_the_changes_where_windows_meet():
    video = np.zeros((33, 2, 2, 3), np.uint8)
    levels = np.repeat(np.arange(9) * 4, [1, *[4] * 8])
    video += levels[:, None, None, None].astype(np.uint8)
    assert long_clips.seam(video, np.array([4, 6])) == 1
    video[13:] += 4  # latent frame 4 begins with frame 13
    assert long_clips.seam(video, np.array([4])) == 2


def test_windows_meet_where_weights_cross():
    assert long_clips.hand_overs(WindowSchedule(17, 5, 2)).tolist() == [4, 6, 8, 10, 12, 14]
    flat = long_clips.FlatSchedule(9, 5, 1, anchor="track").at()
    assert flat.weights[0].tolist() == [1, 1, 1, 1, 0.5]


@pytest.mark.slow
def test_long_clips_of_the_miniature(capsys, tmp_path):
    options = ["--clips=8", "--frames=65", "--only=picture", "--only=last frame as picture"]
    long_clips.main(["--config=configs/tiny.py", *options, f"--json={tmp_path / 'long.json'}"])
    figures = json.loads((tmp_path / "long.json").read_text())["65"]
    ours, sequential = figures["picture"], figures["last frame as picture"]
    assert ours["sync"]["mean"] > 0.8
    assert ours["seam"]["mean"] < 1.1
    assert ours["identity_end"]["mean"] > ours["identity_begin"]["mean"] - 0.02
    assert ours["colour_shift"]["mean"] < 2
    assert sequential["identity_end"]["mean"] < sequential["identity_begin"]["mean"] - 0.02
    assert "picture" in capsys.readouterr().out
