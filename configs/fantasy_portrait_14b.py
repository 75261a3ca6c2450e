"""FantasyPortrait on Wan2.1-I2V-14B, with the defaults of the official scripts.

Pictures of at most 720 pixels, up to 81 frames at 25 frames per second, 30 steps of two passes. The weights
are converted by `convert_weights.py import` and named by `sample.py --weights`.

`fantasy_portrait_14b.py:debug` is the identical path with small random weights: at most 64 pixels and 9
frames. Its output is noise.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from fantasy_jax.config import to_config_dict
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.adapters.expression import ExpressionAdapterConfig
from fantasy_jax.models.clip_vision import CLIPVisionConfig
from fantasy_jax.models.motion_encoder import MotionEncoderConfig
from fantasy_jax.models.perceiver import ResamplerConfig
from fantasy_jax.models.umt5 import UMT5Config
from fantasy_jax.models.vae import VAEConfig
from fantasy_jax.models.wan import WanConfig
from fantasy_jax.pipelines.config import PortraitSampleConfig
from fantasy_jax.prepare.config import PortraitPrepareConfig
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.video import VideoConfig


def get_config(variant: str = "") -> ConfigDict:
    """All settings of the full-size system, or with the variant `debug` of a small one."""
    if variant not in ("", "debug"):
        raise ConfigError(f"fantasy_portrait_14b.py:{variant}: no such variant; use debug")
    debug = variant == "debug"
    sample = PortraitSampleConfig()
    size = 64 if debug else 720
    return to_config_dict(
        {
            "task": "portrait",
            "weights": "" if debug else "weights/fantasy_portrait_14b",
            "video": VideoConfig(height=size, width=size, num_frames=9 if debug else 81, fps=25),
            "model": small_model() if debug else full_size_model(),
            "sample": replace(sample, num_inference_steps=3, overlap=1) if debug else sample,
            "prepare": PortraitPrepareConfig(),
        }
    )


def full_size_model() -> ModelConfig:
    """Wan2.1-I2V-14B with its encoders, the released expression adapter and PD-FGC's motion encoder."""
    return ModelConfig(
        transformer=WanConfig(),
        expression_adapter=ExpressionAdapterConfig(),
        vae=VAEConfig(),
        text_encoder=UMT5Config(),
        image_encoder=CLIPVisionConfig(),
        motion_encoder=MotionEncoderConfig(),
    )


def small_model() -> ModelConfig:
    """Every network of the system, less than five megabytes together."""
    width, heads, layers, text_width, image_width = 48, 4, 2, 32, 32
    motion = MotionEncoderConfig(width=16, feature_dim=24, landmarks=12)
    return ModelConfig(
        transformer=WanConfig(
            dim=width,
            ffn_dim=2 * width,
            frequency_dim=32,
            text_dim=text_width,
            image_dim=image_width,
            num_heads=heads,
            num_layers=layers,
        ),
        expression_adapter=ExpressionAdapterConfig(
            mouth_width=motion.feature_dim,
            token_width=40,
            resampler=ResamplerConfig(dim=32, depth=2, num_heads=2, head_dim=16),
            width=width,
            num_heads=heads,
            num_layers=layers,
        ),
        vae=VAEConfig(dim=8),
        text_encoder=UMT5Config(
            vocab_size=384, dim=text_width, dim_attn=text_width, dim_ffn=64, num_heads=4, num_layers=2
        ),
        image_encoder=CLIPVisionConfig(dim=image_width, num_heads=4, num_layers=3),
        motion_encoder=motion,
        dtype="float32",
    )
