"""The networks of the full-size system, one row each (see `system.registry.Component`)."""

from collections.abc import Callable
from functools import partial

import numpy as np

from fantasy_jax.convert import (
    arcface,
    clip_vision,
    identity,
    motion,
    motion_encoder,
    portrait,
    tiny_decoder,
    umt5,
    vae,
    wan,
    wav2vec2,
)
from fantasy_jax.models.adapters.audio import AudioAdapter, AudioAdapterConfig
from fantasy_jax.models.adapters.expression import ExpressionAdapter, ExpressionAdapterConfig
from fantasy_jax.models.adapters.identity import IdentityAdapter, IdentityAdapterConfig
from fantasy_jax.models.adapters.motion import MotionAdapter, MotionAdapterConfig
from fantasy_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from fantasy_jax.models.face_encoder import IRESNET50, FaceEncoder, FaceEncoderConfig
from fantasy_jax.models.lora import LoRA, LoRASizes
from fantasy_jax.models.motion_encoder import MotionEncoder, MotionEncoderConfig
from fantasy_jax.models.tiny_decoder import TinyDecoder, TinyDecoderConfig
from fantasy_jax.models.umt5 import UMT5Config, UMT5Encoder
from fantasy_jax.models.vae import VAEConfig, WanVAE
from fantasy_jax.models.wan import WanConfig, WanTransformer
from fantasy_jax.models.wav2vec2 import WAV2VEC2_LARGE, Wav2Vec2Config, Wav2Vec2Model
from fantasy_jax.system.encoders import MOTION_BATCH
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.registry import Component, Download, InputSpec, Layout, register
from fantasy_jax.video import VideoConfig

WAN_DOWNLOAD = partial(Download, repository="Wan-AI/Wan2.1-I2V-14B-720P", folder="Wan2.1-I2V-14B-720P")
_IN_TRANSFORMER = {name: f"transformer.{name}" for name in ("num_heads", "num_layers")}


def _images(slot: str, count: int = 1) -> Callable[[ModelConfig, VideoConfig], list[InputSpec]]:
    """The input of an encoder of images."""

    def inputs(model: ModelConfig, video: VideoConfig) -> list[InputSpec]:
        size = model.networks[slot].image_size
        return [((count, size, size, 3), np.float32)]

    return inputs


