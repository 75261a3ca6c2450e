"""Several people who speak, as users start it."""

import numpy as np
import pytest
from drawn_faces import clip, open_squares
from PIL import Image
from test_sample import DEBUG

from configs.fantasy_talking_14b import small_model
from fantasy_jax import media
from fantasy_jax.pipelines import speakers
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.video import VideoConfig
from sample import main

COMMON = [f"--config={DEBUG}", "--image=two.png", "--audio=a.wav", "--audio=b.wav", "--output=out/talk.mp4"]
PIECE = ["--size=30x50", "--start=0.05", "--seconds=0.2"]
BOXES = ["--box=0.1,0.2,0.3,0.7", "--box=0.6,0.2,0.9,0.7"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a picture of two people, one of nobody, and two sounds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speakers, "MediaPipeFaces", open_squares)
    Image.fromarray(clip((20, 40), (40, 220), frames=1)[0]).save("two.png")
    Image.fromarray(clip(frames=1)[0]).save("nobody.png")
    for name, seconds in {"a": 0.3, "b": 0.39}.items():
        wave = np.sin(np.arange(int(16_000 * seconds)) / 10)
        media.write_audio(f"{name}.wav", np.round(8000 * wave).astype(np.int16), 16_000)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "width"),
    [
        ([], 64),
        (["--image=nobody.png", *BOXES, "--person=2", "--person=1", *PIECE], 48),
    ],
)
def test_two_sounds_on_a_picture_of_two_people(options, width):
    assert not main([*COMMON, *options])
    assert media.read_video("out/talk.mp4")[0].shape == (9, 32, width, 3)
    assert media.probe_video("out/talk.mp4").has_audio
    assert np.abs(media.read_audio("out/talk.mp4")).max() > 0.1


@pytest.mark.slow
def test_the_sound_is_written_and_not_its_voice():
    single = [argument for argument in COMMON if argument != "--audio=b.wav"]
    assert not main([*single, "--voice=b.wav"])
    written = media.read_audio("out/talk.mp4")
    assert np.abs(written[:4000]).max() > 0.1
    assert np.abs(written[5600:]).max() < 0.01  # a.wav lasts 4800 samples, b.wav 6240


def test_the_longest_clip_of_two_people_has_two_sounds():
    video, tokens = VideoConfig(num_frames=81), 175
    one, two = (ClipInputs.spec(small_model(), video, 1, people=people) for people in (1, 2))
    width = small_model().speech_encoder.hidden_size
    assert (one.adapters["audio"].shape, one.labels) == ((1, tokens, width), None)
    assert two.adapters["audio"].shape == (1, 2, tokens, width)
    assert two.labels.shape == (1, 21, video.tokens_per_frame)
