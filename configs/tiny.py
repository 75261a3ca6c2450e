"""The miniature: everything that the 14B system has, small enough for two CPU cores.

64 x 64 pixels, 17 frames at 25 frames per second. Sampling takes seconds, with the weights that come with the
project. Training them from scratch takes two and a half hours on two cores:

    .venv/bin/python train.py --config=configs/tiny.py --workdir=out/tiny

`configs/tiny.py:quick` is the same with fewer clips and steps.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from fantasy_jax.config import to_config_dict
from fantasy_jax.errors import ConfigError
from fantasy_jax.evaluation.video import USUAL_FACE_BOX
from fantasy_jax.miniature.rotary import RotaryAudioAdapterConfig
from fantasy_jax.miniature.synthetic import SyntheticConfig
from fantasy_jax.miniature.train_vae import VAEStageConfig
from fantasy_jax.miniature.trainer import MiniatureConfig
from fantasy_jax.miniature.vae import MiniatureVAEConfig
from fantasy_jax.models.adapters.identity import IdentityAdapterConfig
from fantasy_jax.models.adapters.motion import MotionAdapterConfig
from fantasy_jax.models.clip_vision import CLIPVisionConfig
from fantasy_jax.models.face_encoder import FaceEncoderConfig
from fantasy_jax.models.umt5 import UMT5Config
from fantasy_jax.models.wan import WanConfig
from fantasy_jax.models.wav2vec2 import Wav2Vec2Config
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.pipelines.talking import BUNDLED
from fantasy_jax.prepare.config import PrepareConfig
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.training.objective import StageConfig
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.video import VideoConfig

SPEECH_WIDTH, FACE_WIDTH = 96, 96


def get_config(variant: str = "") -> ConfigDict:
    """All settings of the miniature; `quick` has fewer clips and steps."""
    if variant not in ("", "quick"):
        raise ConfigError(f"tiny.py:{variant}: no such variant; there is quick")
    quick = variant == "quick"
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=200)
    train = MiniatureConfig(
        vae=VAEStageConfig(num_steps=600 if quick else 1500),
        stages=(
            StageConfig(audio_attention="clip", num_steps=600 if quick else 1000, optimizer=optimizer),
            # A hard lip mask degrades what is outside of the lips.
            StageConfig(
                audio_attention="frame",
                num_steps=3000 if quick else 9700,
                lip_mask_probability=0.8,
                outside_lips=0.15,
                optimizer=optimizer,
            ),
        ),
    )
    if quick:
        train = replace(
            train,
            speech=replace(train.speech, num_steps=600),
            face=replace(train.face, num_steps=200),
        )
    # With a text guidance scale of one a step takes two evaluations. Faces are livelier than usual: mouths
    # that hardly open are lost at this size.
    sample = SampleConfig(
        num_inference_steps=12,
        shift=3.0,
        text_guidance_scale=1.0,
        audio_guidance_scale=2.0,
        batch_branches=True,
        windows_per_device=8,
        overlap=2,
        negative_prompt="",
        face_motion=0.7,
        face_box=USUAL_FACE_BOX,
        keep="all",
    )
    return to_config_dict(
        {
            "task": "miniature",
            "weights": str(BUNDLED),
            "video": VideoConfig(height=64, width=64, num_frames=17, fps=25),
            "model": small_model(),
            "sample": sample,
            "data": SyntheticConfig(train_clips=2048) if quick else SyntheticConfig(),
            "prepare": PrepareConfig(),
            "train": train,
        }
    )


def small_model() -> ModelConfig:
    """Networks of the same kinds as at full size."""
    width, heads, layers, text_width, image_width, channels = 192, 4, 5, 64, 64, 32
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
            # A small transformer hardly learns to carry the picture into later frames by attention.
            still_condition=True,
        ),
        audio_adapter=RotaryAudioAdapterConfig(
            feature_width=SPEECH_WIDTH,
            token_width=128,
            width=width,
            num_heads=heads,
            num_layers=layers,
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
        # Twice the channels of Wan2.1's: a small VAE is nearly linear, and each of its channels holds less.
        vae=MiniatureVAEConfig(
            dim=16,
            latent_channels=channels,
            dim_mult=(1, 2, 2),
            num_res_blocks=1,
            temporal_downsample=(True, True),
            patch=2,
            overlap=1,
            refiner=64,
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
