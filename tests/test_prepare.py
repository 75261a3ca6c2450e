"""Preparation of records from raw videos: what is found, measured and dropped, and resuming of runs."""

import json
import os
import random
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import prepare_fakes
import pytest
from prepare_fakes import FPS, FRAMES, SIZE, assert_equal_records, open_fakes, write_talk

from fantasy_jax import media
from fantasy_jax.config import build, load_config
from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature.voices import draw_voice, speak
from fantasy_jax.prepare import measures
from fantasy_jax.prepare.analysis import Dropped, PrepareTask
from fantasy_jax.prepare.config import PrepareConfig
from fantasy_jax.prepare.cutting import covering, cut
from fantasy_jax.prepare.encode import held_out
from fantasy_jax.prepare.filters import TALKING
from fantasy_jax.prepare.report import render_report
from fantasy_jax.prepare.scan import SourceVideo, scan
from fantasy_jax.prepare.shards import RecordShards, ShardedRecords
from fantasy_jax.prepare.stages import PreparedClip, prepare_video
from fantasy_jax.prepare.store import prepare_videos
from fantasy_jax.prepare.talking import choose_face
from fantasy_jax.preprocessing.landmarks import FaceTrack
from fantasy_jax.video import SAMPLE_RATE, VideoConfig, audio_samples


@pytest.fixture
def task(config_file):
    config = load_config(str(config_file))
    return PrepareTask(
        build(PrepareConfig, config.prepare, "prepare"), build(VideoConfig, config.video, "video")
    )


def clips_of(path, task):
    with open_fakes(task.config) as detectors:
        return list(prepare_video(SourceVideo(str(path), path.name, "0" * 64), task, detectors))


