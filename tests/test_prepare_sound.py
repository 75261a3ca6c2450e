"""Preparation of videos whose sound has holes, offsets and damage: each clip is in step, or dropped."""

import av
import numpy as np
import prepare_fakes
import pytest
from prepare_fakes import FPS, SIZE, open_fakes
from real_people import case_file

from fantasy_jax import media
from fantasy_jax.config import build, load_config
from fantasy_jax.miniature.voices import draw_voice, speak
from fantasy_jax.prepare.analysis import PrepareTask
from fantasy_jax.prepare.config import PrepareConfig
from fantasy_jax.prepare.cutting import Segment
from fantasy_jax.prepare.scan import SourceVideo
from fantasy_jax.prepare.stages import prepare_video
from fantasy_jax.prepare.talking import TalkingClip
from fantasy_jax.video import SAMPLE_RATE, VideoConfig

FRAMES, CLIPS = 49, 5
FRAME = SAMPLE_RATE // FPS
"""Samples of a frame."""


@pytest.fixture
def task(config_file):
    config = build(PrepareConfig, load_config(str(config_file)).prepare, "prepare")
    return PrepareTask(config, VideoConfig(SIZE, SIZE, FRAMES, FPS))


def write(path, waveform, opening, *, lost=(), no_frames=()):
    """Writes a talking video without the packets of some spans of time."""
    wav, whole = path.with_suffix(".wav"), path.with_name("whole.mp4")
    media.write_audio(wav, np.round(waveform * 32767).astype(np.int16), SAMPLE_RATE)
    media.write_video(whole, prepare_fakes.draw(opening, seed=1), FPS, audio=wav)
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        streams = {
            x: target.add_stream_from_template(x) for x in (source.streams.video[0], source.streams.audio[0])
        }
        for packet in source.demux():
            spans = lost if packet.stream.type == "audio" else no_frames
            time = None if packet.pts is None else float(packet.pts * packet.time_base)
            if packet.dts is not None and not any(start <= time < end for start, end in spans):
                packet.stream = streams[packet.stream]
                target.mux(packet)
    return path


def prepared(path, task):
    with open_fakes(task.config) as detectors:
        return list(prepare_video(SourceVideo(str(path), path.name, "0" * 64), task, detectors))


def misplaced(clip, waveform):
    """Samples by which a clip's sound is late, compared with the sound that was spoken in its frames."""
    start = round(clip.seconds[0] * SAMPLE_RATE)
    true, found = waveform[start:][: clip.record["waveform"].size], clip.record["waveform"] / 32767
    spectrum = np.fft.rfft(found, 2 * found.size) * np.fft.rfft(true, 2 * found.size).conj()
    lags = np.fft.irfft(spectrum)
    return int((lags.argmax() + found.size) % (2 * found.size) - found.size)


KINDS = {
    "two holes": lambda x: {"waveform": x, "lost": [(2.2, 2.7), (6.0, 6.3)]},
    "a lost packet": lambda x: {"waveform": x, "lost": [(4.3, 4.32)]},
    "closed hole": lambda x: {"waveform": np.delete(x, slice(4 * SAMPLE_RATE, 4 * SAMPLE_RATE + 8192))},
    "early closed hole": lambda x: {"waveform": np.delete(x, slice(8000, 8000 + 8192))},
    "six frames late": lambda x: {"waveform": np.pad(x, (6 * FRAME, 0))},
    "between frames late": lambda x: {"waveform": np.pad(x, (6 * FRAME + FRAME // 2, 0))},
    "drift": lambda x: {"waveform": media.resample(x, 16_000, 16_160)},
    "no frames": lambda x: {"waveform": x, "no_frames": [(7.3, 8.0)]},
}


@pytest.fixture(scope="module")
def speech():
    rng = np.random.default_rng(16)
    return speak(rng, draw_voice(rng), num_frames=CLIPS * FRAMES, fps=FPS)


@pytest.mark.parametrize(
    ("kind", "expected", "offset"),
    [
        pytest.param("two holes", {1: "missing_sound", 3: "missing_sound"}, 0, marks=pytest.mark.slow),
        ("a lost packet", {}, 0),
        ("closed hole", {2: "sync", 3: "sync", 4: "sync"}, 0),
        pytest.param("early closed hole", {0: "missing_sound"}, 12.8, marks=pytest.mark.slow),
        pytest.param("six frames late", {4: "missing_sound"}, -6, marks=pytest.mark.slow),
        ("between frames late", {4: "missing_sound"}, -6.5),
        ("drift", {3: "sync", 4: "sync"}, 0),
        ("no frames", {3: "gap", 4: "gap"}, 0),
    ],
)
def test_every_clip_that_is_kept_is_in_step(tmp_path, task, speech, kind, expected, offset):
    path = write(tmp_path / "v.mkv", opening=speech.opening, **KINDS[kind](speech.waveform))
    clips = prepared(path, task)
    assert len(clips) == CLIPS
    assert {clip.number: clip.dropped for clip in clips if clip.dropped} == expected
    for clip in clips:
        assert clip.measures.get("offset", 0) == pytest.approx(offset, abs=0.3)
        if not clip.dropped:
            most = 0.3 if offset else 1.5 if kind == "drift" else 1
            assert abs(misplaced(clip, speech.waveform)) <= most * FRAME
            assert ("undone" in clip.message) == bool(offset)


def test_missing_sound_is_measured_in_the_clip_that_lacks_it(task):
    """The recorded file has no sound from 1.0 to 1.5 s."""
    track = media.read_audio_track(case_file("gap.mkv"))
    with open_fakes(task.config) as detectors:
        for first, missing in ((0, 0.51), (36, 0.07), (38, 0.0)):
            segment = Segment(first, np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8), FRAMES, 0.0)
            clip = TalkingClip(segment, track, task, detectors)
            end = max(first / FPS + task.video.seconds - track.waveform.size / SAMPLE_RATE, 0)
            assert clip.missing_seconds == pytest.approx(missing + end, abs=0.02)
            assert clip.waveform.size == task.video.num_samples
