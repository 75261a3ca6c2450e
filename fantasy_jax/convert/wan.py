"""Key names of Wan2.1's transformer, of its LoRAs, and of the FantasyTalking audio adapter."""

from typing import Any

from fantasy_jax.convert.rules import (
    LINEAR,
    Problem,
    Rule,
    Transform,
    affine,
    chain,
    norm,
    permute,
    reshape,
)
from fantasy_jax.errors import ConversionError
from fantasy_jax.models.adapters.audio import AudioAdapterConfig
from fantasy_jax.models.lora import LoRASizes
from fantasy_jax.models.wan import WanConfig


def official_rules(config: WanConfig) -> list[Rule]:
    """Returns the key table of the official file, which FantasyTalking, DiffSynth and ComfyUI also read."""
    return [
        *affine("patch_embedding", "patch_in", weight=_patch(config)),
        *affine("text_embedding.0", "text_in"),
        *affine("text_embedding.2", "text_out"),
        *affine("time_embedding.0", "time_in"),
        *affine("time_embedding.2", "time_out"),
        *affine("time_projection.1", "time_modulation"),
        *norm("img_emb.proj.0", "image/norm_in"),
        *affine("img_emb.proj.1", "image/linear_in"),
        *affine("img_emb.proj.3", "image/linear_out"),
        *norm("img_emb.proj.4", "image/norm_out"),
        *_block_rules(
            self_attention="self_attn",
            cross_attention="cross_attn",
            projections={"q": "query", "k": "key", "v": "value", "o": "out"},
            image={"k_img": "key", "v_img": "value"},
            image_norm="norm_k_img",
            cross_norm="norm3",
            mlp=("ffn.0", "ffn.2"),
            modulation="modulation",
            config=config,
        ),
        Rule("head.modulation", "modulation_out", reshape((1, 2, config.dim), (2, config.dim))),
        *affine("head.head", "patch_out"),
    ]