TRANSFORMER = register(
    Component(
        "wan2.1_i2v_dit",
        "transformer",
        WanTransformer,
        {"wan2.1_i2v_14b": WanConfig()},
        wan.config_from_reference,
        (
            Layout("official", ("patch_embedding.weight", "head.modulation"), wan.official_rules),
            Layout("diffusers", ("patch_embedding.weight", "scale_shift_table"), wan.diffusers_rules),
        ),
        prefix="dit.",
        equal={
            "text_dim": "text_encoder.dim",
            "image_dim": "image_encoder.dim",
            "latent_channels": "vae.latent_channels",
            "condition_channels": "vae.condition_channels",
        },
        download=WAN_DOWNLOAD(
            patterns=("diffusion_pytorch_model*", "config.json"),
            wan_files={
                "official": "diffusion_pytorch_model.safetensors.index.json",
                "diffusers": "transformer",
            },
            option="transformer",
            help="file or folder of the transformer, instead of that of --wan",
        ),
    )
)
AUDIO_ADAPTER = register(
    Component(
        "fantasytalking",
        "audio_adapter",
        AudioAdapter,
        {"fantasytalking": AudioAdapterConfig()},
        wan.audio_config_from_reference,
        (
            # Read by ComfyUI (kijai/ComfyUI-WanVideoWrapper), which merges it with the transformer's file.
            Layout(
                "comfyui",
                ("proj_model.proj.weight", "blocks.0.cross_attn.k_proj.weight"),
                partial(wan.audio_adapter_rules, processor="blocks.{layer}.cross_attn"),
            ),
            Layout("official", ("proj_model.proj.weight", "proj_model.norm.weight"), wan.audio_adapter_rules),
        ),
        prefix="fantasytalking.",
        equal={
            **_IN_TRANSFORMER,
            "width": "transformer.dim",
            "feature_width": "speech_encoder.hidden_size",
        },
        adapter="audio",
        download=Download(
            "acvlab/FantasyTalking",
            ("fantasytalking_model.ckpt",),
            option="fantasytalking",
            help="file of the FantasyTalking audio adapter, .ckpt or .safetensors",
        ),
    )
)
MOTION_ADAPTER = register(
    Component(
        "motion_adapter",
        "motion_adapter",
        MotionAdapter,
        {"motion_adapter": MotionAdapterConfig()},
        None,
        (Layout("official", ("face_in.weight", "body_in.weight"), motion.official_rules),),
        equal={"width": "transformer.dim"},
        adapter="motion",
    )
)
IDENTITY_ADAPTER = register(
    Component(
        "identity_adapter",
        "identity_adapter",
        IdentityAdapter,
        {"identity_adapter": IdentityAdapterConfig()},
        None,
        (Layout("official", ("queries", "layers.0.key.weight"), identity.official_rules),),
        equal={
            **_IN_TRANSFORMER,
            "width": "transformer.dim",
            "feature_width": "face_encoder.feature_width",
            "feature_size": "face_encoder.feature_size",
        },
        adapter="identity",
    )
)
EXPRESSION_ADAPTER = register(
    Component(
        "fantasyportrait_adapter",
        "expression_adapter",
        ExpressionAdapter,
        {"fantasyportrait": ExpressionAdapterConfig()},
        portrait.config_from_reference,
        (
            # Read by ComfyUI (kijai/ComfyUI-WanVideoWrapper), from one file with the motion encoder.
            Layout(
                "comfyui",
                (
                    "proj_model.headpose_proj.weight",
                    "ip_adapter.blocks.0.cross_attn.ip_adapter_single_stream_k_proj.weight",
                ),
                partial(portrait.official_rules, processor="ip_adapter.blocks.{layer}.cross_attn"),
            ),
            Layout("official", ("proj_model.headpose_proj.weight",), portrait.official_rules),
        ),
        prefix="fantasyportrait.",
        equal={
            **_IN_TRANSFORMER,
            "width": "transformer.dim",
            "feature_width": "motion_encoder.num_features",
        },
        adapter="expression",
        download=Download(
            "acvlab/FantasyPortrait",
            ("fantasyportrait_model.ckpt",),
            option="fantasyportrait",
            help="file of the FantasyPortrait expression adapter, .ckpt or .safetensors; ComfyUI's holds "
            "the motion encoder, too",
        ),
    )
)
VAE = register(
    Component(
        "wan_vae",
        "vae",
        WanVAE,
        {"wan2.1_vae": VAEConfig()},
        vae.config_from_reference,
        (
            Layout("official", ("decoder.head.0.gamma",), vae.official_rules),
            Layout("diffusers", ("decoder.norm_out.gamma",), vae.diffusers_rules),
        ),
        download=WAN_DOWNLOAD(
            patterns=("Wan2.1_VAE.pth",),
            wan_files={"official": "Wan2.1_VAE.pth", "diffusers": "vae"},
            option="vae",
            help="file or folder of the VAE, likewise",
        ),
    )
)
TEXT_ENCODER = register(
    Component(
        "umt5_encoder",
        "text_encoder",
        UMT5Encoder,
        {"umt5_xxl": UMT5Config()},
        umt5.config_from_reference,
        (
            Layout("official", ("token_embedding.weight", "blocks.0.ffn.gate.0.weight"), umt5.official_rules),
            Layout("transformers", ("shared.weight",), umt5.transformers_rules),
            Layout("GGUF", ("token_embd.weight", "enc.blk.0.attn_q.weight"), umt5.gguf_rules),
        ),
        umt5.ignored_keys,
        # Two prompts, the positive and the negative one.
        inputs=lambda model, video: [((2, model.transformer.text_length), np.int32), ((2,), np.int32)],
        download=WAN_DOWNLOAD(
            patterns=("models_t5_*.pth", "google/umt5-xxl/*"),
            wan_files={"official": "models_t5_umt5-xxl-enc-bf16.pth", "diffusers": "text_encoder"},
            wan_tokenizer={"official": "google/umt5-xxl", "diffusers": "tokenizer"},
            tokenizer_key=umt5.SENTENCEPIECE,
            option="text_encoder",
            help="file or folder of the text encoder, likewise",
        ),
    )
)
IMAGE_ENCODER = register(
    Component(
        "clip_vision",
        "image_encoder",
        CLIPVisionModel,
        {"clip_vit_h14": CLIPVisionConfig()},
        clip_vision.config_from_reference,
        (
            Layout("official", ("visual.cls_embedding",), clip_vision.official_rules),
            Layout(
                "official without visual.", ("cls_embedding",), partial(clip_vision.official_rules, prefix="")
            ),
            *(
                Layout(
                    f"transformers{' 5' * (not prefix)}",
                    (f"{prefix}embeddings.class_embedding",),
                    partial(clip_vision.transformers_rules, prefix=prefix),
                )
                for prefix in ("vision_model.", "")
            ),
        ),
        clip_vision.ignored_keys,
        inputs=_images("image_encoder"),
        download=WAN_DOWNLOAD(
            patterns=("models_clip_*.pth",),
            wan_files={
                "official": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
                "diffusers": "image_encoder",
            },
            option="image_encoder",
            help="file or folder of the image encoder, likewise",
        ),
    )
)
SPEECH_ENCODER = register(
    Component(
        "wav2vec2",
        "speech_encoder",
        Wav2Vec2Model,
        {"wav2vec2_base_960h": Wav2Vec2Config(), "wav2vec2_large_960h_lv60_self": WAV2VEC2_LARGE},
        wav2vec2.config_from_reference,
        tuple(
            Layout(
                f"transformers{' with a head' * bool(prefix)}{', old weight norm' * (length == 'weight_g')}",
                (f"{prefix}encoder.layer_norm.weight", f"{prefix}encoder.pos_conv_embed.conv.{length}"),
                partial(wav2vec2.official_rules, keys=(f"{prefix}encoder.pos_conv_embed.conv.{length}",)),
            )
            for prefix in ("wav2vec2.", "")
            for length in ("weight_g", "parametrizations.weight.original0")
        ),
        wav2vec2.ignored_keys,
        inputs=lambda model, video: [((1, video.num_samples), np.float32)],
        download=Download(
            "facebook/wav2vec2-base-960h",
            ("*.json", "model.safetensors"),
            "wav2vec2-base-960h",
            option="wav2vec2",
            metavar="DIR",
            help="folder of a wav2vec2 model of transformers",
        ),
    )
)
FACE_ENCODER = register(
    Component(
        "arcface",
        "face_encoder",
        FaceEncoder,
        {"iresnet50": IRESNET50, "iresnet100": FaceEncoderConfig()},
        None,
        # The sizes differ in depth only: the deeper one is detected by a block that the other does not have.
        tuple(
            Layout(name, (f"layer3.{block}.conv1.weight", "features.running_mean"), arcface.official_rules)
            for name, block in (("official 100", 29), ("official", 0))
        ),
        arcface.ignored_keys,
        dtype="float32",
        inputs=_images("face_encoder"),
        download=Download(
            option="arcface",
            help="file of insightface's IResNet-50 or -100: backbone.pth, or the .onnx of its packages",
        ),
    )
)
MOTION_ENCODER = register(
    Component(
        "pdfgc_motion_encoder",
        "motion_encoder",
        MotionEncoder,
        {"pd_fgc": MotionEncoderConfig()},
        motion_encoder.config_from_reference,
        (
            Layout(
                "official",
                ("model.m0.b2_plus_1.conv1.weight", "to_headpose.0.weight"),
                motion_encoder.official_rules,
            ),
        ),
        prefix="pd_fpg.",
        dtype="float32",
        inputs=_images("motion_encoder", MOTION_BATCH),
        download=Download(
            "acvlab/FantasyPortrait",
            ("pd_fpg.pth",),
            option="pd_fpg",
            help="file of PD-FGC's motion encoder, .pth or .safetensors",
        ),
    )
)
LORA = register(
    Component(
        "lora",
        "lora",
        LoRA,
        {"none": LoRASizes()},
        None,
        # It is stored and exported as a network. No file is detected as one: files do not hold its sizes.
        # Those of other programs are read as they are (`convert.lora`), such as this one for four steps.
        (Layout("comfyui", (), wan.lora_rules),),
        download=Download(
            "lightx2v/Wan2.1-I2V-14B-480P-StepDistill-CfgDistill-Lightx2v",
            ("loras/Wan21_I2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors",),
        ),
    )
)
PREVIEW_DECODER = register(
    Component(
        "taew2_1",
        "preview_decoder",
        TinyDecoder,
        {"taew2_1": TinyDecoderConfig()},
        None,
        (Layout("official", ("decoder.1.weight", "decoder.3.conv.0.weight"), tiny_decoder.official_rules),),
        tiny_decoder.ignored_keys,
        equal={"latent_channels": "vae.latent_channels"},
        download=Download(
            "Kijai/WanVideo_comfy",
            ("taew2_1.safetensors",),
            option="preview_decoder",
            help="file of TAEW2.1, taew2_1.pth or .safetensors, which decodes previews",
        ),
    )
)
