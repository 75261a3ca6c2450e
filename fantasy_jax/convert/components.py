"""The networks that files can hold, how each is recognised, and which table maps it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.convert import arcface, clip_vision, identity, motion, umt5, vae, wan, wav2vec2
from fantasy_jax.convert.files import WeightsError, WeightsFile
from fantasy_jax.convert.rules import STORED, Plan, Rule, assign, flat_parameters, load, make_plan
from fantasy_jax.models.adapters.audio import AudioAdapter, AudioAdapterConfig
from fantasy_jax.models.adapters.identity import IdentityAdapter, IdentityAdapterConfig
from fantasy_jax.models.adapters.motion import MotionAdapter, MotionAdapterConfig
from fantasy_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from fantasy_jax.models.face_encoder import IRESNET50, FaceEncoder, FaceEncoderConfig
from fantasy_jax.models.lora import LoRA, LoRASizes
from fantasy_jax.models.umt5 import UMT5Config, UMT5Encoder
from fantasy_jax.models.vae import VAEConfig, WanVAE
from fantasy_jax.models.wan import WanConfig, WanTransformer
from fantasy_jax.models.wav2vec2 import WAV2VEC2_LARGE, Wav2Vec2Config, Wav2Vec2Model
from fantasy_jax.typing import DType


@dataclass(frozen=True)
class Layout:
    """One spelling of a network's keys.

    Attributes:
        name: `official`, `diffusers`, `transformers`, ...
        signature: Keys by which a file of this layout is recognised.
        rules: The table for a config.
    """

    name: str
    signature: Collection[str]
    rules: Callable[[Any], list[Rule]]


@dataclass(frozen=True)
class Component:
    """One network.

    Attributes:
        name: What it is called on the command line.
        network: Its class: `network(config, rngs=...)`.
        presets: Published sizes by name.
        from_json: Sizes from the config.json of a reference folder.
        layouts: The spellings of its keys, the more special ones first.
        ignored: Patterns of keys that files hold besides, and that are not needed.
        prefix: What stands before its keys in a file that it shares with another network.
    """

    name: str
    network: Callable[..., nnx.Module]
    presets: Mapping[str, Any]
    from_json: Callable[[dict[str, Any]], Any]
    layouts: Sequence[Layout]
    ignored: Callable[[Any], Sequence[str]] = lambda config: ()
    prefix: str = ""

    @property
    def config_type(self) -> type:
        """The dataclass of its sizes."""
        return type(next(iter(self.presets.values())))

    def read_config(self, values: Mapping[str, Any], path: Path) -> Any:
        """Its sizes from what JSON keeps of them; `path` is for the message of the WeightsError."""
        try:
            return self.config_type(**{name: _as_tuples(value) for name, value in values.items()})
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{path}: gives no sizes of {self.name} ({error})") from error

    def abstract(self, config: Any, dtype: DType = jnp.float32) -> nnx.Module:
        """The very module that samples, without memory."""
        return nnx.eval_shape(lambda: self._make(config, dtype))

    def fresh(self, config: Any, dtype: DType) -> nnx.Module:
        """The module with its initial weights."""
        return nnx.jit(lambda: self._make(config, dtype))()

    def realise(self, config: Any, dtype: DType, values: dict[str, np.ndarray]) -> nnx.Module:
        """The module with these parameters by path, all of them.

        Args:
            config: Its sizes.
            dtype: Of its weights and products.
            values: Emptied: each is dropped once it is in place, so that no weight is in memory twice.
        """
        module = self.abstract(config, dtype)
        assign(module, values, consume=True)
        # What is no parameter (the VAE's statistics of latents) is in no file, and comes from the config;
        # the compiler leaves out the initial weights, which nobody asks for.
        nnx.update(module, jax.jit(lambda: nnx.state(self._make(config, dtype), nnx.Not(STORED)))())
        return module

    def _make(self, config: Any, dtype: DType) -> nnx.Module:
        return self.network(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


COMPONENTS = (
    Component(
        "wan2.1_i2v_dit",
        WanTransformer,
        {"wan2.1_i2v_14b": WanConfig()},
        wan.config_from_reference,
        (
            Layout("official", ("patch_embedding.weight", "head.modulation"), wan.official_rules),
            Layout("diffusers", ("patch_embedding.weight", "scale_shift_table"), wan.diffusers_rules),
        ),
        prefix="dit.",
    ),
    Component(
        "fantasytalking",
        AudioAdapter,
        {"fantasytalking": AudioAdapterConfig()},
        wan.audio_config_from_reference,
        (
            # Read by ComfyUI (kijai/ComfyUI-WanVideoWrapper), which merges it into the transformer's file.
            Layout(
                "comfyui",
                ("proj_model.proj.weight", "blocks.0.cross_attn.k_proj.weight"),
                partial(wan.audio_adapter_rules, processor="blocks.{layer}.cross_attn"),
            ),
            Layout("official", ("proj_model.proj.weight", "proj_model.norm.weight"), wan.audio_adapter_rules),
        ),
        prefix="fantasytalking.",
    ),
    Component(
        "motion_adapter",
        MotionAdapter,
        {"motion_adapter": MotionAdapterConfig()},
        motion.config_from_reference,
        (Layout("official", ("face_in.weight", "body_in.weight"), motion.official_rules),),
    ),
    Component(
        "wan_vae",
        WanVAE,
        {"wan2.1_vae": VAEConfig()},
        vae.config_from_reference,
        (
            Layout("official", ("decoder.head.0.gamma",), vae.official_rules),
            Layout("diffusers", ("decoder.norm_out.gamma",), vae.diffusers_rules),
        ),
    ),
    Component(
        "umt5_encoder",
        UMT5Encoder,
        {"umt5_xxl": UMT5Config()},
        umt5.config_from_reference,
        (
            Layout("official", ("token_embedding.weight", "blocks.0.ffn.gate.0.weight"), umt5.official_rules),
            Layout("transformers", ("shared.weight",), umt5.transformers_rules),
        ),
        umt5.ignored_keys,
    ),
    Component(
        "clip_vision",
        CLIPVisionModel,
        {"clip_vit_h14": CLIPVisionConfig()},
        clip_vision.config_from_reference,
        (
            Layout("official", ("visual.cls_embedding",), clip_vision.official_rules),
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
    ),
    Component(
        "wav2vec2",
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
    ),
    Component(
        "arcface",
        FaceEncoder,
        {"iresnet50": IRESNET50, "iresnet100": FaceEncoderConfig()},
        arcface.config_from_reference,
        # Sizes differ in depth alone: the deeper one is known by a block that the other lacks.
        tuple(
            Layout(name, (f"layer3.{block}.conv1.weight", "features.running_mean"), arcface.official_rules)
            for name, block in (("official 100", 29), ("official", 0))
        ),
        arcface.ignored_keys,
    ),
    Component(
        "identity_adapter",
        IdentityAdapter,
        {"identity_adapter": IdentityAdapterConfig()},
        identity.config_from_reference,
        (Layout("official", ("queries", "layers.0.key.weight"), identity.official_rules),),
    ),
)


LORA = Component(
    "lora",
    LoRA,
    {"none": LoRASizes()},
    lambda sizes: LoRASizes(**sizes),
    (Layout("comfyui", (), wan.lora_rules),),
)
"""Stored and exported as a network is; of files none is recognised as one, for they do not tell its sizes."""


@dataclass(frozen=True)
class Recognised:
    """A network found in a file: its tensors, the spelling of their keys, and its sizes."""

    component: Component
    layout: Layout
    weights: WeightsFile
    preset: str
    config: Any

    @property
    def rules(self) -> list[Rule]:
        """The table that maps it."""
        return self.layout.rules(self.config)

    def plan(self, dtype: DType = jnp.float32) -> tuple[nnx.Module, Plan]:
        """The very module that samples, without memory, and how the file fills it."""
        module = self.component.abstract(self.config, dtype)
        ignored = self.component.ignored(self.config)
        return module, make_plan(self.rules, self.weights.specs, flat_parameters(module), ignore=ignored)

    def load(self, dtype: DType = jnp.float32) -> nnx.Module:
        """The network with the file's weights.

        Raises:
            ConversionError: The file does not fit.
        """
        _, plan = self.plan(dtype)
        return self.component.realise(self.config, dtype, load(plan, self.weights.read))


def recognise(weights: WeightsFile, *, preset: str | None = None) -> list[Recognised]:
    """The networks in a file: one, or each of those that share it under prefixes of their own.

    Args:
        weights: An opened file.
        preset: Name of the sizes; None takes the config.json beside it, or what the shapes fit.

    Returns:
        One for each network; keys that stand under no network's prefix are with the first, where no rule
        will take them.

    Raises:
        WeightsError: No network is recognised, or no preset fits.
    """
    found: list[Recognised] = []
    strays = dict(weights.specs)
    for component in COMPONENTS:
        shared = weights.part(component.prefix)
        for part in (weights, shared) if component.prefix and shared.specs else (weights,):
            layout = next((x for x in component.layouts if all(k in part.specs for k in x.signature)), None)
            if layout is not None:
                found.append(Recognised(component, layout, part, *_sizes(component, layout, part, preset)))
                prefix = component.prefix if part is shared else ""
                strays = {key: spec for key, spec in strays.items() if not key.startswith(prefix)}
                break
    if not found:
        names = ", ".join(component.name for component in COMPONENTS)
        raise WeightsError(f"{weights.path}: holds no network that is known ({names})")
    first = replace(found[0].weights, specs={**found[0].weights.specs, **strays})
    return [replace(found[0], weights=first), *found[1:]]


def _sizes(component: Component, layout: Layout, part: WeightsFile, preset: str | None) -> tuple[str, Any]:
    """Name and config of the network's sizes."""
    if preset is not None:
        if preset not in component.presets:
            names = ", ".join(component.presets)
            raise WeightsError(f"{part.path}: {component.name} has no preset {preset!r}; there is {names}")
        return preset, component.presets[preset]
    if part.config:
        try:
            return "config.json", component.from_json(dict(part.config))
        except (KeyError, TypeError):
            pass  # another program's config.json, which does not give sizes under these names
    # Presets differ in width; a file of the right width that lacks a layer must fail, not pass as smaller.
    for name, config in component.presets.items():
        if _width_fits(component, layout, config, part):
            return name, config
    names = ", ".join(component.presets)
    raise WeightsError(
        f"{part.path}: fits no preset of {component.name} ({names}); put config.json beside it"
    )


def _width_fits(component: Component, layout: Layout, config: Any, part: WeightsFile) -> bool:
    module = nnx.eval_shape(lambda: component.network(config, rngs=nnx.Rngs(0)))
    keys = {key: part.specs[key] for key in layout.signature}
    plan = make_plan(layout.rules(config), keys, flat_parameters(module))
    return not any(problem.startswith(("wrong shape", "unexpected")) for problem in plan.problems)
