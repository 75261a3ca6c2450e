"""The miniature's weights that come with the project, and the measurements of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fantasy_jax import media
from fantasy_jax.config import build, load_config
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.evaluation import video
from fantasy_jax.evaluation.metrics import psnr, windowed_rms
from fantasy_jax.miniature import controls, lip_sync
from fantasy_jax.miniature.held_out import HeldOutClips, figure
from fantasy_jax.miniature.synthetic import SyntheticConfig, records
from fantasy_jax.pipelines.talking import FantasyTalkingPipeline
from fantasy_jax.video import VideoConfig
from sample import main

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "fantasy_jax/assets"
CONFIG = load_config(str(ROOT / "configs/tiny.py"))
PORTRAIT, SPEECH = ASSETS / "example/portrait.png", ASSETS / "example/speech.wav"


@pytest.fixture(scope="module")
def pipeline():
    return FantasyTalkingPipeline.from_pretrained()


def held_out_clips(pipeline, count):
    data = build(SyntheticConfig, CONFIG.data, "data")
    clips = list(records(data, pipeline.video, "test", count))
    return HeldOutClips(pipeline.networks, pipeline.video, pipeline.config, clips)


@pytest.mark.slow
def test_image_audio_and_prompt_each_change_the_result(pipeline):
    def latents(image=PORTRAIT, audio=SPEECH, prompt="A person is talking calmly."):
        settings = {"num_inference_steps": 4, "guidance_scale": 2.0}
        return np.asarray(pipeline(image, audio, prompt, **settings).latents)

    expected = latents()
    assert np.array_equal(latents(), expected)
    changes = {
        "image": media.read_image(PORTRAIT).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "audio": media.read_audio(SPEECH)[::-1].copy(),
        "prompt": "An excited person speaks and moves a lot.",
    }
    for name, value in changes.items():
        difference = latents(**{name: value}) - expected
        assert np.sqrt(np.square(difference).mean()) > 0.01, name


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_sampling")
def test_mouths_follow_their_own_audio(pipeline):
    figures = lip_sync.lip_sync(held_out_clips(pipeline, 32))
    assert figures["correlation_of_renders"].mean > 0.95
    assert figures["correlation_of_vae"].mean > 0.9
    assert figures["correlation"].mean > 0.7
    assert figures["correlation_with_other_truth"].mean > 0.65
    assert abs(figures["correlation_with_other_audio"].mean) < 0.25
    assert figures["psnr_outside_lips"].mean > 25
    assert abs(figures["opening_in_pauses"].mean) < 0.1
    assert figures["opening_in_speech"].mean > 0.25
    assert abs(figures["opening_in_pauses_over_speech_of_renders"].mean) < 0.1
    assert figures["opening_in_pauses_over_speech_without_audio"].mean > 0.7


def test_pauses_are_measured_in_units_of_the_truth():
    video = build(VideoConfig, CONFIG.video, "video")
    clips = list(records(build(SyntheticConfig, CONFIG.data, "data"), video, "test", 16))
    rendered = np.stack([clip["video"] for clip in clips])
    found = lip_sync.pauses(clips, rendered, "")
    paused = [lip_sync._pauses(clip["opening"]) for clip in clips]
    assert found["opening_in_pauses"].clips == sum(bool(frames[1:].any()) for frames in paused)
    assert abs(found["opening_in_pauses"].mean) < 0.05
    speech = [
        clip["opening"][1:][~frames[1:]].mean()
        for clip, frames in zip(clips, paused, strict=True)
        if frames[1:].any()
    ]
    assert abs(found["opening_in_speech"].mean - np.mean(speech)) < 0.05
    still = np.repeat(rendered[:, :1], video.num_frames, axis=1)
    assert abs(lip_sync.pauses(clips, still, "")["opening_in_pauses_over_speech"].mean - 1) < 1e-6


def test_a_pause_lasts_four_frames():
    opening = np.array([0.0, 0.01, 0.2, 0.0, 0.0, 0.0, 0.04, 0.3, 0.0, 0.0, 0.0])
    assert np.flatnonzero(lip_sync._pauses(opening)).tolist() == [3, 4, 5, 6]


def generating_once(held_out):
    """The same clips, whose videos are generated once for equal settings."""
    generate, videos = held_out.generate, {}

    def find_or_generate(examples, description, **settings):
        assert examples is held_out.encoded
        config = replace(held_out.config, **settings)
        if config not in videos:
            videos[config] = generate(examples, description, **settings)
        return videos[config]

    held_out.generate = find_or_generate
    return held_out


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_sampling")
def test_controls_keep_identity_and_scale_motion(pipeline, monkeypatch):
    monkeypatch.setattr(controls, "SETTINGS", (0.0, 0.5, 1.0))
    held_out = generating_once(held_out_clips(pipeline, 64))
    # The picture in every frame of the condition keeps the identity, and leaves the adapter nothing to add.
    found = controls.identity(held_out)
    assert found["identity"].mean > 0.97
    assert abs(found["identity_gained"].mean) < 0.01
    for result in controls.motions(held_out).values():
        assert result["rank_correlation"] == 1
        assert np.ptp([sync.mean for sync in result["lip_sync"]]) < 0.05


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    output = tmp_path / "demo.mp4"
    files = [f"--image={PORTRAIT}", f"--audio={SPEECH}", f"--output={output}"]
    main([f"--config={ROOT / 'configs/tiny.py'}", *files])
    video.main([str(output), f"--image={PORTRAIT}", f"--json={tmp_path / 'figures.json'}"])
    assert "correlation with energy" in capsys.readouterr().out
    frames, fps = media.read_video(output)
    assert frames.shape == (17, 64, 64, 3)
    assert fps == 25
    assert psnr(frames[0], np.asarray(media.read_image(PORTRAIT))) > 25


def test_windowed_rms_is_high_where_the_audio_is():
    waveform = np.zeros(16000, np.float32)
    waveform[8000:9600] = 0.5 * np.sin(np.arange(1600))
    energy = windowed_rms(waveform, 25, 25)
    assert energy.argmax() in (12, 13, 14)
    assert energy[:11].max() < 1e-6
    assert energy.max() == pytest.approx(0.5 / np.sqrt(2), rel=0.05)
    assert windowed_rms(waveform[:100], 25, 25).shape == (25,)


def test_figure_has_mean_and_standard_error():
    three = figure([1.0, 2.0, 3.0])
    assert (three.mean, three.clips) == (2.0, 3)
    assert three.standard_error == pytest.approx(1 / np.sqrt(3))
    assert figure([1.0]).standard_error == 0


def test_a_clip_is_compared_with_its_driver(tmp_path):
    data, sizes = (
        build(x, CONFIG[name], name) for x, name in ((SyntheticConfig, "data"), (VideoConfig, "video"))
    )
    one, other = records(data, sizes, "test", 2)
    for clip, name in ((one, "driver"), (other, "other")):
        media.write_video(tmp_path / f"{name}.mp4", clip["video"], 25)
    clip = [str(tmp_path / "driver.mp4"), f"--json={tmp_path / 'figures.json'}"]

    def followed(driver):
        video.main([*clip, f"--driver={tmp_path / driver}"])
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert "correlation_with_energy" not in figures  # it is silent
        return figures["correlation_with_driver"]

    assert followed("driver.mp4") == pytest.approx(1)
    assert followed("other.mp4") < 0.9


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        (["none.mp4"], MediaError, "none.mp4"),
        (["{demo}", "--driver=none.mp4"], MediaError, "none.mp4"),
        (["{demo}", f"--driver={PORTRAIT}"], MediaError, "portrait.png: has 1 frame"),
        (["{demo}", "--driver={demo}", "--driver_face=0.1,0.2"], ConfigError, "--driver_face"),
        ([str(PORTRAIT)], MediaError, "portrait.png"),
        (["{demo}", "--face=0.1,0.2"], ConfigError, "--face"),
        (["{demo}", "--face=0.5,0,0.2,1"], ConfigError, "--face"),
    ],
)
def test_errors_of_the_video_evaluation(arguments, error, named, tmp_path):
    demo = tmp_path / "demo.mp4"
    media.write_video(demo, np.zeros((5, 64, 64, 3), np.uint8), 25, audio=SPEECH)
    with pytest.raises(error, match=named):
        video.main([argument.format(demo=demo) for argument in arguments])


@pytest.mark.parametrize(("module", "clips"), [(lip_sync, "0"), (controls, "1"), (lip_sync, "many")])
def test_too_few_clips_are_an_error_of_the_command_line(module, clips, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main([f"--config={ROOT / 'configs/tiny.py'}", f"--clips={clips}"])
    assert stopped.value.code == 2
    assert "--clips" in capsys.readouterr().err
