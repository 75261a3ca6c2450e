"""The sounds of a clip, and `FantasyTalkingPipeline` with several people."""

from dataclasses import replace

import av
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_faces import clip, open_squares
from flax import nnx
from helpers import abstract

from configs.fantasy_talking_14b import small_model
from fantasy_jax import FantasyTalkingPipeline, media
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.models.wav2vec2 import Wav2Vec2Model
from fantasy_jax.pipelines import base, sounds, speakers
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.system import encoders
from fantasy_jax.system.networks import random_networks
from fantasy_jax.video import VideoConfig

VIDEO = VideoConfig(height=64, width=64, num_frames=9)
STEPS = SampleConfig(num_inference_steps=2)


def tone(seconds, level=0.5, rate=16_000):
    return (level * np.sin(np.arange(round(seconds * rate)) / rate * 2 * np.pi * 220)).astype(np.float32)


def write(path, waveform, rate=16_000):
    media.write_audio(path, np.round(waveform * 32767).astype(np.int16), rate)
    return path


def picture(*lefts):
    """Faces of 30 pixels in 320 x 120 pixels, of which 64 x 32 are generated."""
    return clip(*[(20 * number, left) for number, left in enumerate(lefts, 1)], frames=1)[0]


def test_one_sound_is_played_as_it_is(tmp_path):
    path = write(tmp_path / "a.wav", tone(1))
    for given in (path, [path], (str(path),)):
        found = sounds.read_sounds(given)
        assert str(found.played) == str(path)
        assert (len(found.waveforms), found.num_samples, found.seconds) == (1, 16_000, 1)
    found = sounds.read_sounds(tone(1, rate=8000), sampling_rate=8000)
    assert found.num_samples == 16_000
    assert np.array_equal(found.played, found.waveforms[0])


def test_several_sounds_are_played_together(tmp_path):
    one, other = (
        write(tmp_path / "a.wav", tone(1, 0.25)),
        write(tmp_path / "b.wav", tone(0.5, 0.5, 44_100), 44_100),
    )
    found = sounds.read_sounds([one, other])
    assert [waveform.size for waveform in found.waveforms] == [16_000, 8000]
    assert (found.num_samples, found.rate, found.played.shape) == (16_000, 44_100, (44_100,))
    expected = tone(1, 0.25, 44_100)
    expected[:22_050] += tone(0.5, 0.5, 44_100)
    middle = slice(500, -500)
    np.testing.assert_allclose(found.played[middle], expected[middle], atol=2e-3)


def test_a_mix_does_not_exceed_full_scale():
    loud = sounds.mix([tone(1, 0.9), tone(1, 0.9)])
    assert np.abs(loud).max() == 1
    quiet = sounds.mix([tone(1, 0.2), tone(1, 0.2)])
    np.testing.assert_allclose(np.abs(quiet).max(), 0.4, atol=1e-2)
    np.testing.assert_allclose(loud, quiet / np.abs(quiet).max(), atol=1e-5)
    assert not sounds.mix([np.zeros(100, np.float32)] * 2).any()


def test_a_voice_conditions_and_the_sound_is_played(tmp_path):
    song, voice = write(tmp_path / "song.wav", tone(1)), tone(0.5, 0.1)
    found = sounds.read_sounds(song, voice)
    assert found.played == song
    assert found.num_samples == 16_000
    assert np.array_equal(found.waveforms[0], voice)


@pytest.mark.parametrize(
    ("audio", "voice", "error", "named"),
    [
        ([], None, ConfigError, "--audio"),
        ([tone(1)], [], ConfigError, "--voice"),
        ([tone(1)], [tone(1)] * 2, ConfigError, "--voice"),
        ([tone(1)] * 2, tone(1), ConfigError, "--voice"),
        ([tone(1), np.zeros(0, np.float32)], None, MediaError, "empty"),
        ([tone(1), "none.wav"], None, MediaError, "none.wav"),
        (tone(1), "none.wav", MediaError, "none.wav"),
    ],
)
def test_sounds_that_cannot_be_used_are_refused(audio, voice, error, named):
    with pytest.raises(error, match=named) as raised:
        sounds.read_sounds(audio, voice)
    assert "\n" not in str(raised.value)


