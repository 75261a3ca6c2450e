"""Runs the networks on the inputs of a reference; one runner for each kind of reference."""

from collections.abc import Callable
from dataclasses import fields

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.models.tiling import blend_tiles
from fantasy_jax.models.vae import WanVAE
from fantasy_jax.parity.masked_attention import run_masked_attention
from fantasy_jax.parity.reference import Outputs, Reference, channels_first
from fantasy_jax.parity.transformers import (
    run_expression_adapter,
    run_fantasyportrait,
    run_fantasytalking,
)
from fantasy_jax.preprocessing import driving, official_detectors
from fantasy_jax.preprocessing.audio import normalise_waveform
from fantasy_jax.preprocessing.images import clip_image_preprocess
from fantasy_jax.preprocessing.one_euro import OFFICIAL_GROUPS, smooth_landmarks
from fantasy_jax.system.streaming import StreamingDecoder
from fantasy_jax.typing import Array, Float
from fantasy_jax.video import PIXELS_PER_LATENT


def run_vae(reference: Reference) -> Outputs:
    """Encodes and decodes, whole and in tiles."""
    vae = reference.modules["wan_vae"]
    encode, decode = nnx.jit(lambda vae, x: vae.encode(x)), nnx.jit(lambda vae, x: vae.decode(x))
    yield "latents", channels_first(encode(vae, reference.images("input.video")))
    yield "decoded", channels_first(decode(vae, reference.images("output.latents")))
    if "input.video_tiled" not in reference.activations:
        return
    tile, stride = (tuple(reference.config["tile_latents"][key]) for key in ("size", "stride"))
    video = reference.images("input.video_tiled")
    yield "latents_tiled", channels_first(tiled_encode(vae, video, tile=tile, stride=stride))
    latents = reference.images("output.latents_tiled")
    decoder = StreamingDecoder(vae, tiling="on", tile=tile, stride=stride)
    decoded = [decoder.decode(latents[:, i : i + 1]) for i in range(latents.shape[1])]
    yield "decoded_tiled", channels_first(jnp.clip(jnp.concatenate(decoded, axis=1), -1, 1))


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


def run_umt5(reference: Reference) -> Outputs:
    """The text encoder."""
    ids, mask = (reference.array(f"input.{name}").astype(jnp.int32) for name in ("ids", "mask"))
    yield "hidden", reference.modules["umt5_encoder"](ids, mask.sum(axis=1, dtype=jnp.int32))


def run_clip(reference: Reference) -> Outputs:
    """The image encoder with its preprocessing."""
    pixels = clip_image_preprocess(reference.images("input.image"), reference.config["image_size"])
    yield "pixel_values", channels_first(pixels)
    yield "features", reference.modules["clip_vision"](pixels)


def run_wav2vec2(reference: Reference) -> Outputs:
    """The speech encoder with its preprocessing."""
    encoder, waveforms = reference.modules["wav2vec2"], reference.activations["input.waveform"]
    if encoder.config.do_normalize:
        waveforms = np.stack([normalise_waveform(x) for x in waveforms])
    yield "input_values", waveforms
    yield "last_hidden_state", encoder(jnp.asarray(waveforms))


def run_motion_encoder(reference: Reference) -> Outputs:
    """The motion encoder: the feature of a face, and its heads on the reference's feature.

    The heads multiply rounding errors of the feature: their outputs in the reference differ by up to 4.7e-6
    from those of a computation in float64.
    """
    encoder = reference.modules["pdfgc_motion_encoder"]
    encode, run_heads = nnx.jit(lambda m, x: m.face_feature(x)), nnx.jit(lambda m, x: m.parts(x))
    yield "feature", encode(encoder, reference.images("input.image"))
    parts = run_heads(encoder, reference.array("output.feature"))
    for field in fields(parts):
        yield field.name, getattr(parts, field.name)


def run_fantasyportrait_preprocessing(reference: Reference) -> Outputs:
    """The preparation of driving faces, without the detector's and the landmarks' network."""
    activations, size = reference.activations, reference.config["picture_height_width_of_detector"]
    scores, distances = (
        [activations[f"input.detector_{kind}_stride{stride}"] for stride in (8, 16, 32)]
        for kind in ("scores", "distances")
    )
    boxes, confidences = official_detectors.decode_boxes(scores, distances, *size)
    yield "detector_boxes", boxes
    yield "detector_confidences", confidences
    yield "detector_resize_matrix", official_detectors.resize_matrix(*size)
    box, landmarks = activations["input.face_box"], activations["input.landmarks"]
    yield "crop_matrix_from_box", official_detectors.crop_matrix_from_box(box)
    yield "crop_matrix_from_landmarks", official_detectors.crop_matrix_from_landmarks(landmarks)
    track, sizes = activations["input.landmark_track"], activations["input.face_sizes"]
    yield "smoothed_landmarks", smooth_landmarks(track, sizes, OFFICIAL_GROUPS)
    points, picture = activations["input.alignment_points"], activations["input.picture_rgb"]
    yield "alignment_matrices", driving.alignment_matrices(points)
    yield "aligned_rgb", np.stack([driving.align_face(picture, face) for face in points])
    yield "frames_kept_of_0_to_30", np.array([driving.kept_frames(count) for count in range(31)])


Runner = Callable[[Reference], Outputs]

RUNNERS: dict[str, Runner] = {
    "fantasytalking_dit": run_fantasytalking,
    "fantasyportrait_dit": run_fantasyportrait,
    "fantasyportrait_adapter": run_expression_adapter,
    "fantasyportrait_masked_attention": run_masked_attention,
    "wan_vae": run_vae,
    "umt5_encoder": run_umt5,
    "clip_vision": run_clip,
    "wav2vec2": run_wav2vec2,
    "pdfgc_motion_encoder": run_motion_encoder,
    "fantasyportrait_preprocessing": run_fantasyportrait_preprocessing,
}
"""Runners by the component that a reference names."""
