"""FantasyPortrait on Wan2.1-I2V-14B, with the defaults of the official scripts.

Pictures of at most 720 pixels, up to 81 frames at 25 frames per second, 30 steps of two passes. The weights
are converted by `convert_weights.py import` and named by `sample.py --weights`.

Without a variant it samples from the released weights. It is trained, on clips of one person and of several,
with

    fantasy_portrait_14b.py:adapters    the expression adapter; the base model is frozen
    fantasy_portrait_14b.py:lora        the adapter, and a LoRA of the base model
    fantasy_portrait_14b.py:full        all weights

which start from the store's adapter, or initialise it where the store has none.

`fantasy_portrait_14b.py:debug` is the identical path with small random weights: at most 64 pixels and 9
frames. Its output is noise.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from configs.fantasy_talking_14b import ADAPTERS, LORA
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
from fantasy_jax.sharding import MeshConfig
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.training.loop import LoopConfig
from fantasy_jax.training.objective import StageConfig
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.parameters import ALL_TRAINED, ParameterRules
from fantasy_jax.training.stages import StagesConfig
from fantasy_jax.video import VideoConfig

VARIANTS = ("", "adapters", "lora", "full", "debug")


def get_config(variant: str = "") -> ConfigDict:
    """All settings of the full-size system; the module's docstring describes the variants."""
    if variant not in VARIANTS:
        raise ConfigError(
            f"fantasy_portrait_14b.py:{variant}: no such variant; use {', '.join(VARIANTS[1:])}"
        )
    debug = variant == "debug"
    sample = PortraitSampleConfig()
    rules = {"lora": LORA, "full": ALL_TRAINED}.get(variant, ADAPTERS)
    train = training(rules, batch_size=32 if variant == "full" else 16)
    size = 64 if debug else 720
    return to_config_dict(
        {
            "task": "portrait",
            "weights": "" if debug else "weights/fantasy_portrait_14b",
            "video": VideoConfig(height=size, width=size, num_frames=9 if debug else 81, fps=25),
            "model": small_model() if debug else full_size_model(),
            "sample": replace(sample, num_inference_steps=3, overlap=1) if debug else sample,
            "prepare": PortraitPrepareConfig(),
            "train": replace(train, mesh=MeshConfig()) if debug else train,
        }
    )


def training(parameters: ParameterRules, batch_size: int) -> StagesConfig:
    """The only stage, for slices of `batch_size` chips or a multiple.

    The remaining chips form the `context` axis and shard each clip's sequence.

    The paper (arXiv 2507.12956) gives one stage on clips of one person and of several, 24 A100s for three
    days, learning rate 1e-4, logit-normal noise levels, dropout 0.2, and the plain loss. The rest are
    choices:

    - Clips of 81 frames of the size that is sampled.
    - 10,000 steps: of 16 clips they are 1.0e21 model operations (`--compile_only`), half of what 24 A100s do
      at their peak rate in three days.
    - Each dataset has its share of the clips; `train.shares` changes it.
    - The noise levels have mean 0 and deviation 1, and are shifted by 5, as the official sampler visits them;
      Stable Diffusion 3, from which the distribution is, shifts them likewise for large images (arXiv
      2403.03206, 5.3.2).
    - Warm-up over 500 steps, an EMA over 1,000 (0.999), a twentieth and a tenth of the stage; cosine decay.
    - The batch size equals the `fsdp` axis; `grad_accum_steps` allows more.
    - Losses of held-out clips every 500 steps, and no samples, which take minutes; `sample_every` makes them.
    """
    stage = StageConfig(
        num_steps=10_000,
        batch_size=batch_size,
        dropout=0.2,
        timesteps="logit_normal",
        shift=5.0,
        parameters=parameters,
        # Expensive to recompute and small to save; of the MLP's output where all weights are trained.
        remat_save_names=("self_attention", "cross_attention", "mlp"),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=500, beta2=0.999, ema_decay=0.999),
    )
    return StagesConfig(
        loop=LoopConfig(save_every=500, sample_every=0, num_workers=4, keep_every=5000),
        mesh=MeshConfig(fsdp=batch_size, context=-1),
        stages=(stage,),
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
