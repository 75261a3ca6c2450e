"""The miniature: everything that the 14B system has, small enough for two CPU cores.

64 x 64 pixels, 17 frames at 25 a second. Sampling takes seconds, from the weights that come with the project.
Training them from nothing takes an hour on two cores:

    python train.py --config=configs/tiny.py --workdir=out/tiny

`configs/tiny.py:quick` is the same with fewer clips and steps.
"""

from dataclasses import replace
from pathlib import Path

from ml_collections import ConfigDict

import fantasy_jax
from fantasy_jax.config import ConfigError, to_config_dict
from fantasy_jax.data.prepare.config import PrepareConfig
from fantasy_jax.data.synthetic import SyntheticConfig
from fantasy_jax.evaluation.video import MIDDLE
from fantasy_jax.models.adapters.audio import AudioAdapterConfig
from fantasy_jax.models.adapters.identity import IdentityAdapterConfig
from fantasy_jax.models.adapters.motion import MotionAdapterConfig
from fantasy_jax.models.clip_vision import CLIPVisionConfig
from fantasy_jax.models.face_encoder import FaceEncoderConfig
from fantasy_jax.models.umt5 import UMT5Config
from fantasy_jax.models.vae import VAEConfig
from fantasy_jax.models.wan import WanConfig
from fantasy_jax.models.wav2vec2 import Wav2Vec2Config
from fantasy_jax.pipeline import ModelConfig, SampleConfig
from fantasy_jax.training.course import TrainConfig
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.talking import TalkingStageConfig
from fantasy_jax.training.vae import VAEStageConfig

WEIGHTS = Path(fantasy_jax.__file__).parent / "assets/tiny"
SPEECH_WIDTH, FACE_WIDTH = 96, 96


def get_config(variant: str = "") -> ConfigDict:
    """All settings of the miniature; `quick` has fewer clips and steps."""
    if variant not in ("", "quick"):
        raise ConfigError(f"tiny.py:{variant}: no such variant; there is quick")
    data = SyntheticConfig()
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup=200)
    train = TrainConfig(
        vae=VAEStageConfig(steps=2000),
        clip_stage=TalkingStageConfig(audio="clip", steps=2000, optimizer=optimizer),
        # A hard mask hurts what lies outside of the lips.
        frame_stage=TalkingStageConfig(
            audio="frame", steps=11000, lip_probability=0.8, outside_lips=0.15, optimizer=optimizer
        ),
    )
    if variant == "quick":
        data = replace(data, train_clips=2048)
        train = replace(
            train,
            speech=replace(train.speech, steps=600),
            face=replace(train.face, steps=200),
            vae=replace(train.vae, steps=600),
            clip_stage=replace(train.clip_stage, steps=1200),
            frame_stage=replace(train.frame_stage, steps=3000),
        )
    # With a prompt scale of one a step takes two evaluations, not three. Faces are livelier than usual:
    # mouths that hardly open are lost at this size.
    sample = SampleConfig(
        steps=12,
        shift=3.0,
        prompt_scale=1.0,
        audio_scale=2.0,
        face_motion=0.7,
        longest_edge=64,
        fps=25,
        max_frames=17,
        face_box=MIDDLE,
    )
    return to_config_dict(
        {
            "weights": str(WEIGHTS),
            "model": small_model(),
            "sample": sample,
            "data": data,
            "prepare": PrepareConfig(size=(64, 64)),
            "train": train,
        }
    )


def small_model() -> ModelConfig:
    """Networks of the same kinds as the real ones."""
    width, heads, layers, text_width, image_width, channels = 160, 4, 5, 64, 64, 32
    return ModelConfig(
        transformer=WanConfig(
            latent_channels=channels,
            condition_channels=channels + 4,
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
            feature_width=SPEECH_WIDTH,
            token_width=128,
            width=width,
            num_heads=heads,
            num_layers=layers,
            rotary=True,
        ),
        motion_adapter=MotionAdapterConfig(hidden=32, positions=4, width=width),
        identity_adapter=IdentityAdapterConfig(
            feature_width=FACE_WIDTH,
            feature_size=4,
            num_queries=8,
            depth=1,
            token_width=96,
            token_heads=4,
            mlp_ratio=2,
            width=width,
            num_heads=heads,
            num_layers=layers,
        ),
        face_encoder=FaceEncoderConfig(
            depths=(1, 1, 1), widths=(24, 48, FACE_WIDTH), embedding=FACE_WIDTH, image_size=32
        ),
        # Twice the real one's channels: a small coder is nearly linear, and packs less into each.
        vae=VAEConfig(
            dim=16,
            latent_channels=channels,
            dim_mult=(1, 2, 2),
            num_res_blocks=1,
            temporal_downsample=(True, True),
            patch=2,
            linear_shortcut=True,
            latent_mean=(0.0,) * channels,
            latent_std=(1.0,) * channels,
        ),
        text_encoder=UMT5Config(
            vocab_size=384, dim=text_width, dim_attn=text_width, dim_ffn=128, num_heads=4, num_layers=2
        ),
        image_encoder=CLIPVisionConfig(image_size=56, dim=image_width, num_heads=4, num_layers=3),
        speech_encoder=Wav2Vec2Config(
            hidden_size=SPEECH_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * SPEECH_WIDTH,
            conv_dim=(48,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        dtype="float32",
    )
