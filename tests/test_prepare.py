"""From raw video to records: what is found, measured and dropped, and runs that are interrupted."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import prepare_fakes
import pytest
from prepare_fakes import CONFIG, FPS, FRAMES, SIZE, open_fakes, write_talk

from fantasy_jax import cli, media
from fantasy_jax.config import ConfigError, build, load_config
from fantasy_jax.data.landmarks import FaceTrack
from fantasy_jax.data.loader import batches
from fantasy_jax.data.prepare import filters
from fantasy_jax.data.prepare.command import main
from fantasy_jax.data.prepare.config import PrepareConfig
from fantasy_jax.data.prepare.cutting import covering, cut
from fantasy_jax.data.prepare.encode import held_out
from fantasy_jax.data.prepare.scan import Source, read_captions, scan, unmatched
from fantasy_jax.data.prepare.stages import Task, prepare_video
from fantasy_jax.data.prepare.store import prepare_videos
from fantasy_jax.data.records import open_split
from fantasy_jax.data.voices import SAMPLE_RATE, draw_voice, speak
from fantasy_jax.pipeline import ModelConfig, SampleConfig
from fantasy_jax.sharding import make_mesh
from fantasy_jax.training.stages import abstract_batch
from fantasy_jax.training.talking import PadText

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def task(config_file):
    config = load_config(str(config_file))
    return Task(build(PrepareConfig, config.prepare, "prepare"), FPS, FRAMES)


def clips_of(path, task):
    with open_fakes(task.config) as detectors:
        return list(prepare_video(Source(str(path), path.name, "0" * 64), task, detectors))


def test_each_content_is_found_once(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "b.MP4").write_bytes(b"one")
    (tmp_path / "deep/er/a.webm").write_bytes(b"two")
    (tmp_path / "z.mkv").write_bytes(b"one")
    (tmp_path / "notes.txt").write_bytes(b"three")
    sources, left_out = scan(tmp_path)
    assert [source.name for source in sources] == ["b.MP4", "deep/er/a.webm"]
    assert left_out == {"z.mkv": "is the same file as b.MP4"}
    with pytest.raises(ConfigError, match="no such folder"):
        scan(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no video"):
        scan(tmp_path / "empty")


def test_captions_from_both_kinds_of_files(tmp_path):
    rows = {"a.mp4": "A woman, talking.", "deep/b.mp4": 'A man says "hello".'}
    (tmp_path / "c.csv").write_text(
        'file_name,prompt\na.mp4,"A woman, talking."\ndeep/b.mp4,"A man says ""hello""."\n'
    )
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "prompt": prompt}) for name, prompt in rows.items())
    )
    assert read_captions(tmp_path / "c.csv") == read_captions(tmp_path / "c.jsonl") == rows
    assert unmatched(rows, {"a.mp4", "deep/c.mp4"}) == {
        "deep/b.mp4": "the side file names it, but there is no such video; is it deep/c.mp4?"
    }
    for name, text, message in (
        ("short.csv", "file,prompt\na.mp4,x\n", "line 2 has no file_name and prompt"),
        ("twice.csv", "file_name,prompt\na.mp4,x\na.mp4,y\n", "names a.mp4 again"),
        ("broken.jsonl", "{", "not a text file of captions"),
        ("list.jsonl", "[1]", "line 1 has no file_name"),
        ("c.txt", "", "give a .csv or .jsonl"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_captions(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_captions(tmp_path / "missing.csv")


def test_a_picture_covers_the_size_that_is_wanted():
    assert covering(848, 480, (512, 512)) == (905, 512)
    assert covering(720, 1280, (512, 512)) == (512, 910)
    assert covering(512, 512, (512, 512)) == (512, 512)


def test_no_clip_lies_across_a_cut(tmp_path):
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


def test_speech_is_told_from_noise_and_silence():
    rng = np.random.default_rng(0)
    speech = speak(rng, draw_voice(rng), num_frames=75, fps=25).waveform
    assert filters.speech_share(speech, 2) > 0.6
    assert filters.speech_share(np.zeros(3 * SAMPLE_RATE, np.float32), 2) == 0
    assert filters.speech_share(np.zeros(3, np.float32), 2) == 0
    noise = rng.normal(0, 0.02, 3 * SAMPLE_RATE).astype(np.float32)
    assert filters.speech_share(noise, 3) < 0.2


def test_lips_and_sound_in_and_out_of_step():
    rng = np.random.default_rng(1)
    energy = np.convolve(rng.uniform(size=84), np.hanning(5), "same").astype(np.float32)
    for shift in (-3, 0, 4):
        value, lag = filters.best_lag(np.roll(energy, shift), energy, 4)
        assert (lag, value > 0.9) == (shift, True)
    assert filters.best_lag(np.roll(energy, 20), energy, 4)[0] < 0.5
    assert filters.best_lag(np.zeros(84, np.float32), energy, 4)[0] == 0


def track(*boxes, present=None):
    """A face whose points are the corners of these boxes."""
    corners = np.array([[(x0, y0, 0), (x1, y1, 0)] for x0, y0, x1, y1 in boxes], np.float32)
    present = np.ones(len(boxes), bool) if present is None else np.array(present)
    corners[~present] = np.nan
    return FaceTrack(corners, present, present.astype(np.float32), prepare_fakes.DrawnFaces.layout)


def test_which_face_is_meant():
    large, left, right = track((40, 0, 90, 50)), track((0, 0, 20, 20)), track((90, 0, 120, 30))
    faces = [large, right, left]
    assert filters.choose_face([large], None) == (large, "")
    chosen, message = filters.choose_face(faces, None)
    assert chosen is large
    assert message == "3 faces; the largest is taken, --face=N takes another"
    assert [filters.choose_face(faces, n)[0] for n in (1, 2, 3)] == [left, large, right]
    for faces_there, wanted in (([], None), (faces, 4)):
        with pytest.raises(filters.Dropped) as dropped:
            filters.choose_face(faces_there, wanted)
        assert dropped.value.reason == "no_face"


def test_a_face_half_outside_and_a_blurred_one():
    assert filters.share_inside(track((10, 10, 30, 30), (-5, 10, 15, 30)), 64, 64) == 0.5
    assert filters.share_inside(track((10, 10, 30, 30), (0, 0, 9, 9), present=[True, False]), 64, 64) == 1
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 255, (3, 64, 64, 3), np.uint8)
    blurred = np.stack([np.full((64, 64, 3), 90, np.uint8)] * 3)
    face = track(*[(0, 0, 60, 60)] * 3)
    assert filters.sharpness(sharp, face) > 100 > 1 > filters.sharpness(blurred, face)


def test_what_a_good_clip_becomes(tmp_path, task):
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
    assert record["sound"].shape == (int(FRAMES / FPS * SAMPLE_RATE),)
    heard = media.read_sound(tmp_path / "good.mp4")[int(FRAMES / FPS * SAMPLE_RATE) :]
    assert np.abs(record["sound"][:4000] / 32767 - heard[:4000]).max() < 1e-3
    assert clips[0].measures["sync"] > 0.5
    assert set(filters.FILTERS) <= set(clips[0].measures)


@pytest.mark.parametrize(
    ("drawn", "settings", "reason", "message"),
    [
        ({"sound": False}, {}, "no_sound", "has no sound"),
        ({"centers": ()}, {}, "no_face", "no face is found"),
        ({"centers": ((8, 28),)}, {}, "face_inside", "of the face lie inside of the picture; 95% are needed"),
        ({"num_frames": FRAMES - 1}, {}, "short", "a scene of 8 frames; 9 are needed"),
        ({}, {"size": (96, 96)}, "small", "64 x 64 pixels would be enlarged 1.50 times"),
        ({}, {"min_face_side": 0.9}, "face_side", "the face takes"),
        ({}, {"min_face_confidence": 0.96}, "face_frames", "in 0% of the frames; 95% are needed"),
        ({}, {"min_sharpness": 1e6}, "sharpness", "1000000 is needed"),
        ({}, {"min_sync": 0.999}, "sync", "lips follow the sound by"),
        ({}, {"face": 2}, "no_face", "1 faces are found; --face=2 is not there"),
    ],
)
def test_bad_input_is_a_line_and_a_clip_that_is_dropped(tmp_path, task, drawn, settings, reason, message):
    write_talk(tmp_path / "v.mp4", **{"num_frames": FRAMES, "seed": 1} | drawn)
    task = replace(task, config=replace(task.config, **settings))
    (clip,) = clips_of(tmp_path / "v.mp4", task)
    assert clip.dropped == reason
    assert message in clip.message
    assert clip.line.startswith("v.mp4")
    assert "\n" not in clip.line


def test_several_faces_are_told(tmp_path, task):
    write_talk(tmp_path / "v.mp4", num_frames=FRAMES, seed=1, centers=((18, 28), (51, 28)))
    (clip,) = clips_of(tmp_path / "v.mp4", task)
    assert clip.dropped == ""
    assert clip.line == "v.mp4, 0.0 to 0.4 s: 2 faces; the largest is taken, --face=N takes another"


def test_sound_that_ends_early(tmp_path, task):
    write_talk(tmp_path / "v.mp4", num_frames=3 * FRAMES, seed=1)
    sound = media.read_sound(tmp_path / "v.mp4")[: int(2.2 * FRAMES / FPS * SAMPLE_RATE)]
    media.write_sound(tmp_path / "short.wav", np.round(sound * 32767).astype(np.int16), SAMPLE_RATE)
    frames, _ = media.read_video(tmp_path / "v.mp4")
    silent = tmp_path / "silent.mp4"
    media.write_video(silent, frames, FPS)
    subject = tmp_path / "cut.mkv"
    mux(silent, tmp_path / "short.wav", subject)
    *kept, last = clips_of(subject, task)
    assert [clip.dropped for clip in kept] == ["", ""]
    assert last.dropped == "missing_sound"
    assert re.search(r"the sound ends 0\.\d\d s before the clip; at most 0\.20 s are allowed", last.message)


def mux(video, sound, target):
    """One file of both, the sound no longer than it is."""
    import av

    with (
        av.open(str(video)) as frames,
        av.open(str(sound)) as samples,
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


def test_a_damaged_stream_gives_what_is_whole(tmp_path, task):
    write_talk(tmp_path / "v.mp4", num_frames=4 * FRAMES, seed=1)
    whole = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("nothing of the kind")
    middle = len(whole) // 2
    (tmp_path / "holes.mp4").write_bytes(whole[:middle] + bytes(4000) + whole[middle + 4000 :])
    for name in ("cut.mp4", "text.mp4", "holes.mp4"):
        clips = clips_of(tmp_path / name, task)
        assert clips[-1].dropped or len(clips) < 4
        assert all(clip.message and "\n" not in clip.line for clip in clips if clip.dropped)
    assert [clip.dropped for clip in clips_of(tmp_path / "text.mp4", task)] == ["unreadable"]


class Exploding:
    """A detector that raises."""

    layout = prepare_fakes.DrawnFaces.layout

    def detect(self, picture):
        raise RuntimeError("out of luck")


def test_an_unforeseen_error_drops_a_clip(tmp_path, task):
    write_talk(tmp_path / "v.mp4", num_frames=2 * FRAMES, seed=1)
    with open_fakes(task.config) as detectors:
        source = Source(str(tmp_path / "v.mp4"), "v.mp4", "0" * 64)
        clips = list(prepare_video(source, task, replace(detectors, faces=Exploding())))
    assert [clip.line for clip in clips] == [
        "v.mp4, 0.0 to 0.4 s: RuntimeError: out of luck",
        "v.mp4, 0.4 to 0.7 s: RuntimeError: out of luck",
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
    """Detectors that end the process when a face is at the left."""

    class Deadly(prepare_fakes.DrawnFaces):
        def detect(self, picture):
            faces = super().detect(picture)
            if faces and faces[0].box[0] < 10:
                os._exit(9)
            return faces

    with open_fakes(config) as detectors:
        yield replace(detectors, faces=Deadly())


@pytest.mark.slow
def test_a_video_that_ends_its_process_is_dropped_alone(tmp_path, task):
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


def make_input(folder):
    """Videos of which some give clips: six kept ones, five for different reasons dropped."""
    folder.mkdir()
    for i in range(3):
        write_talk(folder / f"talk{i}.mp4", seed=i + 1)
    write_talk(folder / "mute.mp4", num_frames=FRAMES, seed=5, sound=False)
    write_talk(folder / "nobody.mp4", num_frames=FRAMES, seed=6, centers=())
    (folder / "text.mp4").write_text("nothing of the kind")
    (folder / "twin.mp4").write_bytes((folder / "talk1.mp4").read_bytes())
    return folder


def command(folder, output, config_file, *more):
    return [f"--input={folder}", f"--output={output}", f"--config={config_file}", "--processes=1", *more]


def records_of(dataset):
    splits = json.loads((dataset / "dataset_info.json").read_text())["splits"]
    return {
        split["name"]: [dict(record) for record in open_split(dataset, split["name"])] for split in splits
    }


def assert_equal_records(one, other):
    assert one.keys() == other.keys()
    for split in one:
        assert len(one[split]) == len(other[split])
        for a, b in zip(one[split], other[split], strict=True):
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_records_are_what_training_takes_and_work_is_done_once(tmp_path, config_file, capsys):
    folder, output = make_input(tmp_path / "videos"), tmp_path / "out"
    captions = tmp_path / "captions.csv"
    names = ("talk0.mp4", "talk1.mp4", "talk2.mp4", "mute.mp4", "text.mp4", "talk9.mp4")
    captions.write_text("file_name,prompt\n" + "".join(f"{name},About {name}.\n" for name in names))
    arguments = command(folder, output, config_file, f"--captions={captions}")
    assert main(arguments, open_detectors=open_fakes) == 0
    told = capsys.readouterr()
    assert "clips are kept" in told.out
    for line in (
        "dropped: mute.mp4: has no sound",
        "dropped: nobody.mp4: ",
        "dropped: text.mp4: unreadable: ",
        "dropped: twin.mp4: is the same file as talk1.mp4",
        "talk9.mp4: the side file names it, but there is no such video",
    ):
        assert line in told.err
    dataset = output / "encoded_clips/1.0.0"
    records = records_of(dataset)
    assert set(records) == {"train", "test"}

    config = load_config(str(config_file))
    model, sampling = build(ModelConfig, config.model, "model"), build(SampleConfig, config.sample, "sample")
    mesh = make_mesh(data=1, fsdp=1, context=1, tensor=1)
    wanted = abstract_batch(model, sampling, (SIZE, SIZE), 2, mesh)
    pad = PadText(model.transformer.text_length)
    batch = next(batches(open_split(dataset, "train"), pad, batch_size=2, start=0, workers=0, seed=0))
    assert {name: batch[name].shape for name in wanted} == {name: x.shape for name, x in wanted.items()}
    assert batch["motion"].shape == (2, 2)
    assert ((batch["motion"] >= 0) & (batch["motion"] <= 1)).all()
    assert batch["lips"].max() > 0.05
    normaliser = json.loads((output / "motion.json").read_text())
    metadata = json.loads((dataset / "metadata.json").read_text())
    assert metadata["motion"] == normaliser
    assert metadata["task"]["config"]["size"] == [SIZE, SIZE]

    page = (output / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 6
    assert page.count("<svg") == len(filters.FILTERS)
    for text in ("has no sound", "no caption", "Captions that match no video: 1", "<td>"):
        assert text in page
    assert "http" not in page

    # The same again does nothing; a new caption is encoded, and no video is looked at.
    stamps = {path: path.stat().st_mtime_ns for path in (output / "work").rglob("*") if path.is_file()}
    assert main(arguments, open_detectors=open_fakes) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert {path for path in (output / "work").rglob("*") if path.is_file()} == set(stamps)
    captions.write_text(captions.read_text().replace("About talk0", "On talk0"))
    with pytest.raises(ConfigError, match=r"was made with another clips; remove it"):
        main(arguments, open_detectors=open_fakes)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


@pytest.mark.slow
def test_a_run_without_a_good_clip_says_so(tmp_path, config_file, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_talk(folder / "nobody.mp4", num_frames=FRAMES, centers=())
    with pytest.raises(SystemExit) as exit_:
        cli.run(
            lambda: main(
                command(folder, tmp_path / "out", config_file, "--clips_only"), open_detectors=open_fakes
            ),
            "prepare",
        )
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("prepare: error: no clip is left; ")
    assert "no face is found" in (tmp_path / "out/report.html").read_text()


def progress(output):
    """How far a run has come: results on disk, videos and batches."""
    return sum(1 for _ in output.glob("work/*/videos/*/clips.json")) + sum(
        1 for _ in output.glob("work/encoded/*")
    )


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path, config_file):
    folder = make_input(tmp_path / "videos")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }

    def start(output):
        program = [sys.executable, str(ROOT / "tests/prepare_fakes.py")]
        return subprocess.Popen(
            program + command(folder, output, config_file),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    assert start(tmp_path / "undisturbed").wait() == 0
    most = progress(tmp_path / "undisturbed")
    disturbed, rng = tmp_path / "disturbed", random.Random(os.environ.get("SEED", "0"))
    kills = 0
    for goal in sorted(rng.sample(range(1, most - 1), k=5)):
        run = start(disturbed)
        while progress(disturbed) < goal and run.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        kills += run.wait() == -signal.SIGKILL
    assert kills == 5
    assert start(disturbed).wait() == 0
    for name in ("report.html", "motion.json"):
        assert (disturbed / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    one, other = (records_of(out / "encoded_clips/1.0.0") for out in (disturbed, tmp_path / "undisturbed"))
    assert_equal_records(one, other)
    assert sum(len(records) for records in one.values()) == 6
    assert not list(disturbed.rglob("*.partial"))
