"""The geometry of clips."""

from dataclasses import replace

import numpy as np
import pytest

from fantasy_jax.config import build
from fantasy_jax.errors import ConfigError
from fantasy_jax.video import SAMPLE_RATE, VideoConfig, latent_frames, video_frames, wav2vec2_length

VIDEO = VideoConfig(height=320, width=512, num_frames=81, fps=23)


@pytest.mark.parametrize("num_latent_frames", [1, 2, 5, 21, 51])
def test_latent_and_video_frames_are_inverses(num_latent_frames):
    num_frames = video_frames(num_latent_frames)
    assert num_frames == 4 * num_latent_frames - 3
    assert latent_frames(num_frames) == num_latent_frames


def test_sizes_of_a_clip():
    assert VIDEO.longest_edge == 512
    assert VIDEO.size == (320, 512)
    assert VIDEO.latent_frames == 21
    assert VIDEO.latent_size == (40, 64)
    assert VIDEO.latent_shape(2, 16) == (2, 21, 40, 64, 16)
    assert VIDEO.seconds == 81 / 23
    assert VIDEO.num_samples == int(81 / 23 * SAMPLE_RATE) == 56347
    assert VIDEO.audio_tokens == wav2vec2_length(56347) == 175
    assert VIDEO.for_size(64, 48) == replace(VIDEO, height=64, width=48)


@pytest.mark.parametrize("num_samples", [0, 399, 400, 719, 720, 16_000, 56_347])
def test_audio_features_are_as_many_as_convolutions_give(num_samples):
    length = num_samples
    for kernel, stride in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True):
        length = max((length - kernel) // stride + 1, 0)
    assert wav2vec2_length(num_samples) == length


def test_the_length_for_audio_is_the_official_one_or_covers_it():
    random = np.random.default_rng(0)
    for fps, longest in ((23, 81), (25, 17), (30, 201)):
        video = replace(VIDEO, fps=fps, num_frames=longest)
        durations = [0.0, 0.01, 1.0, 4 / fps, 8 / fps, longest / fps, *random.uniform(0, 10, 200)]
        for seconds in durations:
            found = video.for_seconds(float(seconds))
            assert found == replace(video, num_frames=found.num_frames)
            if fps * seconds <= longest:
                assert found.num_frames == min(int(fps * seconds // 4) * 4 + 5, longest)
            else:
                assert found.num_frames - 4 < fps * seconds <= found.num_frames


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("height", 60),
        ("height", 0),
        ("width", -16),
        ("num_frames", 1),
        ("num_frames", 80),
        ("num_frames", -3),
        ("fps", 0),
    ],
)
def test_config_error_names_the_setting(setting, value):
    with pytest.raises(ConfigError, match=rf"^video\.{setting}"):
        build(VideoConfig, {setting: value}, "video")
