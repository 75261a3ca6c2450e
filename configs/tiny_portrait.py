"""The portrait miniature: the networks of FantasyPortrait's 14B system, small enough for two CPU cores.

Clips of one person have the size of those of `configs/tiny.py`, clips of two are twice as wide. Training on
both begins with VAE and transformer of the talking miniature, or without `train.initial` from scratch:

    .venv/bin/python train.py --config=configs/tiny_portrait.py --workdir=out/portrait \
        --config.train.initial=fantasy_jax/assets/tiny

The weights are in the workdir's folder `portrait/weights`.

`configs/tiny_portrait.py:quick` is the same with fewer clips and steps.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from configs import tiny
from fantasy_jax.config import section, to_config_dict
from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature.ablation import AblationConfig
from fantasy_jax.miniature.face_detector import FaceDetectorConfig
from fantasy_jax.miniature.judge import JudgeConfig
from fantasy_jax.miniature.rotary import RotaryExpressionAdapterConfig
from fantasy_jax.miniature.synthetic import SyntheticConfig
from fantasy_jax.miniature.trainer import MiniatureConfig
from fantasy_jax.models.motion_encoder import MotionEncoderConfig
from fantasy_jax.models.perceiver import ResamplerConfig
from fantasy_jax.pipelines.config import PortraitSampleConfig
from fantasy_jax.pipelines.portrait import BUNDLED
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.training.objective import StageConfig
from fantasy_jax.training.optim import OptimizerConfig


def get_config(variant: str = "") -> ConfigDict:
    """All settings of the portrait miniature; `quick` has fewer clips and steps."""
    if variant not in ("", "quick"):
        raise ConfigError(f"tiny_portrait.py:{variant}: no such variant; there is quick")
    quick, talking = variant == "quick", tiny.get_config(variant)
    stage = StageConfig(
        num_steps=1500 if quick else 6000,
        dropout=0.2,
        timesteps="logit_normal",
        shift=3.0,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
    )
    train = replace(
        section(MiniatureConfig, talking, "train"),
        stages=(stage,),
        people=(1, 2),
        shares=(3.0, 1.0),  # a clip of two people takes twice the time of one person's
        folder="portrait",
    )
    pairs = {"train_pairs": 512, "test_pairs": 32} if quick else {"train_pairs": 2048, "test_pairs": 64}
    data = replace(section(SyntheticConfig, talking, "data"), acting=1.0, **pairs)
    # As for the talking miniature, with a text guidance scale of one a step takes two evaluations.
    sample = PortraitSampleConfig(
        num_inference_steps=12,
        shift=3.0,
        expression_guidance_scale=2.0,
        batch_branches=True,
        windows_per_device=8,
        overlap=2,
        negative_prompt="",
        keep="all",
    )
    return to_config_dict(
        {
            "task": "miniature_portrait",
            "weights": str(BUNDLED),
            "video": talking.video,
            "model": small_model(),
            "sample": sample,
            "data": data,
            "train": train,
            "judge": JudgeConfig(),
            "ablation": AblationConfig(),
        }
    )


def small_model() -> ModelConfig:
    """The talking miniature's networks, with expressions in place of audio, identity and motion."""
    talking = tiny.small_model()
    sizes = talking.transformer
    motion = MotionEncoderConfig(
        width=32, feature_dim=96, emotion_dim=12, landmarks=16, depth=3, image_size=64
    )
    removed = ("audio_adapter", "motion_adapter", "identity_adapter", "speech_encoder", "face_encoder")
    return talking.replace(
        **dict.fromkeys(removed),
        expression_adapter=RotaryExpressionAdapterConfig(
            head_width=motion.pose_dim,
            eye_width=motion.eye_dim,
            emotion_width=motion.emotion_dim,
            mouth_width=motion.feature_dim,
            token_width=128,
            resampler=ResamplerConfig(dim=64, depth=2, num_heads=4, head_dim=16),
            width=sizes.dim,
            num_heads=sizes.num_heads,
            num_layers=sizes.num_layers,
        ),
        motion_encoder=motion,
        face_detector=FaceDetectorConfig(),
    )
