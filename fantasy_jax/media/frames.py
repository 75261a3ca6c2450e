"""Frames of videos as they are displayed: upright, with square pixels, in sRGB."""

from collections.abc import Callable

import av
import cv2
import numpy as np

from fantasy_jax.media.primaries import BT2020, to_bt709
from fantasy_jax.typing import Float, Float32, UInt8, UInt16

_FULL_RANGE, _LIMITED_RANGE = 2, 1
_BT709, _BT601, _BT2020 = 1, 5, 9
_MATRICES = {1: _BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: _BT2020, 10: _BT2020}
"""swscale's coefficients by a frame's colour space; it takes files that do not say theirs as BT.601."""
_PQ, _HLG = 16, 18
"""Transfer characteristics of high dynamic range (ITU-T H.273)."""
_MAX_ASPECT = 16
"""Longer side of a pixel in shorter ones at most; what a damaged file says beyond it is ignored."""
_KNEE = 0.9
"""Where tone mapping begins to compress, relative to diffuse white."""


def displayed_size(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int]:
    """Height and width of a frame with square pixels, after its display matrix."""
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 1 / _MAX_ASPECT <= aspect <= _MAX_ASPECT:
        aspect = 1.0
    size = frame.height, max(round(frame.width * aspect), 1)
    return size[::-1] if _orientation(frame)[0] else size


def to_rgb(
    frame: av.VideoFrame, stream: av.VideoStream, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Converts a frame to RGB.

    The whole display matrix is applied: rotations by multiples of 90 degrees, and flips. Video of high
    dynamic range is tone-mapped to BT.709.

    Args:
        frame: The frame.
        stream: The stream that it is from.
        size: Height and width of the result; None: those at which it is displayed.
    """
    transposed, flips = _orientation(frame)
    size = size or displayed_size(frame, stream)
    height, width = size[::-1] if transposed else size
    to_sdr = TONE_MAPS.get(stream.codec_context.color_trc)
    pixels = _pixels(frame, "rgb24" if to_sdr is None else "gbrp12le")
    if pixels.shape[:2] != (height, width):
        smaller = height <= len(pixels) and width <= pixels.shape[1]
        interpolation = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
        pixels = cv2.resize(pixels, (width, height), interpolation=interpolation)
    if to_sdr is not None:
        pixels = to_sdr(pixels)
    pixels = pixels.swapaxes(0, 1) if transposed else pixels
    return np.ascontiguousarray(pixels[:: flips[0], :: flips[1]])


def _pixels(frame: av.VideoFrame, pixel_format: str) -> np.ndarray:
    """RGB of full range, with the matrix and range that the frame states.

    PyAV before 17 ignores both unless ranges are given and source and destination differ, although RGB has no
    matrix, and PyAV 16 converts to packed RGB of more than 8 bits wrongly. Scaling is left to OpenCV, because
    swscale makes scaled RGB darker by up to 2 of 255.
    """
    name = frame.format.name
    if frame.format.is_rgb or frame.format.has_palette:
        return frame.to_ndarray(format=pixel_format)
    full = frame.color_range == _FULL_RANGE or name.startswith(("yuvj", "gray"))
    matrix = _MATRICES.get(frame.colorspace, _BT601)
    converted = frame.reformat(
        format=pixel_format,
        src_colorspace=matrix,
        dst_colorspace=_BT709 if matrix == _BT601 else _BT601,
        src_color_range=_FULL_RANGE if full else _LIMITED_RANGE,
        dst_color_range=_FULL_RANGE,
    )
    return converted.to_ndarray()


def _orientation(frame: av.VideoFrame) -> tuple[bool, tuple[int, int]]:
    """Whether rows and columns are exchanged, and then the steps (1 or -1) along rows and columns.

    FFmpeg's display matrix `[a b u; c d v; x y w]` maps a stored pixel to x' = a x + c y, y' = b x + d y.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, (1, 1)
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, (-1 if d < 0 else 1, -1 if a < 0 else 1)
    return True, (-1 if b < 0 else 1, -1 if c < 0 else 1)


def _hlg_to_linear(signal: Float32[np.ndarray, "H W 3"]) -> Float32[np.ndarray, "H W 3"]:
    """Inverse OETF of HLG (ITU-R BT.2100), relative to diffuse white at 75% of the signal (BT.2408)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    white = (np.exp((0.75 - c) / a) + b) / 12
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return (scene / white).astype(np.float32)


def _pq_to_linear(signal: Float32[np.ndarray, "H W 3"]) -> Float32[np.ndarray, "H W 3"]:
    """EOTF of PQ (ITU-R BT.2100), relative to diffuse white at 203 cd/m² (BT.2408)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
    root = signal ** np.float32(1 / m2)
    luminance = 10_000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** np.float32(1 / m1)
    return (luminance / 203).astype(np.float32)


def _tone_map(
    to_linear: Callable[[Float32[np.ndarray, "H W 3"]], Float32[np.ndarray, "H W 3"]],
) -> Callable[..., UInt8[np.ndarray, "H W 3"]]:
    """Conversion of pixels of 12 bits with this transfer function to sRGB.

    It is called with the pixels and the number of their primaries, by default BT.2020's.

    What is as bright as diffuse white or darker keeps its colour, as in the direct mapping of BT.2408;
    highlights above `_KNEE` are compressed by a hyperbola that no value exceeds, of the largest channel, so
    that hues stay.
    """
    signal = np.linspace(0, 1, 4096, dtype=np.float32).reshape(-1, 1, 1).repeat(3, axis=2)
    table = to_linear(signal)[:, 0, 0]
    encoded = (255 * srgb_from_linear(np.linspace(0, 1, 4096))).round().astype(np.uint8)

    def convert(pixels: UInt16[np.ndarray, "H W 3"], primaries: int = BT2020) -> UInt8[np.ndarray, "H W 3"]:
        linear = np.maximum(table[np.minimum(pixels, 4095)] @ to_bt709(primaries).T, 0)
        largest = linear.max(axis=-1, keepdims=True)
        above = np.maximum(largest - _KNEE, 0)
        compressed = _KNEE + above * (1 - _KNEE) / (above + 1 - _KNEE)
        linear *= np.where(above > 0, compressed / np.maximum(largest, _KNEE), 1)
        return encoded[(linear * 4095).round().clip(0, 4095).astype(np.uint16)]

    return convert


def srgb_from_linear(linear: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Transfer function of sRGB (IEC 61966-2-1)."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


TONE_MAPS = {_PQ: _tone_map(_pq_to_linear), _HLG: _tone_map(_hlg_to_linear)}
"""Conversions of pixels of 12 bits to sRGB, by transfer characteristics."""
