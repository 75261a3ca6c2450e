"""Previews of clips while they are sampled."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_networks

from configs.fantasy_talking_14b import small_model
from fantasy_jax import FantasyTalkingPipeline
from fantasy_jax.diffusion import sampler
from fantasy_jax.media import read_video
from fantasy_jax.models.tiny_decoder import TinyDecoderConfig
from fantasy_jax.pipelines.base import StepProgress
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.pipelines.output import VideoOutput
from fantasy_jax.pipelines.previews import PreviewFiles
from fantasy_jax.sharding import MeshConfig
from fantasy_jax.system.streaming import StreamingDecoder
from fantasy_jax.video import VideoConfig

TINY_DECODER = TinyDecoderConfig(widths=(8, 6, 4, 4), num_blocks=1)
SPEECH = (0.1 * np.sin(np.arange(16_000) / 10)).astype(np.float32)
PORTRAIT = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)


def progress(step, num_steps=30):
    frames, latents = np.full((5, 16, 16, 3), 8 * step, np.uint8), jnp.zeros((1, 2, 2, 2, 16))
    preview = VideoOutput(lambda: iter(frames), latents, 5, 25)
    return StepProgress("Transformer", step, num_steps, None, latents, preview)


def test_a_file_every_few_steps_which_replaces_none(tmp_path, capsys):
    for _ in range(2):
        files = PreviewFiles(tmp_path / "new", "talk")
        for step in range(1, 31):
            files(progress(step))
    assert capsys.readouterr().out.count("Wrote ") == 10
    names = [f"talk_step_{step:02}{again}" for step in (5, 10, 15, 20, 25) for again in ("", "_2")]
    found = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert found == sorted(f"{name}.{kind}" for name in names for kind in ("mp4", "png"))
    assert abs(read_video(tmp_path / "new/talk_step_20_2.mp4")[0].mean() - 160) < 4


@pytest.mark.parametrize(
    ("every", "num_steps", "wanted"), [(None, 4, [1, 2, 3]), (None, 1, []), (3, 7, [3, 6])]
)
def test_steps_with_a_preview(tmp_path, every, num_steps, wanted):
    files = PreviewFiles(tmp_path, "x", every)
    for step in range(1, num_steps + 1):
        files(progress(step, num_steps))
    assert sorted(path.stem for path in tmp_path.glob("*.mp4")) == [f"x_step_{step:02}" for step in wanted]


def test_a_preview_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        PreviewFiles(tmp_path / "file", "talk")(progress(5))
    assert "preview: " in caplog.text


@pytest.mark.slow
def test_previews_change_nothing_and_end_with_the_result():
    model = small_model().replace(preview_decoder=TINY_DECODER)
    mesh = MeshConfig(fsdp=1, context=2)
    config = SampleConfig(num_inference_steps=2, max_seconds=0.5, overlap=1, mesh=mesh)
    networks, video = small_networks(model), VideoConfig(height=32, width=32, num_frames=9)
    pipeline = FantasyTalkingPipeline(networks, video, config)
    plain = pipeline(PORTRAIT, SPEECH)  # several windows
    compiled, previews = sampler.guided_step._cache_size(), []

    def keep(progress):
        assert progress.preview.frames.dtype == np.uint8
        previews.append(progress.preview)

    out = pipeline(PORTRAIT, SPEECH, callback_on_step_end=keep)
    assert sampler.guided_step._cache_size() == compiled
    np.testing.assert_array_equal(out.latents, plain.latents)
    np.testing.assert_array_equal(previews[-1].latents, out.latents)
    assert np.abs(previews[0].latents - out.latents).max() > 1e-3
    for preview in previews:
        decoder = StreamingDecoder(networks["preview_decoder"])
        expected = np.concatenate(list(decoder(jnp.asarray(np.asarray(preview.latents)))))
        assert preview.frames.shape == expected.shape == (13, 32, 32, 3)
        assert np.abs(preview.frames.astype(int) - expected).max() <= 1