def test_each_content_is_found_once(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "b.MP4").write_bytes(b"one")
    (tmp_path / "deep/er/a.webm").write_bytes(b"two")
    (tmp_path / "z.mkv").write_bytes(b"one")
    (tmp_path / "notes.txt").write_bytes(b"three")
    sources, left_out = scan(tmp_path)
    assert [source.name for source in sources] == ["b.MP4", "deep/er/a.webm"]
    assert left_out == {"z.mkv": "is the same file as b.MP4"}
    with pytest.raises(ConfigError, match="missing"):
        scan(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty"):
        scan(tmp_path / "empty")


def test_covering_keeps_the_aspect_ratio():
    assert covering(848, 480, (512, 512)) == (905, 512)
    assert covering(720, 1280, (512, 512)) == (512, 910)
    assert covering(512, 512, (512, 512)) == (512, 512)


def test_no_segment_contains_a_cut(tmp_path):
    first, second, third = (
        prepare_fakes.draw(np.zeros(n), background=shade, seed=seed)
        for n, shade, seed in ((2 * FRAMES + 3, 20, 0), (FRAMES - 2, 220, 1), (FRAMES, 90, 2))
    )
    media.write_video(tmp_path / "v.mp4", np.concatenate([first, second, third]), FPS)
    pieces = list(cut(str(tmp_path / "v.mp4"), fps=FPS, num_frames=FRAMES, size=(SIZE, SIZE), threshold=27.0))
    found = [(piece.first, piece.num_frames, piece.video is None) for piece in pieces]
    assert found == [
        (0, FRAMES, False),
        (FRAMES, FRAMES, False),
        (2 * FRAMES + 3, FRAMES - 2, True),  # too short
        (3 * FRAMES + 1, FRAMES, False),
    ]
    assert [round(piece.video[..., 0, 0, 0].mean() / 10) for piece in pieces if piece.video is not None] == [
        2,
        2,
        9,
    ]
    assert max(piece.gap for piece in pieces) < 1e-3


def test_speech_is_distinguished_from_noise_and_silence():
    rng = np.random.default_rng(0)
    speech = speak(rng, draw_voice(rng), num_frames=75, fps=25).waveform
    assert measures.speech_fraction(speech, 2) > 0.6
    assert measures.speech_fraction(np.zeros(3 * SAMPLE_RATE, np.float32), 2) == 0
    assert measures.speech_fraction(np.zeros(3, np.float32), 2) == 0
    noise = rng.normal(0, 0.02, 3 * SAMPLE_RATE).astype(np.float32)
    assert measures.speech_fraction(noise, 3) < 0.2


def test_lips_and_audio_in_and_out_of_sync():
    rng = np.random.default_rng(1)
    energy = np.convolve(rng.uniform(size=84), np.hanning(5), "same").astype(np.float32)
    for shift in (-3, 0, 4):
        correlations = measures.lag_correlations(np.roll(energy, shift), energy, 4)
        assert correlations.shape == (9,)
        found = measures.find_lag(correlations, 4)
        assert (found.in_step, found.value > 0.9, found.gain) == (shift, True, 0)
        found = measures.find_lag(correlations, 1)
        assert (found.elsewhere, found.gain > 0.4) == (shift, shift != 0)
    assert measures.lag_correlations(np.roll(energy, 20), energy, 4).max() < 0.5
    assert measures.lag_correlations(np.zeros(84, np.float32), energy, 4).max() == 0


def track(*boxes, present=None):
    """Makes a face whose landmarks are the corners of these boxes."""
    corners = np.array([[(x0, y0, 0), (x1, y1, 0)] for x0, y0, x1, y1 in boxes], np.float32)
    present = np.ones(len(boxes), bool) if present is None else np.array(present)
    corners[~present] = np.nan
    return FaceTrack(corners, present, present.astype(np.float32), prepare_fakes.DrawnFaces.layout)


def test_the_largest_face_or_the_one_of_a_number_is_chosen():
    large, left, right = track((40, 0, 90, 50)), track((0, 0, 20, 20)), track((90, 0, 120, 30))
    faces = [large, right, left]
    assert choose_face(faces, None) is large
    assert [choose_face(faces, n) for n in (1, 2, 3)] == [left, large, right]
    for found, number in (([], None), (faces, 4)):
        with pytest.raises(Dropped) as dropped:
            choose_face(found, number)
        assert dropped.value.reason == "no_face"


def test_faces_outside_the_image_and_blurred_ones():
    assert measures.fraction_inside(track((10, 10, 30, 30), (-5, 10, 15, 30)), 64, 64) == 0.5
    assert measures.fraction_inside(track((10, 10, 30, 30), (0, 0, 9, 9), present=[True, False]), 64, 64) == 1
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 255, (3, 64, 64, 3), np.uint8)
    blurred = np.stack([np.full((64, 64, 3), 90, np.uint8)] * 3)
    face = track(*[(0, 0, 60, 60)] * 3)
    assert measures.sharpness(sharp, face.boxes) > 100 > 1 > measures.sharpness(blurred, face.boxes)


def test_the_record_of_a_good_clip(tmp_path, task):
    write_talk(tmp_path / "good.mp4", seed=1)
    clips = clips_of(tmp_path / "good.mp4", task)
    assert [clip.dropped for clip in clips] == ["", ""]
    record = clips[1].record
    assert record["video"].shape == (FRAMES, SIZE, SIZE, 3)
    assert record["lips"].shape == (FRAMES, SIZE, SIZE)
    assert record["lips"].max() == 255
    rows, columns = np.nonzero(record["lips"][0])
    assert 33 < rows.mean() < 48  # where the mouth is drawn
    assert abs(columns.mean() - 32) < 3
    points = record["face_points"]
    assert points.shape == (5, 2)
    assert ((points > (12, 8)) & (points < (52, 52))).all()
    samples = audio_samples(FRAMES, FPS)
    assert record["waveform"].shape == (samples,)
    audio = media.read_audio(tmp_path / "good.mp4")[samples:]
    assert np.abs(record["waveform"][:4000] / 32767 - audio[:4000]).max() < 1e-3
    assert clips[0].measures["sync"] > 0.5
    assert set(TALKING) <= set(clips[0].measures)


