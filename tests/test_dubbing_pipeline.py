"""Dubbing as users start it: a video and audio become a video in which only the mouth is new."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from drawn_faces import clip, open_squares
from helpers import full_disk, small_networks

from configs.fantasy_talking_14b import small_model
from fantasy_jax import FantasyDubbingPipeline, media
from fantasy_jax.diffusion.windows import WindowSchedule
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.pipelines import dubbing, dubbing_plan
from fantasy_jax.pipelines.arguments import sampling_parser
from fantasy_jax.pipelines.batch import ClipRequest
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.pipelines.dubbed_video import DubbedScene, DubbedVideo
from fantasy_jax.pipelines.latents import read_latents
from fantasy_jax.preprocessing import dubbing as preprocessing
from fantasy_jax.preprocessing.dubbing import match_rates
from fantasy_jax.preprocessing.face_masks import resize_crop
from fantasy_jax.preprocessing.images import from_uint8, to_uint8
from fantasy_jax.preprocessing.landmarks import LandmarkConfig
from fantasy_jax.video import VideoConfig
from sample import _write, main

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT / 'configs/tiny.py'}"
RATE = 16_000


@pytest.fixture(autouse=True)
def _squares(monkeypatch):
    monkeypatch.setattr(dubbing_plan, "open_detector", open_squares)


def speech(seconds):
    return (0.1 * np.sin(np.arange(round(seconds * RATE)) / 10)).astype(np.float32)


def write(path, *videos, fps=25):
    """Writes videos, one scene after another; every second scene has a blue background."""
    videos = [video.copy() for video in videos]
    for video in videos[1::2]:
        video[..., 2] = 200
    media.write_video(path, np.concatenate(videos), fps, lossless=True)
    return str(path)


def person(left=40, frames=9, level=20):
    return clip((level, left), frames=frames)


def plan(path, seconds, **settings):
    return dubbing_plan.plan_dubbing(path, seconds, mask="mouth", config=LandmarkConfig(), **settings)


def test_scenes_without_the_speaker_are_left_out(tmp_path):
    path = write(tmp_path / "v.mp4", person(), clip(frames=7), person(200, frames=10))
    found = plan(path, 26 / 25)
    assert found.num_frames == 26
    assert [(speaker.first, speaker.num_frames) for speaker in found.speakers] == [(0, 9), (16, 10)]
    (note,) = found.notes
    assert "frames 9 to 15" in note
    assert "no face" in note


def test_the_rest_of_a_video_is_not_dubbed(tmp_path):
    path = write(tmp_path / "v.mp4", person(frames=20), person(200, frames=20))
    found = plan(path, 11.5 / 25)
    assert found.num_frames == 40
    assert [(speaker.first, speaker.num_frames) for speaker in found.speakers] == [(0, 12)]
    (note,) = found.notes
    assert note == (
        "The audio lasts 0.46 of the video's 1.60 s; after it the video keeps its frames, but not its sound."
    )
    found = plan(path, 23 / 25)  # three frames into the second scene
    assert [(speaker.first, speaker.num_frames) for speaker in found.speakers] == [(0, 20)]
    assert "frames 20 to 22" in found.notes[1]


def test_audio_that_is_longer_is_cut(tmp_path):
    (note,) = plan(write(tmp_path / "v.mp4", person()), 2.0).notes
    assert note == "The audio lasts 2.00 s and is cut to the video's 0.36 s."


def test_one_number_or_box_is_for_all_scenes_or_one_for_each(tmp_path):
    two = clip((10, 60), (20, 200), frames=8)
    path = write(tmp_path / "v.mp4", two, two[:, :, ::-1])

    def places(**settings):
        return [
            (speaker.first, speaker.square.left > 100) for speaker in plan(path, 16 / 25, **settings).speakers
        ]

    assert places(people=[2]) == [(0, True), (8, True)]
    assert places(people=[1, 2]) == [(0, False), (8, True)]
    assert places(people=[0, 1]) == [(8, False)]
    left, right = np.array([0.1, 0.1, 0.45, 0.9]), np.array([0.55, 0.1, 0.9, 0.9])
    assert places(boxes=[right]) == [(0, True), (8, True)]
    assert places(boxes=[right, left]) == [(0, True), (8, False)]


def test_where_no_face_is_found_the_box_is_the_head(tmp_path):
    path = write(tmp_path / "v.mp4", clip(frames=8))
    (speaker,) = plan(path, 8 / 25, boxes=[np.array([0.5, 0.25, 0.625, 0.75])]).speakers
    square = speaker.square
    assert square.side == 108
    rows, columns = np.nonzero(speaker.mask(3))
    assert columns.mean() + square.left == pytest.approx(180, abs=2)
    assert rows.min() + square.top == pytest.approx(60 - 0.08 * 60, abs=2)


@pytest.mark.parametrize(
    ("videos", "seconds", "settings", "message"),
    [
        ([clip(frames=9)], 1.0, {}, "no face found in 9 frames"),
        ([person(), person(200, frames=4)], 1.0, {}, "a scene of 4 frames"),
        ([person(frames=1)], 1.0, {}, "has one frame"),
        ([person()], 0.1, {}, "shows no face for 5 frames"),
        ([clip(frames=12), person()], 0.4, {}, "the audio lasts 0.40 s"),
        ([clip((10, 60), (20, 200), frames=8)], 1.0, {}, "2 people"),
        ([clip((10, 60), (20, 200), frames=8)], 1.0, {"people": [3]}, "--person=3"),
        ([person()], 1.0, {"people": [1, 1]}, "--person is given 2 times"),
        ([person()], 1.0, {"people": [0]}, "nothing would be dubbed"),
        ([person()], 1.0, {"boxes": [np.array([0, 0, 1, 0.5])] * 3}, "--box is given 3 times"),
        ([person()], 1.0, {"boxes": [np.array([0, 0, 2, 0.5])]}, "--box"),
        ([person()], 1.0, {"boxes": [np.array([0, 0, 1, 0.5])], "people": [1]}, "give one of them"),
    ],
)
def test_what_cannot_be_dubbed_is_refused(tmp_path, videos, seconds, settings, message):
    path = write(tmp_path / "v.mp4", *videos)
    with pytest.raises((MediaError, ConfigError), match=message) as refused:
        plan(path, seconds, **settings)
    assert "\n" not in str(refused.value)


def test_a_mask_that_is_empty_is_refused(tmp_path, monkeypatch):
    outside = np.array([[-50.0, -50], [-40, -50], [-40, -40]])
    monkeypatch.setattr(preprocessing, "landmark_outline", lambda *_: outside)
    with pytest.raises(MediaError, match="the mask is empty from frame 0 on"):
        plan(write(tmp_path / "v.mp4", person()), 1.0)


def fake_dubbing(path):
    """A dubbed video whose generated crops are grey, and the list of those that were decoded."""
    found, decoded = plan(path, 1.0), []

    def decode():
        for index in range(9):
            decoded.append(index)
            yield np.full((32, 32, 3), 10 * index, np.uint8)

    (speaker,) = found.speakers
    scene = DubbedScene(
        speaker, match_rates(speaker.num_frames, 25.0, 25.0), decode, jnp.zeros((1, 3, 4, 4, 16))
    )
    return DubbedVideo(found, [scene], speech(1.0), 1.0), decoded


def test_crops_are_decoded_while_frames_are_iterated(tmp_path):
    video, decoded = fake_dubbing(write(tmp_path / "v.mp4", person(), clip(frames=6)))
    for index, frame in enumerate(video.frames()):
        assert decoded == list(range(min(index + 1, 9)))
        if index < 9:
            inside = video.scenes[0].speaker.square.cut(frame)
            assert (inside == 10 * index).all(axis=-1).sum() > 100
    assert index == 14


def test_latents_survive_a_disk_that_is_full(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    video, _ = fake_dubbing(write("v.mp4", person()))
    latents = np.random.default_rng(0).standard_normal((1, 3, 4, 4, 16)).astype(np.float32)
    scene = replace(video.scenes[0], latents=jnp.asarray(latents))
    video = replace(video, scenes=[scene, replace(scene, latents=scene.latents[:, :2])])
    arguments = sampling_parser("").parse_args([TINY])
    request = ClipRequest("v.mp4", ("a.wav",), "", Path("d.mp4"))
    with full_disk(8000), pytest.raises(MediaError, match=r"--latents=d\.latents\.safetensors .*mask"):
        _write(video, arguments, request, None, "video, sound, mask, people and config")
    kept, _ = read_latents("d.latents.safetensors", 16)
    assert np.array_equal(kept, np.concatenate([latents, latents[:, :2]], axis=1))


def test_a_source_that_has_changed_is_an_error(tmp_path):
    video, _ = fake_dubbing(write(tmp_path / "v.mp4", person()))
    write(tmp_path / "v.mp4", person(frames=6))
    with pytest.raises(MediaError, match="the file changed while it was read"):
        list(video.frames())
    reader = dubbing_plan.SceneReader(video.plan.source)
    with pytest.raises(MediaError, match="the file changed while it was read"):
        list(reader.crops(video.plan.speakers[0], 32))


@pytest.fixture(scope="module")
def pipeline():
    return FantasyDubbingPipeline(
        small_networks(small_model()),
        VideoConfig(height=32, width=32, num_frames=9),
        SampleConfig(num_inference_steps=2, text_guidance_scale=1.0, audio_guidance_scale=1.0),
        keep="all",
    )


def frames_of(path):
    return np.stack(list(dubbing_plan.SourceVideo.open(path)))


@pytest.mark.slow
def test_only_the_mouth_of_the_speaker_changes(pipeline, tmp_path):
    path = write(tmp_path / "v.mp4", person(frames=9), clip(frames=6), person(200, frames=9), fps=20)
    source = frames_of(path)
    notes = []
    out = pipeline(path, speech(20 / 20), seed=1, report=notes.append)
    dubbed = np.stack(list(out.frames()))
    assert dubbed.shape == source.shape
    assert (out.fps, out.seconds) == (20, 24 / 20)
    assert len(notes) == 2
    outside = np.ones(source.shape[:3], bool)
    for scene in out.scenes:
        speaker = scene.speaker
        square = speaker.square
        for index in range(speaker.num_frames):
            outside[speaker.first + index, square.top :, square.left :][
                : square.side, : square.side
            ] &= ~speaker.mask(index)
    assert outside[9:15].all()  # the scene without a face
    assert outside[20:].all()  # after the audio
    assert np.array_equal(dubbed[outside], source[outside])
    assert (dubbed[~outside] != source[~outside]).mean() > 0.5
    again = pipeline(path, speech(20 / 20), latents=out.latents)
    assert np.array_equal(np.stack(list(again.frames())), dubbed)
    with pytest.raises(ConfigError, match="latents"):
        pipeline(path, speech(8 / 20), latents=out.latents)  # the first scene alone
    out.save(tmp_path / "out.mp4", sheet=tmp_path / "sheet.png", lossless=True)
    assert np.array_equal(frames_of(tmp_path / "out.mp4"), dubbed)
    assert media.probe_video(tmp_path / "out.mp4").fps == 20
    written = media.read_audio(tmp_path / "out.mp4")
    assert np.abs(written[2000:14000]).max() > 0.05
    assert np.abs(written[17500:]).max() < 0.01
    assert media.read_image(tmp_path / "sheet.png").height > 2 * 192 * 120 / 320


@pytest.mark.slow
def test_strength_0_without_a_mask_is_the_vaes_reconstruction(pipeline, tmp_path, capsys):
    path = write(tmp_path / "v.mp4", person(frames=9), fps=20)
    out = pipeline(path, speech(1.0), mask="none", strength=0.0, progress=True)
    assert ": 0 evaluations of the transformer" in capsys.readouterr().out
    (scene,) = out.scenes
    square = scene.speaker.square
    crops = np.stack([resize_crop(square.cut(frame), 32) for frame in frames_of(path)])
    vae = pipeline.networks["vae"]
    latents = vae.encode(from_uint8(crops)[None])
    np.testing.assert_allclose(scene.latents, latents, atol=1e-4)
    decoded = to_uint8(np.clip(np.asarray(vae.decode(jnp.asarray(scene.latents)))[0], -1, 1))
    generated = np.stack(list(scene.decode()))
    assert np.abs(generated.astype(int) - decoded).max() <= 1
    frame = next(iter(out.frames()))
    inner = square.cut(frame)[8:-8, 8:-8]
    assert np.array_equal(inner, resize_crop(generated[0], square.side)[8:-8, 8:-8])


@pytest.mark.slow
def test_a_mask_of_nothing_returns_the_bytes_of_the_source(pipeline, tmp_path, monkeypatch):
    path = write(tmp_path / "v.mp4", person(frames=9), fps=20)
    monkeypatch.setattr(dubbing_plan, "check_mask", lambda *_: None)
    monkeypatch.setattr(dubbing.Speaker, "mask", lambda self, _: np.zeros([self.square.side] * 2, bool))
    out = pipeline(path, speech(1.0))
    assert np.array_equal(np.stack(list(out.frames())), frames_of(path))


@pytest.mark.slow
def test_fast_videos_are_generated_at_the_models_rate(pipeline, tmp_path):
    path = write(tmp_path / "v.mp4", person(frames=15), fps=50)
    (scene,) = pipeline(path, speech(1.0)).scenes
    assert len(list(scene.decode())) == 9  # 0.3 s at 23 frames per second are 7, and 9 is 4k + 1
    assert scene.rates.shown.max() == 6


@pytest.mark.slow
def test_each_window_has_the_sources_frame_at_its_start_as_reference(pipeline, tmp_path):
    path = write(tmp_path / "v.mp4", person(frames=9), fps=20)
    found, config = plan(path, 1.0), replace(pipeline.config, overlap=1)
    (scene,) = pipeline._clips(config, found, speech(1.0))
    scene = replace(scene, windows=WindowSchedule(3, 2, 1, anchor="track", references=(0, 1)))
    with pipeline._on_mesh() as networks:
        ((inputs, held),) = pipeline._encode_clips(
            networks, config, "A person is talking.", found, [scene], dubbing.untimed
        )
    assert inputs.first_frame.shape[:2] == (2, 3)
    assert inputs.image.shape[0] == 2
    assert held.latents.shape == (1, 3, 4, 4, 16)
    assert held.mask.shape == (1, 3, 4, 4, 1)
    assert set(np.unique(held.mask)) == {0, 1}


def test_the_weights_are_fantasytalkings():
    assert FantasyDubbingPipeline.from_pretrained().video == VideoConfig(64, 64, 17, 25)


def test_a_background_is_mixed_with_the_audio(tmp_path):
    time = np.arange(RATE) / RATE
    tones = {name: np.sin(2 * np.pi * hertz * time) for name, hertz in (("low", 220), ("high", 1760))}
    for name, tone in tones.items():
        media.write_audio(tmp_path / f"{name}.wav", np.round(20000 * tone).astype(np.int16), RATE)
    media.write_video(
        tmp_path / "v.mp4",
        person(frames=25),
        Fraction(25),
        audio=tmp_path / "low.wav",
        background=tmp_path / "high.wav",
    )
    written = media.read_audio(tmp_path / "v.mp4")[:RATE]
    power = [abs(np.vdot(tone[: written.size], written)) / written.size * 2 for tone in tones.values()]
    assert power[0] == pytest.approx(power[1], rel=0.05)
    assert power[0] == pytest.approx(0.5, abs=0.1)  # 0.61 each would exceed 1 together


@pytest.mark.slow
def test_the_command_writes_a_video_and_a_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("v.mp4", person(frames=10), fps=20)
    media.write_audio("a.wav", np.zeros(4800, np.int16), RATE)
    steps = "--config.sample.num_inference_steps=2"
    command = [TINY, "--video=v.mp4", "--audio=a.wav", "--background=a.wav", "--output=out/dubbed.mp4", steps]
    main([*command, "--save_latents=latents.safetensors"])
    printed = capsys.readouterr().out
    assert "The audio lasts 0.30 of the video's 0.50 s" in printed
    assert "10 frames of 320 x 120 at 20 frames per second" in printed
    assert sorted(path.name for path in Path("out").iterdir()) == ["dubbed.mp4", "dubbed.png"]
    assert media.read_video("out/dubbed.mp4")[0].shape == (10, 120, 320, 3)
    before = media.read_video("out/dubbed.mp4")[0]
    main([*command, "--latents=latents.safetensors"])
    assert np.array_equal(media.read_video("out/dubbed.mp4")[0], before)
    with pytest.raises(ConfigError, match="--prompt has no effect with --latents"):
        main([*command, "--latents=latents.safetensors", "--prompt=a"])
