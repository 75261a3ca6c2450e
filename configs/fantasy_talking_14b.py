"""FantasyTalking on Wan2.1-I2V-14B, with the defaults of the official script.

A picture of at most 512 pixels, up to 81 frames at 23 a second, 30 steps of three evaluations each. The
folder of weights is made by `convert_weights.py import` from the files as they are downloaded, and named by
`sample.py --weights`. Nothing here has yet been timed with the real weights; the official script takes 15.5
seconds a step on an A100, at 512 x 512 x 81.

`fantasy_talking_14b.py:debug` is the same path, every network of it, with random weights of small sizes:
at most 64 pixels, 9 frames, half a minute on two CPU cores. What it makes is noise.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from fantasy_jax.config import ConfigError, to_config_dict
from fantasy_jax.models.adapters.audio import AudioAdapterConfig
from fantasy_jax.models.clip_vision import CLIPVisionConfig
from fantasy_jax.models.umt5 import UMT5Config
from fantasy_jax.models.vae import VAEConfig
from fantasy_jax.models.wan import WanConfig
from fantasy_jax.models.wav2vec2 import Wav2Vec2Config
from fantasy_jax.pipeline import ModelConfig, SampleConfig

NEGATIVE_PROMPT = (
    "人物静止不动，静止，色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def get_config(variant: str = "") -> ConfigDict:
    """All settings of the full-size system, or of the one that is small: `debug`."""
    if variant not in ("", "debug"):
        raise ConfigError(f"fantasy_talking_14b.py:{variant}: no such variant; there is debug")
    # One branch of guidance after another, as the official script has it: at this size each fills a device.
    sample = SampleConfig(negative_prompt=NEGATIVE_PROMPT, batch_branches=False)
    if variant == "debug":
        sample = replace(sample, steps=3, longest_edge=64, max_frames=9)
        return to_config_dict({"weights": "", "model": small_model(), "sample": sample})
    return to_config_dict(
        {"weights": "weights/fantasy_talking_14b", "model": ModelConfig(), "sample": sample}
    )


def small_model() -> ModelConfig:
    """Every network of the system, less than five megabytes together."""
    width, heads, layers, text_width, image_width, speech_width = 48, 4, 2, 32, 32, 24
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
        audio_adapter=AudioAdapterConfig(
            feature_width=speech_width, token_width=40, width=width, num_heads=heads, num_layers=layers
        ),
        vae=VAEConfig(dim=8),
        text_encoder=UMT5Config(
            vocab_size=384, dim=text_width, dim_attn=text_width, dim_ffn=64, num_heads=4, num_layers=2
        ),
        image_encoder=CLIPVisionConfig(dim=image_width, num_heads=4, num_layers=3),
        speech_encoder=Wav2Vec2Config(
            hidden_size=speech_width,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=48,
            conv_dim=(16,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        dtype="float32",
    )
