"""Conversion of images to sRGB by their ICC profiles."""

import io
import logging
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from fantasy_jax.media.declared import SRGB, declared_space, declared_to_srgb

_GREY_MODES = ("1", "L", "LA", "La")


def to_srgb(image: Image.Image, path: str | Path) -> Image.Image:
    """Converts an image of 8 bits per channel to sRGB, with relative colorimetric intent.

    Images that state no colour space (a profile, or as in `media.declared`), that have the profile of sRGB,
    or one that cannot be used stay as they are; the last is logged.

    Args:
        image: With its profile, if any, in `info`, as Pillow opens it; LAB needs none.
        path: Its file, for the message.
    """
    if image.mode == "LAB":
        return _convert(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    space, content = declared_space(image, path), image.info.get("icc_profile")
    if image.mode in _GREY_MODES and space != SRGB:
        space = None
    if space == SRGB or (space is None and not content):
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if space is not None:
        return _with_alpha(declared_to_srgb(image.convert("RGB"), space), alpha)
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(content))
        space = profile.profile.xcolor_space.strip()
        if image.mode not in ("CMYK", "RGB"):
            image = image.convert("L" if image.mode in _GREY_MODES and space == "GRAY" else "RGB")
        if image.mode != "RGB" or not _is_srgb(content):
            image = _convert(image, profile)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        logging.getLogger(__name__).warning(
            "%s: its colour profile cannot be used (%s); sRGB is assumed", path, reason
        )
    return _with_alpha(image, alpha)


def _with_alpha(image: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is not None:
        image = image.convert("RGB")
        image.putalpha(alpha)
    return image


def _convert(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    return ImageCms.profileToProfile(
        image,
        profile,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


@cache
def _is_srgb(content: bytes) -> bool:
    """Whether a profile of RGB changes no colour by more than a rounding error."""
    levels = np.arange(0, 256, 15, np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    converted = _convert(Image.fromarray(colours), ImageCms.getOpenProfile(io.BytesIO(content)))
    return bool(np.abs(np.asarray(converted).astype(int) - colours).max() <= 1)
