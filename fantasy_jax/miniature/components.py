"""The miniature's networks, one row each, where they differ from those of the full-size system.

Their exported files are for these networks alone, so none is detected.
"""

from dataclasses import replace

import numpy as np

from fantasy_jax.convert.rules import CONV3D, Rule, affine
from fantasy_jax.convert.vae import CONV_IN_FRAME, official_rules
from fantasy_jax.miniature.face_detector import FaceDetectorConfig, MiniatureFaceDetector
from fantasy_jax.miniature.rotary import (
    RotaryAudioAdapter,
    RotaryAudioAdapterConfig,
    RotaryExpressionAdapter,
    RotaryExpressionAdapterConfig,
)
from fantasy_jax.miniature.vae import MiniatureVAE, MiniatureVAEConfig
from fantasy_jax.system.components import AUDIO_ADAPTER, EXPRESSION_ADAPTER
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.registry import Component, Download, InputSpec, Layout, register
from fantasy_jax.video import VideoConfig

_SHORTCUT = ("encode_first", "encode_chunk", "decode_first", "decode_chunk")


def vae_rules(config: MiniatureVAEConfig) -> list[Rule]:
    """Keys of Wan2.1's VAE, and PyTorch's names for the linear shortcut and the refiner."""
    rules = official_rules(config)
    for name in _SHORTCUT:
        rules += affine(f"shortcut.{name}", f"shortcut/{name}")
    for name in ("conv_in", "middle.0", "middle.1", "conv_out") if config.refiner else ():
        rules += affine(f"refiner.{name}", f"refiner/{name.replace('.', '/')}", CONV_IN_FRAME)
    return rules


def _picture(model: ModelConfig, video: VideoConfig) -> list[InputSpec]:
    """A frame of a driving video of one person."""
    size = model.networks["face_detector"].image_size
    return [((1, size, size, 3), np.float32)]


def face_detector_rules(config: FaceDetectorConfig) -> list[Rule]:
    """PyTorch's names for the layers of the face detector."""
    rules = [*affine("stem", "stem", CONV3D), *affine("shrink", "shrink"), *affine("head", "head")]
    for index in range(config.depth):
        rules += affine(f"blocks.{index}", f"blocks/{index}", CONV3D)
    return rules


register(
    Component(
        "miniature_vae",
        "vae",
        MiniatureVAE,
        {"miniature": MiniatureVAEConfig()},
        None,
        (Layout("official", (), vae_rules),),
    )
)
for adapter, network, config in (
    (AUDIO_ADAPTER, RotaryAudioAdapter, RotaryAudioAdapterConfig()),
    (EXPRESSION_ADAPTER, RotaryExpressionAdapter, RotaryExpressionAdapterConfig()),
):
    register(
        replace(
            adapter,
            name=f"rotary_{adapter.slot}",
            network=network,
            presets={"miniature": config},
            from_json=None,
            layouts=tuple(replace(layout, signature=()) for layout in adapter.layouts),
            prefix="",
            download=Download(),
        )
    )
register(
    Component(
        "miniature_face_detector",
        "face_detector",
        MiniatureFaceDetector,
        {"miniature": FaceDetectorConfig()},
        None,
        (Layout("official", (), face_detector_rules),),
        dtype="float32",
        inputs=_picture,
    )
)