def diffusers_rules(config: WanConfig) -> list[Rule]:
    """Returns the key table of diffusers' `WanTransformer3DModel`."""
    embedder = "condition_embedder"
    return [
        *affine("patch_embedding", "patch_in", weight=_patch(config)),
        *affine(f"{embedder}.text_embedder.linear_1", "text_in"),
        *affine(f"{embedder}.text_embedder.linear_2", "text_out"),
        *affine(f"{embedder}.time_embedder.linear_1", "time_in"),
        *affine(f"{embedder}.time_embedder.linear_2", "time_out"),
        *affine(f"{embedder}.time_proj", "time_modulation"),
        *norm(f"{embedder}.image_embedder.norm1", "image/norm_in"),
        *affine(f"{embedder}.image_embedder.ff.net.0.proj", "image/linear_in"),
        *affine(f"{embedder}.image_embedder.ff.net.2", "image/linear_out"),
        *norm(f"{embedder}.image_embedder.norm2", "image/norm_out"),
        *_block_rules(
            self_attention="attn1",
            cross_attention="attn2",
            projections={"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "out"},
            image={"add_k_proj": "key", "add_v_proj": "value"},
            image_norm="norm_added_k",
            cross_norm="norm2",
            mlp=("ffn.net.0.proj", "ffn.net.2"),
            modulation="scale_shift_table",
            config=config,
        ),
        Rule("scale_shift_table", "modulation_out", reshape((1, 2, config.dim), (2, config.dim))),
        *affine("proj_out", "patch_out"),
    ]


def audio_adapter_rules(
    config: AudioAdapterConfig, processor: str = "audio_processor.blocks.{layer}.cross_attn.processor"
) -> list[Rule]:
    """Returns the key table of `fantasytalking_model`, .safetensors or flattened .ckpt.

    Args:
        config: Sizes.
        processor: Prefix of the blocks' `k_proj` and `v_proj`; ComfyUI's has no `processor`.
    """
    return [
        Rule("proj_model.proj.weight", "projection/kernel", LINEAR),
        *norm("proj_model.norm", "norm"),
        Rule(f"{processor}.k_proj.weight", "layers/key/kernel", LINEAR),
        Rule(f"{processor}.v_proj.weight", "layers/value/kernel", LINEAR),
    ]


def lora_rules(config: LoRASizes) -> list[Rule]:
    """Returns the key table of a LoRA for ComfyUI and diffusers: official keys after `diffusion_model.`.

    Source: diffusers, `loaders/lora_conversion_utils.py`, `_convert_non_diffusers_wan_lora_to_diffusers`;
    ComfyUI, `comfy/lora.py`. In the file, B is multiplied by alpha / rank: without an entry `alpha`, all
    programs use it unchanged.

    Raises:
        ConversionError: These programs do not support a layer.
    """
    known = {rule.target: rule.source for rule in official_rules(WanConfig()) if rule.transform is LINEAR}
    scaled = Transform("scale", lambda b: b / config.scale, lambda b: b * config.scale)
    if unknown := [path for path, _ in config.layers if f"{path}/kernel" not in known]:
        detail = "{} is not a layer of the official transformer"
        raise ConversionError([Problem("unexpected", "", path, detail.format(path)) for path in unknown])
    rules = []
    for path, _ in config.layers:
        stem = f"diffusion_model.{known[f'{path}/kernel'].removesuffix('.weight')}"
        rules.append(Rule(f"{stem}.lora_A.weight", f"{path}/lora_a", LINEAR))
        rules.append(Rule(f"{stem}.lora_B.weight", f"{path}/lora_b", chain(LINEAR, scaled)))
    return rules


def config_from_reference(reference: dict[str, Any]) -> WanConfig:
    """Returns the sizes from a reference's config.json, whose `model` has the official argument names."""
    model = reference["model"]
    return WanConfig(
        latent_channels=model["out_dim"],
        condition_channels=model["in_dim"] - model["out_dim"],
        dim=model["dim"],
        ffn_dim=model["ffn_dim"],
        frequency_dim=model["freq_dim"],
        text_dim=model["text_dim"],
        text_length=model["text_len"],
        num_heads=model["num_heads"],
        num_layers=model["num_layers"],
        patch=tuple(model["patch_size"][1:]),
        epsilon=model["eps"],
    )


def audio_config_from_reference(reference: dict[str, Any]) -> AudioAdapterConfig:
    """Returns the adapter's sizes from a reference's config.json."""
    model, audio = reference["model"], reference["audio"]
    return AudioAdapterConfig(
        feature_width=audio["audio_in_dim"],
        token_width=audio["audio_proj_dim"],
        width=model["dim"],
        num_heads=model["num_heads"],
        num_layers=model["num_layers"],
    )


def _block_rules(
    *,
    self_attention: str,
    cross_attention: str,
    projections: dict[str, str],
    image: dict[str, str],
    image_norm: str,
    cross_norm: str,
    mlp: tuple[str, str],
    modulation: str,
    config: WanConfig,
) -> list[Rule]:
    """Rules of a block in either layout; the text has the keys and values of the official cross-attention."""
    block = "blocks.{layer}"
    rules = [
        Rule(f"{block}.{modulation}", "blocks/modulation", reshape((1, 6, config.dim), (6, config.dim))),
        *norm(f"{block}.{cross_norm}", "blocks/cross_norm"),
        *affine(f"{block}.{mlp[0]}", "blocks/mlp_in"),
        *affine(f"{block}.{mlp[1]}", "blocks/mlp_out"),
    ]
    for theirs, ours in ((self_attention, "self_attention"), (cross_attention, "cross_attention")):
        text = "/text" if ours == "cross_attention" else ""
        rules += [
            Rule(f"{block}.{theirs}.norm_q.weight", f"blocks/{ours}/query_norm/scale"),
            Rule(f"{block}.{theirs}.norm_k.weight", f"blocks/{ours}{text}/key_norm/scale"),
        ]
        for projection, name in projections.items():
            place = text if name in ("key", "value") else ""
            rules += affine(f"{block}.{theirs}.{projection}", f"blocks/{ours}{place}/{name}")
    place = "blocks/cross_attention/image"
    rules.append(Rule(f"{block}.{cross_attention}.{image_norm}.weight", f"{place}/key_norm/scale"))
    for projection, name in image.items():
        rules += affine(f"{block}.{cross_attention}.{projection}", f"{place}/{name}")
    return rules


def _patch(config: WanConfig) -> Transform:
    """A convolution whose stride is its kernel size is linear: `[D, C, 1, r, c]` to `[r c C, D]`."""
    channels = config.latent_channels + config.condition_channels
    spread = (1, *config.patch, channels, config.dim)
    return chain(permute(2, 3, 4, 1, 0), reshape(spread, (-1, config.dim)))
