"""The miniature's networks, one row each, where they differ from those of the full-size system.

Their exported files are for these networks alone, so none is detected.
"""

from dataclasses import replace

from fantasy_jax.convert.rules import Rule, affine
from fantasy_jax.convert.vae import CONV_IN_FRAME, official_rules
from fantasy_jax.miniature.audio import RotaryAudioAdapter, RotaryAudioAdapterConfig
from fantasy_jax.miniature.vae import MiniatureVAE, MiniatureVAEConfig
from fantasy_jax.system.components import AUDIO_ADAPTER
from fantasy_jax.system.registry import Component, Download, Layout, register

_SHORTCUT = ("encode_first", "encode_chunk", "decode_first", "decode_chunk")


def vae_rules(config: MiniatureVAEConfig) -> list[Rule]:
    """Keys of Wan2.1's VAE, and PyTorch's names for the linear shortcut and the refiner."""
    rules = official_rules(config)
    for name in _SHORTCUT:
        rules += affine(f"shortcut.{name}", f"shortcut/{name}")
    for name in ("conv_in", "middle.0", "middle.1", "conv_out") if config.refiner else ():
        rules += affine(f"refiner.{name}", f"refiner/{name.replace('.', '/')}", CONV_IN_FRAME)
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
register(
    replace(
        AUDIO_ADAPTER,
        name="rotary_audio_adapter",
        network=RotaryAudioAdapter,
        presets={"miniature": RotaryAudioAdapterConfig()},
        from_json=None,
        layouts=tuple(replace(layout, signature=()) for layout in AUDIO_ADAPTER.layouts),
        prefix="",
        download=Download(),
    )
)