@pytest.mark.parametrize(
    ("drawn", "settings", "reason"),
    [
        ({"audio": False}, {}, "no_sound"),
        ({"centers": ()}, {}, "no_face"),
        ({"centers": ((8, 28),)}, {}, "face_inside"),
        ({"num_frames": FRAMES - 1}, {}, "short"),
        ({}, {"max_enlargement": 0.5}, "small"),
        ({}, {"min_face_side": 0.9}, "face_side"),
        ({}, {"min_face_confidence": 0.96}, "face_frames"),
        ({}, {"min_sharpness": 1e6}, "sharpness"),
        ({}, {"min_sync": 0.999}, "sync"),
        ({}, {"face": 2}, "no_face"),
    ],
)
def test_a_bad_clip_is_dropped_with_one_line(tmp_path, task, drawn, settings, reason):
    write_talk(tmp_path / "v.mp4", **{"num_frames": FRAMES, "seed": 1} | drawn)
    task = replace(task, config=replace(task.config, **settings))
    (clip,) = clips_of(tmp_path / "v.mp4", task)
    assert clip.dropped == reason
    assert clip.message
    assert clip.line.startswith("v.mp4")
    assert "\n" not in clip.line


def test_several_faces_are_noted(tmp_path, task):
    write_talk(tmp_path / "v.mp4", num_frames=FRAMES, seed=1, centers=((18, 28), (51, 28)))
    (clip,) = clips_of(tmp_path / "v.mp4", task)
    assert clip.dropped == ""
    assert clip.line.startswith("v.mp4, 0.0 to 0.4 s: 2 faces")


def test_audio_that_ends_early(tmp_path, task):
    write_talk(tmp_path / "v.mp4", num_frames=3 * FRAMES, seed=1)
    audio = media.read_audio(tmp_path / "v.mp4")[: int(2.2 * FRAMES / FPS * SAMPLE_RATE)]
    media.write_audio(tmp_path / "short.wav", np.round(audio * 32767).astype(np.int16), SAMPLE_RATE)
    frames, _ = media.read_video(tmp_path / "v.mp4")
    media.write_video(tmp_path / "mute.mp4", frames, FPS)
    subject = tmp_path / "cut.mkv"
    mux(tmp_path / "mute.mp4", tmp_path / "short.wav", subject)
    *kept, last = clips_of(subject, task)
    assert [clip.dropped for clip in kept] == ["", ""]
    assert last.dropped == "missing_sound"
    assert last.measures["missing_sound"] == pytest.approx(0.8 * FRAMES / FPS, abs=0.05)


def mux(video, audio, target):
    """Writes a file with both streams, without padding the audio."""
    import av

    with (
        av.open(str(video)) as frames,
        av.open(str(audio)) as samples,
        av.open(str(target), "w") as container,
    ):
        pairs = []
        for source in (frames.streams.video[0], samples.streams.audio[0]):
            pairs.append((source, container.add_stream_from_template(source)))
        for source, stream in pairs:
            for packet in source.container.demux(source):
                if packet.dts is not None:
                    packet.stream = stream
                    container.mux(packet)


def test_a_damaged_stream_yields_intact_clips(tmp_path, task):
    write_talk(tmp_path / "v.mp4", num_frames=4 * FRAMES, seed=1)
    whole = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("not a video")
    middle = len(whole) // 2
    (tmp_path / "holes.mp4").write_bytes(whole[:middle] + bytes(4000) + whole[middle + 4000 :])
    for name in ("cut.mp4", "text.mp4", "holes.mp4"):
        clips = clips_of(tmp_path / name, task)
        assert clips[-1].dropped or len(clips) < 4
        assert all(clip.message and "\n" not in clip.line for clip in clips if clip.dropped)
    assert [clip.dropped for clip in clips_of(tmp_path / "text.mp4", task)] == ["unreadable"]


class Exploding:
    """A detector that raises an error."""

    layout = prepare_fakes.DrawnFaces.layout

    def detect(self, image):
        raise RuntimeError("broken")


def test_an_unexpected_error_drops_a_clip(tmp_path, task):
    write_talk(tmp_path / "v.mp4", num_frames=2 * FRAMES, seed=1)
    with open_fakes(task.config) as detectors:
        source = SourceVideo(str(tmp_path / "v.mp4"), "v.mp4", "0" * 64)
        clips = list(prepare_video(source, task, replace(detectors, faces=Exploding())))
    assert [clip.line for clip in clips] == [
        "v.mp4, 0.0 to 0.4 s: RuntimeError: broken",
        "v.mp4, 0.4 to 0.7 s: RuntimeError: broken",
    ]