def test_a_piece_of_a_sound(tmp_path):
    """From a file, an array and several of them; the video plays the same piece."""
    rising = np.linspace(0, 0.5, 32_000, dtype=np.float32)
    path = write(tmp_path / "a.wav", rising)
    for given in (str(path), rising):
        found = sounds.read_sounds(given, start=0.5, max_seconds=0.75)
        assert found.seconds == 0.75
        assert found.waveforms[0][0] == pytest.approx(rising[8000], abs=1e-4)
    assert sounds.read_sounds(str(path), start=0.5).played == media.AudioPart(str(path), 0.5)
    mixed = sounds.read_sounds([str(path), 0.5 * rising], start=1.5)
    assert (mixed.num_samples, mixed.played.size) == (8000, 22_050)
    assert mixed.played[2000] == pytest.approx(1.5 * 0.25 * (1.5 + 2000 / 44_100), abs=0.02)
    media.write_video(
        tmp_path / "v.mp4", np.zeros((10, 16, 16, 3), np.uint8), 25, audio=media.AudioPart(path, 1.0)
    )
    assert np.abs(media.read_audio(tmp_path / "v.mp4")[1000:6000].mean()) == pytest.approx(0.28, abs=0.03)
    with pytest.raises(MediaError, match=r"a\.wav: lasts 0\.50 s from 1\.5 s on, less than"):
        sounds.read_sounds(str(path), start=1.5, max_seconds=1.0)
    for given, named in ((str(path), r"a\.wav: lasts 2"), (rising, "audio: ends before 2 s")):
        with pytest.raises(MediaError, match=named):
            sounds.read_sounds(given, start=2.0)
    for setting in ({"start": -1.0}, {"start": float("nan")}, {"start": float("inf")}):
        with pytest.raises(ConfigError, match="start"):
            SampleConfig(**setting)


@pytest.fixture(scope="module")
def pipeline():
    """A pipeline without weights, for use with `sampled`."""
    networks = random_networks(small_model(), byte_tokenizer())
    empty = {slot: nnx.Module() for slot in networks}
    empty["speech_encoder"] = abstract(Wav2Vec2Model, networks.config.speech_encoder)
    return FantasyTalkingPipeline(networks.replace(**empty), VIDEO, STEPS)


