"""The miniature's networks, one row each, where they differ from those of the full-size system.

Their exported files are for these networks alone, so none is detected.
"""

from dataclasses import replace

from fantasy_jax.convert.rules import Rule, affine
from fantasy_jax.convert.vae import official_rules
from fantasy_jax.miniature.audio import RotaryAudioAdapter, RotaryAudioAdapterConfig
from fantasy_jax.miniature.vae import MiniatureVAE, MiniatureVAEConfig
from fantasy_jax.system.components import AUDIO_ADAPTER
from fantasy_jax.system.registry import Component, Download, Layout, register

_SHORTCUT = ("encode_first", "encode_chunk", "decode_first", "decode_chunk")


def vae_rules(config: MiniatureVAEConfig) -> list[Rule]:
    """Keys of Wan2.1's VAE, and PyTorch's names for the linear shortcut."""
    shortcut = (rule for name in _SHORTCUT for rule in affine(f"shortcut.{name}", f"shortcut/{name}"))
    return [*official_rules(config), *shortcut]


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