def test_held_out_videos_stay_held_out():
    rng = random.Random(0)
    few = {f"{rng.getrandbits(256):064x}" for _ in range(300)}
    many = few | {f"{rng.getrandbits(256):064x}" for _ in range(300)}
    assert held_out(few, 0.1) == held_out(many, 0.1) & few
    assert 10 < len(held_out(few, 0.1)) < 60
    assert held_out({"a0000000", "b0000000"}, 0.01) == {"a0000000"}
    assert held_out({"a0000000"}, 0.5) == set()
    assert held_out(few, 0.0) == set()


@contextmanager
def deadly(config):
    """Detectors that kill the process when a face is at the left."""

    class Deadly(prepare_fakes.DrawnFaces):
        def detect(self, image):
            faces = super().detect(image)
            if faces and faces[0].box[0] < 10:
                os._exit(9)
            return faces

    with open_fakes(config) as detectors:
        yield replace(detectors, faces=Deadly())


@pytest.mark.slow
def test_a_video_that_kills_its_process_is_dropped_alone(tmp_path, task):
    for i, x in enumerate((32, 20, 40)):
        write_talk(tmp_path / f"{i}.mp4", num_frames=FRAMES, seed=1, centers=((x, 28),))
    sources, _ = scan(tmp_path)
    ready = prepare_videos(tmp_path / "work", sources, task, deadly, processes=2)
    found = {source.name: clips for source, clips in ready}
    assert {name: [clip.dropped for clip in clips] for name, clips in found.items()} == {
        "0.mp4": [""],
        "1.mp4": ["crash"],
        "2.mp4": [""],
    }


def test_shards_are_read_back_in_order_and_again(tmp_path):
    rng = np.random.default_rng(0)
    records = [
        {
            "text": rng.normal(size=(1 + i, 4)).astype(np.float16),
            "latents": rng.normal(size=(3, 2)).astype(np.float16),
            "waveform": rng.integers(-9, 9, 7).astype(np.int16),
        }
        for i in range(5)
    ]
    shards = RecordShards(tmp_path)
    shards.write("b", records[:3])
    shards.write("a", records[3:])
    for _ in range(2):
        read = list(ShardedRecords(RecordShards(tmp_path), ["b", "a"]))
        assert_equal_records({"all": read}, {"all": records})
        assert all(
            one[name].dtype == other[name].dtype
            for one, other in zip(read, records, strict=True)
            for name in one
        )


def test_settings_name_models_by_their_content(tmp_path, task):
    """So that work can be resumed where they, and the videos, lie at other places."""

    def described(folder, content):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "face.task").write_text(content)
        landmarks = replace(task.config.landmarks, face_model=str(tmp_path / folder / "face.task"))
        return replace(task, config=replace(task.config, landmarks=landmarks)).as_json()

    assert described("here", "model") == described("there", "model") != described("here", "another")
    assert str(tmp_path) not in json.dumps(described("here", "model"))


def test_the_report_escapes_names_and_shows_every_reason(task):
    clips = [
        PreparedClip("<b>.mp4", "0", 0, (0.0, 1.0), "", "", {"sync": 0.5}),
        PreparedClip("a.mp4", "1", 0, (0.0, 1.0), "sync", "too low", {"sync": 0.1}),
        PreparedClip("c.mp4", "2", -1, (0.0, 0.0), "no_sound", "has no audio"),
        PreparedClip('"><script>x', "3", 0, (0.0, 1.0), "", "<i>several</i>", {"sync": 0.5}),
    ]
    about = {"<u>e.mp4": "did you mean <s>?"}
    hostile = render_report(clips, about, task.config, lambda clip: b"jpeg")
    for tag in ("<b>.mp4", "<script", "<i>", "<u>", "<s>", '"">'):
        assert tag not in hostile
    page = render_report(clips, {"d.mp4": "has no video"}, task.config, lambda clip: b"jpeg")
    assert "<b>.mp4" not in page
    assert "&lt;b&gt;.mp4" in page
    for text in ("a.mp4, 0.0 to 1.0 s: too low", "c.mp4: has no audio", "d.mp4: has no video"):
        assert text in page
    assert page == render_report(clips, {"d.mp4": "has no video"}, task.config, lambda clip: b"jpeg")