@pytest.fixture
def sampled(monkeypatch):
    """Collects the sampler's inputs; it and all networks are replaced by what costs nothing.

    Speech features are the level of each 20 ms of the waveform that the encoder gets.
    """
    calls = []

    def sample(transformer, noise, inputs, config, **options):
        calls.append(inputs)
        return noise

    def encode_first_frame(networks, pixels, num_frames):
        size = pixels.shape[1:3]
        return jnp.zeros(replace(VIDEO, num_frames=num_frames).for_size(*size).latent_shape(1, 16))

    def level(encoder, waveform):
        pieces = waveform[:, : waveform.shape[1] // 320 * 320].reshape(1, -1, 320)
        return jnp.sqrt((pieces**2).mean(axis=-1, keepdims=True))

    monkeypatch.setattr(speakers, "MediaPipeFaces", open_squares)
    monkeypatch.setattr(base, "sample", sample)
    frames = np.zeros((9, 32, 64, 3), np.uint8)
    monkeypatch.setattr(base.Pipeline, "_decode", lambda *_, **__: iter(frames))
    monkeypatch.setattr(encoders, "encode_text", lambda _, prompts: [jnp.zeros((1, 3, 32))] * len(prompts))
    monkeypatch.setattr(encoders, "encode_image", lambda *_: jnp.zeros((1, 257, 32)))
    monkeypatch.setattr(encoders, "encode_first_frame", encode_first_frame)
    monkeypatch.setattr(encoders, "run", level)
    return calls


def test_one_sound_belongs_to_the_whole_picture(pipeline, sampled):
    out = pipeline(picture(40, 220), tone(0.39))
    ((inputs,),) = (sampled,)
    assert (inputs.labels, inputs.owners) == (None, {})
    assert inputs.adapters["audio"].shape == (1, int(9 / 23 * 50), 1)
    assert (out.audio_seconds, out.audio_rate) == (0.39, 16_000)


def test_a_clip_of_an_exact_size(pipeline, sampled, caplog):
    """The picture of 320 x 120 pixels is cropped, and boxes are fractions of what is left."""
    out = pipeline(
        picture(), tone(0.39), size=(48, 64), boxes=[[0.1, 0.1, 0.4, 0.9], (0.6, 0.1, 0.9, 0.9)], people=[1]
    )
    assert (out.height, out.width) == (48, 64)
    assert "the 160 x 120 in the middle are shown" in caplog.text
    caplog.clear()
    out = pipeline(picture(), tone(0.39), size=(41, 90))
    assert (out.height, out.width) == (48, 96)
    assert "41 x 90 is rounded to multiples of 16: 48 x 96" in caplog.text


@pytest.mark.parametrize("shape", [(8, 999), (400, 90)])
def test_extreme_shapes_are_refused(pipeline, shape):
    with pytest.raises(MediaError, match="4 times as long as the other; crop it, or give a size"):
        pipeline(np.zeros((*shape, 3), np.uint8), tone(0.39))


def test_extreme_sizes_are_refused(pipeline):
    with pytest.raises(ConfigError, match="size is 16 x 512; one side may be at most 4 times"):
        pipeline(np.zeros((100, 100, 3), np.uint8), tone(0.39), size=(16, 512))


def test_sounds_of_two_people(pipeline, sampled):
    pipeline(picture(40, 220), [tone(0.39), tone(0.2)])
    pipeline(picture(40, 220), [tone(0.39), tone(0.2)], people=[2, 1])
    out = pipeline(picture(), [tone(0.2), tone(0.1)], boxes=[[0.5, 0.1, 0.9, 0.9], (0.1, 0.1, 0.4, 0.9)])
    both, swapped, boxed = sampled
    assert [x.owners["audio"].tolist() for x in sampled] == [[[1, 2]], [[2, 1]], [[1, 2]]]
    assert both.labels.shape == (1, 3, 8)
    assert np.array_equal(both.labels, swapped.labels)
    assert np.asarray(boxed.labels)[0, 0].reshape(2, 4).tolist() == [[2, 2, 1, 1]] * 2
    features = np.asarray(both.adapters["audio"])
    assert features.shape == (1, 2, int(9 / 23 * 50), 1)
    # The shorter sound is as loud as the longer one, and then silent.
    np.testing.assert_allclose(features[0, :, :9], 1, atol=0.05)
    assert not features[0, 1, 10:].any()
    assert np.all(features[0, 0] > 0.9)
    assert (out.audio_seconds, out.audio_rate, out.audio.size) == (0.2, 44_100, 8820)


def test_one_of_two_people_speaks(pipeline, sampled, caplog):
    pipeline(picture(40, 220), tone(0.39), people=[2])
    (inputs,) = sampled
    assert inputs.adapters["audio"].shape[:2] == (1, 1)
    assert inputs.owners["audio"].tolist() == [[2]]
    attended = np.asarray(inputs.attended_people("audio"))[0, :, 0, 0]
    assert np.array_equal(attended, np.asarray(inputs.labels)[0, 0] != 1)
    assert "person 1" in caplog.text


def test_a_voice_is_encoded_and_the_sound_is_written(pipeline, sampled, tmp_path):
    song = write(tmp_path / "song.wav", tone(0.39))
    out = pipeline(picture(), song, voice=tone(0.2))
    (inputs,) = sampled
    assert out.audio == song
    assert not inputs.adapters["audio"][0, 10:].any()


def test_the_mix_is_written(pipeline, sampled, tmp_path):
    pipeline(picture(40, 220), [tone(0.39), tone(0.39)]).save(tmp_path / "talk.mp4")
    with av.open(str(tmp_path / "talk.mp4")) as container:
        assert container.streams.audio[0].rate == 44_100
    mixed = media.read_audio(tmp_path / "talk.mp4")
    assert np.abs(mixed).max() > 0.6  # each alone has 0.5


@pytest.mark.parametrize(
    ("lefts", "count", "options", "error"),
    [
        ((40,), 2, {}, MediaError),
        ((40, 220), 2, {"people": [1]}, ConfigError),
        ((40, 220), 1, {"people": [3]}, ConfigError),
        ((40, 220), 1, {"boxes": [[0.0, 0.0, 1.0, 1.0]]}, ConfigError),
        ((40, 220), 1, {"voice": [tone(0.39)] * 2}, ConfigError),
    ],
)
def test_bad_input_is_found_before_anything_is_encoded(pipeline, sampled, lefts, count, options, error):
    with pytest.raises(error):
        pipeline(picture(*lefts), [tone(0.39)] * count, **options)
    assert not sampled
