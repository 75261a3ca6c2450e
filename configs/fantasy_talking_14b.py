"""FantasyTalking on Wan2.1-I2V-14B, with the defaults of the official script.

Images of at most 512 pixels, up to 81 frames at 23 frames per second, 30 steps. The weights are converted by
`convert_weights.py import` and named by `sample.py --weights`. The official script takes 15.5 seconds a step
on an A100, at 512 x 512 x 81.

Without a variant it samples from the released weights and trains their audio adapter. Adapters that the store
lacks are initialised. The paper's whole method, for which there are no released weights, is trained with

    fantasy_talking_14b.py:adapters    all adapters; the base model is frozen
    fantasy_talking_14b.py:lora        all adapters, and a LoRA of the base model
    fantasy_talking_14b.py:full        all weights

and sampled from with the same variant.

`fantasy_talking_14b.py:fast` samples with LightX2V's LoRA for few steps: 4 steps of two passes, in place of
30. The results are not those of the released model. The LoRA is fetched by

    convert_weights.py download --component=lora --output=downloads

and `sample.py --lora=FILE` takes another one.

`fantasy_talking_14b.py:debug` is the identical path with small random weights: at most 64 pixels and 9
frames, half a minute on two CPU cores. Its output is noise.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from fantasy_jax.config import to_config_dict
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.adapters.audio import AudioAdapterConfig
from fantasy_jax.models.adapters.identity import IdentityAdapterConfig
from fantasy_jax.models.adapters.motion import MotionAdapterConfig
from fantasy_jax.models.clip_vision import CLIPVisionConfig
from fantasy_jax.models.face_encoder import FaceEncoderConfig
from fantasy_jax.models.umt5 import UMT5Config
from fantasy_jax.models.vae import VAEConfig
from fantasy_jax.models.wan import WanConfig
from fantasy_jax.models.wav2vec2 import Wav2Vec2Config
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.prepare.config import PrepareConfig
from fantasy_jax.sharding import MeshConfig
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.training.loop import LoopConfig
from fantasy_jax.training.objective import StageConfig
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.parameters import ALL_TRAINED, ParameterRules
from fantasy_jax.training.stages import StagesConfig
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.lora import LoRAFile

VARIANTS = ("", "adapters", "lora", "full", "fast", "debug")


def get_config(variant: str = "") -> ConfigDict:
    """All settings of the full-size system; the module's docstring describes the variants."""
    if variant not in VARIANTS:
        raise ConfigError(f"fantasy_talking_14b.py:{variant}: no such variant; use {', '.join(VARIANTS[1:])}")
    model = full_size_model()
    if variant in ("adapters", "lora", "full"):
        model = model.replace(
            motion_adapter=MotionAdapterConfig(),
            identity_adapter=IdentityAdapterConfig(),
            face_encoder=FaceEncoderConfig(),
        )
    rules = {"lora": LORA, "full": ALL_TRAINED}.get(variant, ADAPTERS)
    train = training(rules, batch_size=32 if variant == "full" else 16)
    video = VideoConfig()
    sample = FAST if variant == "fast" else SampleConfig()
    if variant == "debug":
        model, video = small_model(), VideoConfig(height=64, width=64, num_frames=9)
        sample = replace(sample, num_inference_steps=3, overlap=1)
        train = replace(train, mesh=MeshConfig())
    return to_config_dict(
        {
            "task": "talking",
            "weights": "" if variant == "debug" else "weights/fantasy_talking_14b",
            "video": video,
            "model": model,
            "sample": sample,
            "prepare": PrepareConfig(),
            "train": train,
        }
    )


# Euler steps from noise levels 1, 0.94, 0.83 and 0.63, as the LoRA was distilled for (LightX2V,
# `WanStepDistillScheduler`). It replaces guidance by the prompt; with a scale other than 1, colours burn. The
# scale of the audio is the one of InfiniteTalk with this LoRA (README).
FAST = SampleConfig(
    num_inference_steps=4,
    shift=5.0,
    text_guidance_scale=1.0,
    audio_guidance_scale=2.0,
    loras=(LoRAFile("downloads/loras/Wan21_I2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors"),),
)

ADAPTERS = (("^adapters/", "trained"), ("", "frozen"))
# Every linear layer of the blocks, as in musubi-tuner for Wan2.1 (`networks/lora_wan.py`). Attention alone,
# as in diffusers' examples, would leave out the MLPs, a third of the weights.
LORA = (("^adapters/", "trained"), ("^blocks/.*kernel$", "lora"), ("", "frozen"))


def training(parameters: ParameterRules, batch_size: int) -> StagesConfig:
    """Both stages, for slices of `batch_size` chips or a multiple.

    The remaining chips form the `context` axis and shard each clip's sequence.

    The paper gives 80,000 steps of the first stage and 20,000 of the second on 64 A100s, learning rate 1e-4,
    dropout 0.1, and the lip mask with probability 0.8. The rest are choices:

    - The batch size equals the `fsdp` axis; `grad_accum_steps` allows more.
    - Warm-up over 1,000 steps, about the memory of a second moment with decay 0.999; then cosine decay.
    - An EMA over 2,000 steps (0.9995): a fortieth of the first stage, a tenth of the second.
    - Noise levels uniform and shifted by 5, as the official sampler visits them.
    - Losses of held-out clips every 500 steps, and no samples, which take minutes; `sample_every` makes them.
    """
    stage = StageConfig(
        batch_size=batch_size,
        parameters=parameters,
        # Expensive to recompute and small to save. The MLP's output is saved where gates have gradients: with
        # the motion adapter, and with all weights.
        remat_save_names=("self_attention", "cross_attention", "mlp"),
        shift=5.0,
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1000, beta2=0.999, ema_decay=0.9995),
    )
    return StagesConfig(
        loop=LoopConfig(save_every=500, sample_every=0, num_workers=4, keep_every=5000),
        mesh=MeshConfig(fsdp=batch_size, context=-1),
        stages=(
            replace(stage, audio_attention="clip", num_steps=80_000),
            replace(stage, audio_attention="frame", num_steps=20_000, lip_mask_probability=0.8),
        ),
    )


def full_size_model() -> ModelConfig:
    """Wan2.1-I2V-14B with its encoders and the released audio adapter."""
    return ModelConfig(
        transformer=WanConfig(),
        audio_adapter=AudioAdapterConfig(),
        vae=VAEConfig(),
        text_encoder=UMT5Config(),
        image_encoder=CLIPVisionConfig(),
        speech_encoder=Wav2Vec2Config(),
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
