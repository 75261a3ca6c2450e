"""Runs the networks on the inputs of a reference; one runner for each kind of reference."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.diffusion.flow import sampling_sigmas
from fantasy_jax.diffusion.guidance import guidance_branches
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.models.tiling import blend_tiles, tiled_decode
from fantasy_jax.models.vae import WanVAE
from fantasy_jax.models.wan import NUM_TIMESTEPS, WanTransformer
from fantasy_jax.models.windows import split_windows, window_ranges
from fantasy_jax.preprocessing.audio import normalise_waveform
from fantasy_jax.preprocessing.images import clip_image_preprocess
from fantasy_jax.system.conditioning import condition
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.typing import Array, Float
from fantasy_jax.video import PIXELS_PER_LATENT

Activations = Mapping[str, np.ndarray]
"""Arrays of activations.safetensors by key."""
Outputs = Iterator[tuple[str, np.ndarray | Array]]
"""Name and value of each output."""


def _channels_last(x: np.ndarray) -> Array:
    return jnp.asarray(np.moveaxis(x, 1, -1))


def _channels_first(x: Array) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def run_fantasytalking(
    modules: Mapping[str, nnx.Module], activations: Activations, config: Mapping[str, Any]
) -> Outputs:
    """The transformer with the audio adapter: audio tokens, windows, velocities, and a guided sample."""
    transformer, adapter = modules["wan2.1_i2v_dit"], modules["fantasytalking"]
    transformer.adapters["audio"] = adapter
    text = activations["input.text"]
    inputs = ClipInputs(
        first_frame=_channels_last(activations["input.condition_latents"]),
        text=jnp.asarray(text),
        negative_text=jnp.asarray(activations.get("input.negative_text", text)),
        image=jnp.asarray(activations["input.clip_features"]),
        adapters={"audio": jnp.asarray(activations["input.audio_features"])},
    )
    latents = _channels_last(activations["input.latents"])
    forward = nnx.jit(lambda transformer, *arguments: transformer(*arguments))

    def velocity(inputs: ClipInputs = inputs, *, timestep: float | None = None, **audio: Any) -> np.ndarray:
        time = activations["input.timestep"] if timestep is None else [timestep]
        settings = {"expand": config["expand_length"]} | audio
        given = condition(transformer, inputs, options={"audio": settings})
        time = jnp.asarray(time, jnp.float32)
        return _channels_first(forward(transformer, latents, given.first_frame, time, given.attended))

    tokens = adapter.tokens(inputs.adapters["audio"])
    yield "audio_tokens", tokens
    yield "velocity_audio_scale_1", velocity()
    if "output.sample_sigmas" not in activations:
        return
    num_frames, num_tokens = config["num_frames"], tokens.shape[1]
    expanded = window_ranges(num_tokens, num_frames, expand=config["expand_length"])
    windows, lengths = split_windows(tokens, expanded)
    yield "audio_window_ranges", window_ranges(num_tokens, num_frames)
    yield "audio_window_lengths", lengths
    yield "audio_windows", windows
    yield "velocity_audio_scale_0", velocity(scale=0.0)
    yield "velocity_audio_scale_0.5", velocity(scale=0.5)
    yield "velocity_clip_level", velocity(attention="clip")
    negative = replace(inputs, text=inputs.negative_text)
    yield "velocity_negative_text_audio_scale_0", velocity(negative, scale=0.0)
    yield "velocity_timestep_12.5", velocity(timestep=12.5)
    yield "velocity_timestep_999.75", velocity(timestep=999.75)
    yield from _sample(transformer, latents, inputs, config)


def _sample(
    transformer: WanTransformer,
    noise: Float[Array, "B F h w C"],
    inputs: ClipInputs,
    config: Mapping[str, Any],
) -> Outputs:
    """The schedules of sampling and training, and the latents after each step of a guided sample."""
    settings = config["sampler"]
    steps, shift = settings["steps"], settings["shift"]
    sigmas = sampling_sigmas(steps, shift)[:-1]
    yield "sample_sigmas", sigmas
    yield "sample_timesteps", NUM_TIMESTEPS * sigmas
    train = NUM_TIMESTEPS * sampling_sigmas(NUM_TIMESTEPS, shift)[:-1]
    yield "train_timesteps_1000", train
    yield "train_weights_1000", training_weight(jnp.asarray(train), shift=shift)
    each: list[np.ndarray] = []
    sample(
        transformer,
        noise,
        inputs,
        SamplerConfig(steps, shift),
        guidance=guidance_branches(steps, settings["prompt_cfg_scale"], settings["audio_cfg_scale"]),
        options={"audio": {"scale": settings["audio_scale"], "expand": config["expand_length"]}},
        callback=lambda _, latents: each.append(_channels_first(latents)),
    )
    for step, latents in enumerate(each, 1):
        yield f"sample_latents_step{step}", latents


def training_weight(timestep: Float[Array, " B"], *, shift: float = 5.0) -> Float[Array, " B"]:
    """The official loss weight at a timestep, which training here does not use.

    A bell around the middle, with mean 1 over the shifted schedule. Source: fantasy-talking,
    `diffsynth/schedulers/flow_match.py`, `training_weight`.

    Args:
        timestep: Timesteps in [0, 1000].
        shift: Shift of the schedule over which the mean is taken.
    """
    levels = NUM_TIMESTEPS * sampling_sigmas(NUM_TIMESTEPS, shift)[:-1].astype(np.float64)
    bell = np.exp(-2 * (levels / NUM_TIMESTEPS - 0.5) ** 2)
    lowest, mean = bell.min(), bell.mean()
    return (jnp.exp(-2 * (timestep / NUM_TIMESTEPS - 0.5) ** 2) - lowest) / (mean - lowest)


def run_vae(
    modules: Mapping[str, nnx.Module], activations: Activations, config: Mapping[str, Any]
) -> Outputs:
    """Encodes and decodes, whole and in tiles."""
    vae = modules["wan_vae"]
    encode, decode = nnx.jit(lambda vae, x: vae.encode(x)), nnx.jit(lambda vae, x: vae.decode(x))
    yield "latents", _channels_first(encode(vae, _channels_last(activations["input.video"])))
    yield "decoded", _channels_first(decode(vae, _channels_last(activations["output.latents"])))
    if "input.video_tiled" not in activations:
        return
    tile, stride = (tuple(config["tile_latents"][key]) for key in ("size", "stride"))
    video = _channels_last(activations["input.video_tiled"])
    yield "latents_tiled", _channels_first(tiled_encode(vae, video, tile=tile, stride=stride))
    latents = _channels_last(activations["output.latents_tiled"])
    yield "decoded_tiled", _channels_first(tiled_decode(vae, latents, tile=tile, stride=stride))


def tiled_encode(
    vae: WanVAE, video: Float[Array, "B T H W 3"], *, tile: tuple[int, int], stride: tuple[int, int]
) -> Float[Array, "B F h w C"]:
    """Encodes in tiles, which the system itself never does.

    Source: fantasy-talking, `diffsynth/models/wan_video_vae.py`, `tiled_encode`.

    Args:
        vae: The VAE.
        video: Frames in [-1, 1].
        tile: Height and width of a tile in latents.
        stride: Height and width from one tile to the next in latents.
    """
    encode = nnx.jit(lambda vae, x: vae.encode(x))
    tile, stride = (tuple(size * PIXELS_PER_LATENT for size in pair) for pair in (tile, stride))
    scale = 1 / PIXELS_PER_LATENT
    return blend_tiles(lambda x: encode(vae, x), video, tile=tile, stride=stride, scale=scale)


def run_umt5(
    modules: Mapping[str, nnx.Module], activations: Activations, config: Mapping[str, Any]
) -> Outputs:
    """The text encoder."""
    ids, mask = (jnp.asarray(activations[f"input.{name}"], jnp.int32) for name in ("ids", "mask"))
    yield "hidden", modules["umt5_encoder"](ids, mask.sum(axis=1, dtype=jnp.int32))


def run_clip(
    modules: Mapping[str, nnx.Module], activations: Activations, config: Mapping[str, Any]
) -> Outputs:
    """The image encoder with its preprocessing."""
    pixels = clip_image_preprocess(_channels_last(activations["input.image"]), config["image_size"])
    yield "pixel_values", _channels_first(pixels)
    yield "features", modules["clip_vision"](pixels)


def run_wav2vec2(
    modules: Mapping[str, nnx.Module], activations: Activations, config: Mapping[str, Any]
) -> Outputs:
    """The speech encoder with its preprocessing."""
    normalised = np.stack([normalise_waveform(x) for x in np.asarray(activations["input.waveform"])])
    yield "input_values", normalised
    yield "last_hidden_state", modules["wav2vec2"](jnp.asarray(normalised))


def run_motion_encoder(
    modules: Mapping[str, nnx.Module], activations: Activations, config: Mapping[str, Any]
) -> Outputs:
    """The motion encoder: the feature of a face, and its heads on the reference's feature.

    The heads multiply rounding errors of the feature: their outputs in the reference differ by up to 4.7e-6
    from those of a computation in float64.
    """
    encoder = modules["pdfgc_motion_encoder"]
    encode, run_heads = nnx.jit(lambda m, x: m.face_feature(x)), nnx.jit(lambda m, x: m.parts(x))
    yield "feature", encode(encoder, _channels_last(activations["input.image"]))
    parts = run_heads(encoder, jnp.asarray(activations["output.feature"]))
    for field in fields(parts):
        yield field.name, getattr(parts, field.name)


Runner = Callable[[Mapping[str, nnx.Module], Activations, Mapping[str, Any]], Outputs]
"""Of modules by the name of their format, activations, and the content of config.json."""

RUNNERS: dict[str, Runner] = {
    "fantasytalking_dit": run_fantasytalking,
    "wan_vae": run_vae,
    "umt5_encoder": run_umt5,
    "clip_vision": run_clip,
    "wav2vec2": run_wav2vec2,
    "pdfgc_motion_encoder": run_motion_encoder,
}
"""Runners by the component that a reference names."""
