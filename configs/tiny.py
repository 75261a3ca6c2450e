"""The miniature: everything that the 14B system has, small enough for two CPU cores.

64 x 64 pixels, 17 frames at 25 a second. The weights are random until the miniature is trained, so the
video is noise; the path from picture, speech and prompt to mp4 is the final one, in about half a minute.
"""

from ml_collections import ConfigDict

from fantasy_jax.config import to_config_dict
from fantasy_jax.models.adapters.audio import AudioAdapterConfig
from fantasy_jax.models.clip_vision import CLIPVisionConfig
from fantasy_jax.models.umt5 import UMT5Config
from fantasy_jax.models.vae import VAEConfig
from fantasy_jax.models.wan import WanConfig
from fantasy_jax.pipeline import ModelConfig, SampleConfig

MEL_BANDS = 40


def get_config() -> ConfigDict:
    """All settings of the miniature."""
    width, heads, layers, text_width, image_width = 160, 4, 5, 64, 64
    model = ModelConfig(
        transformer=WanConfig(
            dim=width,
            ffn_dim=4 * width,
            frequency_dim=64,
            text_dim=text_width,
            text_length=64,
            image_dim=image_width,
            num_heads=heads,
            num_layers=layers,
        ),
        audio_adapter=AudioAdapterConfig(
            feature_width=MEL_BANDS, token_width=128, width=width, num_heads=heads, num_layers=layers
        ),
        vae=VAEConfig(dim=16),
        text_encoder=UMT5Config(
            vocab_size=384, dim=text_width, dim_attn=text_width, dim_ffn=128, num_heads=4, num_layers=2
        ),
        image_encoder=CLIPVisionConfig(image_size=56, dim=image_width, num_heads=4, num_layers=3),
        speech_encoder=None,
        dtype="float32",
    )
    sample = SampleConfig(
        steps=12, shift=3.0, prompt_scale=1.0, audio_scale=3.0, longest_edge=64, fps=25, max_frames=17
    )
    return to_config_dict({"model": model, "sample": sample})
