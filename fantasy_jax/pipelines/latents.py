"""Initial noise and latents in files, laid out as PyTorch has them, for comparison."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from fantasy_jax.convert.files import open_weights
from fantasy_jax.errors import ConfigError, WeightsError
from fantasy_jax.files import atomic_write
from fantasy_jax.typing import Array, Float


def initial_noise(seed: int, shape: tuple[int, ...], *, block: int = 0) -> Float[Array, "B F h w C"]:
    """Normal noise, float32. The same seed gives PyTorch other numbers; `read_noise` takes PyTorch's.

    The noise of one clip is the beginning of that of a longer one.

    Args:
        seed: The seed.
        shape: Shape of the latents, `[B, F, h, w, C]`.
        block: Number of the block in a stream, each of which has noise of its own.

    Raises:
        ConfigError: The seed is no 64-bit integer.
    """
    try:
        key = jax.random.key(seed)
    except OverflowError as error:
        raise ConfigError(f"seed is {seed}; it must be an integer of at most 64 bits, signed") from error
    return jax.random.normal(jax.random.fold_in(key, block) if block else key, shape, jnp.float32)


def read_noise(path: str | Path, shape: tuple[int, ...]) -> Float[Array, "B F h w C"]:
    """Initial noise from a safetensors file of one tensor, `noise`, as `torch.randn` makes it for Wan2.1.

    Args:
        path: The file; the tensor is `[B, C, F, h, w]`.
        shape: Shape of the latents, `[B, F, h, w, C]`.

    Raises:
        WeightsError: The file is missing or damaged, or does not hold such a tensor.
    """
    if Path(path).suffix != ".safetensors":
        raise WeightsError(f"{path}: noise is read from a .safetensors file of one tensor named noise")
    file = open_weights(path)
    if set(file.specs) != {"noise"}:
        names = ", ".join(sorted(file.specs)) or "nothing"
        raise WeightsError(f"{path}: holds {names}; give one tensor, noise")
    found, wanted = file.specs["noise"], (shape[0], shape[-1], *shape[1:-1])
    if found.shape != wanted or found.dtype.kind in "iub":
        raise WeightsError(
            f"{path}: noise is {found.dtype} of {' x '.join(map(str, found.shape))}; this image, audio and "
            f"config need float32 of {' x '.join(map(str, wanted))}"
        )
    noise = np.asarray(file.read("noise"), np.float32)
    if not np.isfinite(noise).all():
        raise WeightsError(f"{path}: noise holds values that are not finite; create it again")
    return jnp.asarray(np.moveaxis(noise, 1, -1))


def save_latents(path: str | Path, latents: Float[Array, "B F h w C"]) -> None:
    """Writes a safetensors file of one tensor, `latents`, laid out as PyTorch has it: `[B, C, F, h, w]`.

    Raises:
        MediaError: The file cannot be written; nothing is left of it.
    """
    channels_first = np.ascontiguousarray(np.moveaxis(np.asarray(latents, np.float32), -1, 1))
    with atomic_write(path) as partial:
        partial.write_bytes(save({"latents": channels_first}))
