"""The portrait miniature's weights that come with the project."""

from pathlib import Path

import numpy as np
import pytest

from fantasy_jax import media
from fantasy_jax.config import load_config, section
from fantasy_jax.evaluation.metrics import psnr
from fantasy_jax.miniature.acting import FACTORS
from fantasy_jax.miniature.clips import SyntheticConfig
from fantasy_jax.miniature.driven import DrivenClips, draw_own
from fantasy_jax.pipelines.portrait import FantasyPortraitPipeline
from sample import main

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "fantasy_jax/assets/example"
CONFIG = load_config(str(ROOT / "configs/tiny_portrait.py"))


@pytest.mark.slow
def test_mouths_follow_their_own_driver_and_no_other():
    pipeline = FantasyPortraitPipeline.from_pretrained()
    own = draw_own(pipeline.video, section(SyntheticConfig, CONFIG, "data"), count=16)
    clips = DrivenClips(pipeline.networks, pipeline.video, pipeline.config, own)
    following = [*clips.encoded[1:], clips.encoded[0]]
    by_others = [
        one | {"expression": other["expression"]} for one, other in zip(clips.encoded, following, strict=True)
    ]
    driven, misled = (clips.generate(examples, "Clips") for examples in (clips.encoded, by_others))

    openings = [truth["acts"][0, :, FACTORS.index("opening")] for truth in own.truths]
    assert clips.correlation_with(driven, openings).mean > 0.6
    assert clips.correlation_with(misled, openings).mean < 0.2
    first = [psnr(video[0], truth["video"][0]) for video, truth in zip(driven, own.truths, strict=True)]
    assert np.mean(first) > 30


@pytest.mark.slow
def test_two_people_act_as_two_drivers(tmp_path):
    output = tmp_path / "two.mp4"
    drivers = [f"--driver={EXAMPLE / f'driver_{number}.mp4'}" for number in (1, 2)]
    files = [f"--image={EXAMPLE / 'pair.png'}", *drivers, f"--output={output}"]
    main([f"--config={ROOT / 'configs/tiny_portrait.py'}", "--size=64x128", "--seconds=0.68", *files])
    frames, fps = media.read_video(output)
    assert (frames.shape, fps) == ((17, 64, 128, 3), 25)
    assert psnr(frames[0], np.asarray(media.read_image(EXAMPLE / "pair.png"))) > 26
