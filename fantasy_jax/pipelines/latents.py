"""Initial noise and latents in files, laid out as PyTorch has them."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from fantasy_jax.config import SEED
from fantasy_jax.convert.files import open_weights
from fantasy_jax.errors import MediaError, WeightsError
from fantasy_jax.files import atomic_write
from fantasy_jax.typing import Array, Float
from fantasy_jax.video import video_frames

_FRAMES = "num_frames"


def initial_noise(seed: int, shape: tuple[int, ...], *, block: int = 0) -> Float[Array, "B F h w C"]:
    """Normal noise, float32. The same seed gives PyTorch other numbers; `read_noise` takes PyTorch's.

    The noise of one clip is the beginning of that of a longer one.

    Args:
        seed: The seed.
        shape: Shape of the latents, `[B, F, h, w, C]`.
        block: Number of the block in a stream, each of which has noise of its own.

    Raises:
        ConfigError: The seed is negative or has more than 64 bits.
    """
    SEED.check(seed, "seed")
    high, low = divmod(seed, 2**32)  # JAX's keys are made of 32 bits
    key = jax.random.key(low)
    for number in (high, block):
        key = jax.random.fold_in(key, number) if number else key
    return jax.random.normal(key, shape, jnp.float32)


def read_noise(path: str | Path, shape: tuple[int, ...]) -> Float[Array, "B F h w C"]:
    """Initial noise from a safetensors file of one tensor, `noise`, as `torch.randn` makes it for Wan2.1.

    Args:
        path: The file; the tensor is `[B, C, F, h, w]`.
        shape: Shape of the latents, `[B, F, h, w, C]`.

    Raises:
        WeightsError: The file is missing or damaged, or does not hold such a tensor.
    """
    return _read(path, "noise", shape)


def read_latents(path: str | Path, channels: int) -> tuple[Float[Array, "1 F h w C"], int]:
    """Latents of one clip, and the frames of its video, from a file of `save_latents`.

    Args:
        path: The file; the tensor `latents` is `[1, C, F, h, w]`. In a file that does not say how many frames
            the video has, it has all that the latents hold.
        channels: Channels C of the latents.

    Raises:
        WeightsError: The file is missing or damaged, or does not hold such a tensor.
    """
    latents = _read(path, "latents", (1, None, None, None, channels))
    longest = video_frames(latents.shape[1])
    with safe_open(path, "numpy") as file:
        frames = (file.metadata() or {}).get(_FRAMES, str(longest))
    if not frames.isdecimal() or not 1 <= int(frames) <= longest:
        raise WeightsError(f"{path}: says that the video has {frames} frames; its latents hold {longest}")
    return latents, int(frames)


def _read(path: str | Path, name: str, shape: tuple[int | None, ...]) -> Float[Array, "B F h w C"]:
    """A tensor that is alone in its file; sizes of `shape` that are None are free."""
    if Path(path).suffix != ".safetensors":
        raise WeightsError(f"{path}: {name} is read from a .safetensors file of one tensor named {name}")
    file = open_weights(path)
    if set(file.specs) != {name}:
        names = ", ".join(sorted(file.specs)) or "nothing"
        raise WeightsError(f"{path}: holds {names}; give one tensor, {name}")
    found, wanted = file.specs[name], (shape[0], shape[-1], *shape[1:-1])
    fits = len(found.shape) == len(wanted) and all(
        size == other or (other is None and size > 0) for size, other in zip(found.shape, wanted, strict=True)
    )
    if not fits or found.dtype.kind in "iub":
        sizes = " x ".join("any" if size is None else str(size) for size in wanted)
        raise WeightsError(
            f"{path}: {name} is {found.dtype} of {' x '.join(map(str, found.shape))}; this image, audio and "
            f"config need float32 of {sizes}"
        )
    value = np.asarray(file.read(name), np.float32)
    if not np.isfinite(value).all():
        raise WeightsError(f"{path}: {name} holds values that are not finite; create it again")
    return jnp.asarray(np.moveaxis(value, 1, -1))


def save_latents(path: str | Path, latents: Float[Array, "B F h w C"], num_frames: int | None = None) -> None:
    """Writes a safetensors file of one tensor, `latents`, laid out as PyTorch has it: `[B, C, F, h, w]`.

    Args:
        path: The file.
        latents: The latents.
        num_frames: Frames of the video, if they are fewer than the latents hold.

    Raises:
        MediaError: The file cannot be written; nothing is left of it.
    """
    channels_first = np.ascontiguousarray(np.moveaxis(np.asarray(latents, np.float32), -1, 1))
    metadata = None if num_frames is None else {_FRAMES: str(num_frames)}
    with atomic_write(path) as partial:
        partial.write_bytes(save({"latents": channels_first}, metadata))


@contextmanager
def keep_latents(
    video: Path,
    latents: Float[Array, "B F h w C"],
    num_frames: int | None,
    *,
    saved: str | Path | None = None,
    needed: str = "config and sound",
) -> Iterator[None]:
    """Keeps latents in a file beside a video while it or another file is written, and for good if that fails.

    Args:
        video: The video of the latents, beside which they are kept.
        latents: The latents.
        num_frames: Frames of the video; None: all that the latents hold.
        saved: File that holds the latents already; None: there is none.
        needed: What else the command that decodes them needs as it was, for the message.

    Raises:
        MediaError: The file cannot be written; the message names that of the latents.
    """
    path = Path(saved) if saved else _save_near(video, latents, num_frames)
    try:
        yield
    except BaseException as error:
        # What was written of the video is deleted by now, so that there may be room.
        path = path or _save_near(video, latents, num_frames)
        if path is None:
            raise
        advice = f"the latents are kept; decode them by --latents={path} with the same {needed}"
        if isinstance(error, MediaError | OSError):
            raise MediaError(f"{error}; {advice}") from error
        print(advice, file=sys.stderr)
        raise
    if path and not saved:
        path.unlink(missing_ok=True)


def _save_near(video: Path, latents: Float[Array, "B F h w C"], num_frames: int | None) -> Path | None:
    """Saves latents beside a video or, where that fails, among the temporary files; None if both fail."""
    for folder in (video.parent, Path(tempfile.gettempdir())):
        path = _unused(folder / video.name)
        try:
            save_latents(path, latents, num_frames)
        except MediaError:
            continue
        return path
    return None


def _unused(video: Path) -> Path:
    """A name beside a video that no file has."""
    names = (video.with_suffix(f"{'' if i == 1 else f'.{i}'}.latents.safetensors") for i in count(1))
    return next(path for path in names if not path.exists())
