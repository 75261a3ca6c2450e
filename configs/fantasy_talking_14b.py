"""FantasyTalking on Wan2.1-I2V-14B, with the defaults of the official script.

A picture of at most 512 pixels, up to 81 frames at 23 a second, 30 steps of three evaluations each. The
folder of weights is made by `convert_weights.py import` from the files as they are downloaded, and named by
`sample.py --weights`. Nothing here has yet been timed with the real weights; the official script takes 15.5
seconds a step on an A100, at 512 x 512 x 81.

As it stands, it samples from the released weights, which hear and do no more, and trains their audio adapter.
The paper's whole method, which nobody has released weights of, is trained with

    fantasy_talking_14b.py:full          all adapters; the base is frozen
    fantasy_talking_14b.py:lora          all adapters, and a LoRA beside the base's linear layers
    fantasy_talking_14b.py:everything    all weights

and sampled from with the same. Adapters that the store lacks start anew.

`fantasy_talking_14b.py:debug` is the same path, every network of it, with random weights of small sizes:
at most 64 pixels, 9 frames, half a minute on two CPU cores. What it makes is noise.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from fantasy_jax.config import ConfigError, to_config_dict
from fantasy_jax.data.prepare.config import PrepareConfig
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
from fantasy_jax.sharding import MeshConfig
from fantasy_jax.training.loop import LoopConfig
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.parameters import EVERYTHING, Rules
from fantasy_jax.training.stages import StagesConfig
from fantasy_jax.training.talking import TalkingStageConfig

NEGATIVE_PROMPT = (
    "人物静止不动，静止，色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def get_config(variant: str = "") -> ConfigDict:
    """All settings of the full-size system; the module says what the variants are."""
    if variant not in ("", "full", "lora", "everything", "debug"):
        raise ConfigError(
            f"fantasy_talking_14b.py:{variant}: no such variant; use full, lora, everything or debug"
        )
    # One branch of guidance after another, as the official script has it: at this size each fills a device.
    sample = SampleConfig(negative_prompt=NEGATIVE_PROMPT, batch_branches=False)
    if variant == "everything":
        train = training(EVERYTHING, clips=32)
    else:
        train = training(LORA if variant == "lora" else ADAPTERS, clips=16)
    if variant == "debug":
        sample = replace(sample, steps=3, longest_edge=64, max_frames=9)
        train = replace(train, mesh=MeshConfig())
        prepare = PrepareConfig(size=(64, 64))
        return to_config_dict(
            {"weights": "", "model": small_model(), "sample": sample, "prepare": prepare, "train": train}
        )
    model = ModelConfig()
    if variant:
        model = replace(
            model,
            motion_adapter=MotionAdapterConfig(),
            identity_adapter=IdentityAdapterConfig(),
            face_encoder=FaceEncoderConfig(),
        )
    return to_config_dict(
        {
            "weights": "weights/fantasy_talking_14b",
            "model": model,
            "sample": sample,
            "prepare": PrepareConfig(),
            "train": train,
        }
    )


ADAPTERS = (("^adapters/", "trained"), ("", "frozen"))
# Every linear layer of the blocks, as musubi-tuner has it for Wan2.1 (`networks/lora_wan.py`). Attention
# alone, as in diffusers' examples, would leave out the MLPs, a third of the weights.
LORA = (("^adapters/", "trained"), ("^blocks/.*kernel$", "lora"), ("", "frozen"))


def training(parameters: Rules, clips: int) -> StagesConfig:
    """Both stages, for slices of as many chips as clips, or a multiple: what is left shares each clip.

    The paper says 80,000 steps of the first stage and 20,000 of the second on 64 A100s, learning rate 1e-4,
    dropout 0.1, lips with probability 0.8. The rest are choices:

    - A batch of as many clips as share parameters, so that each has its own; more with `accumulate`.
    - A warm-up of 1,000 steps, about what a second moment of 0.999 looks back on; then a cosine, for the
      number of steps is known.
    - A running mean over 2,000 steps (0.9995): a fortieth of the first stage, a tenth of the second.
    - Noise levels even and shifted by 5, those that the official sampler visits.
    - Losses of held-out clips every 500 steps, and no samples, which take minutes; `show_every` makes some.
    """
    stage = TalkingStageConfig(
        batch_size=clips,
        parameters=parameters,
        # What attention makes is costly to make anew, and little to keep.
        saved=("self_attention", "cross_attention"),
        shift=5.0,
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup=1000, beta2=0.999, average=0.9995),
    )
    return StagesConfig(
        loop=LoopConfig(save_every=500, show_every=0, workers=4, keep_every=5000),
        mesh=MeshConfig(fsdp=clips, context=-1),
        clip_stage=replace(stage, audio="clip", steps=80_000),
        frame_stage=replace(stage, audio="frame", steps=20_000, lip_probability=0.8),
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
