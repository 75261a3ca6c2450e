"""Clips of any length: windows that overlap are denoised together, as one track of latents.

The transformer is trained on clips of one window. In each step, the velocity of every window is predicted
alone, and the velocities are cross-faded where windows overlap; the solver then advances the whole track.
Every window is conditioned on the picture, so that nothing drifts. No training is needed.

Source: the joint denoising of StableAvatar (`wan/pipeline/wan_inference_long_pipeline.py`). There and
elsewhere a later window begins with a latent of the track, in the position that the transformer knows as the
single frame of the picture. Here it begins with the picture itself, at the step's noise level (anchor
`picture`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.diffusion.flow import add_noise
from fantasy_jax.errors import ConfigError
from fantasy_jax.system.conditioning import Conditions
from fantasy_jax.typing import Array, Float, Float32, Int, Leaf

Anchor = Literal["picture", "preceding", "track"]
"""What the first position of a later window holds: the picture's latent at the step's noise level, or the
latent before the window, both of which are thrown away after the step; or the window's own first latent."""

Guided = Callable[[Array, Array, Conditions], Array]
"""The guided velocity: of latents `[B, W, h, w, C]`, sigma, and conditions with an axis of branches first."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Windows:
    """Windows of a track in one step.

    Attributes:
        frames: Latent frames of the track that each window holds, int32 `[N, W]`.
        weights: Their weights, float32 `[N, W]`; over all windows, those of each latent frame sum to one.
        anchored: Windows whose first position holds the picture's latent in place of the track's, bool `[N]`.
        reference: Row of the first-frame condition and of the image that each window has, int32 `[N]`.
        noise: Noise of the picture's latent, `[1, 1, h, w, C]`; set by the sampler.
    """

    frames: Leaf
    weights: Leaf
    anchored: Leaf
    reference: Leaf
    noise: Leaf = None


@dataclass(frozen=True)
class WindowSchedule:
    """Where the windows of a track lie in each step.

    Attributes:
        num_frames: Latent frames F of the track.
        window: Latent frames W of a window.
        overlap: Latent frames that neighbouring windows share at least.
        anchor: What the first position of a later window holds.
        moving: Whether inner windows lie elsewhere in each step, which takes one more window.
        continues: Whether the track goes on from another one, so that its first window is a later window.
        references: Latent frames at which the rows of the first-frame condition and of the image are taken; a
            window has the last one that is not after its start.
    """

    num_frames: int
    window: int
    overlap: int = 5
    anchor: Anchor = "picture"
    moving: bool = False
    continues: bool = False
    references: tuple[int, ...] = (0,)

    def __post_init__(self):
        if not 1 <= self.overlap < self.useful:
            raise ConfigError(
                f"overlap is {self.overlap}; it must be at least 1 and less than the {self.useful} latent "
                "frames that a window adds"
            )

    @property
    def useful(self) -> int:
        """Latent frames of the track in a later window."""
        return self.window if self.anchor == "track" else self.window - 1

    @property
    def _first(self) -> int:
        """Latent frames of the track in the first window."""
        return self.useful if self.continues else self.window

    @property
    def count(self) -> int:
        """Number of windows, without those that only fill a group of devices."""
        rest = max(self.num_frames - self._first, 0)
        count = 1 + -(-rest // (self.useful - self.overlap))
        return count + 1 if self.moving and count > 1 else count

    def starts(self, step: int = 0) -> list[int]:
        """First latent frame of the track in each window, evenly spread."""
        rest, offset = max(self.num_frames - self._first, 0), self._first - self.useful
        if not self.moving or self.count == 1:
            places = np.linspace(0, rest, self.count)
        else:
            spacing = rest / (self.count - 2)
            inner = (np.arange(self.count - 2) + bit_reversal(step)) * spacing
            places = np.array([0, *inner, rest])
        later = [offset + round(place) for place in places[1:]]
        return [0, *later]

    def at(self, step: int = 0, *, multiple: int = 1) -> Windows:
        """The windows of a step, filled up to a multiple with windows of weight zero."""
        starts = self.starts(step)
        ends = [min(self._first, self.num_frames), *(start + self.useful for start in starts[1:])]
        frames, weights = [], []
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            # Frames before the first and after the last one are filled by these, with weight zero.
            lead = self.window - (end - start) if self._is_later(i) else 0
            held = np.arange(start - lead, start - lead + self.window)
            before = ends[i - 1] if i else start
            after = starts[i + 1] if i + 1 < len(starts) else end
            # The first latent of a window of the anchor `track` stands where the picture's belongs.
            rise = partial(_rise, from_zero=self.anchor == "track")
            fade = rise(held - start, before - start) * (1 - rise(held - after, end - after))
            frames.append(np.clip(held, 0, self.num_frames - 1))
            weights.append(np.where((held >= start) & (held < end), fade, 0))
        anchored = [self.anchor == "picture" and self._is_later(i) for i in range(len(starts))]
        rows = np.maximum(np.searchsorted(self.references, starts, side="right") - 1, 0)
        missing = -len(frames) % multiple
        return Windows(
            frames=np.pad(frames, ((0, missing), (0, 0)), "edge").astype(np.int32),
            weights=np.pad(_normalised(frames, weights, self.num_frames), ((0, missing), (0, 0))),
            anchored=np.pad(anchored, (0, missing)),
            reference=np.pad(rows, (0, missing)).astype(np.int32),
        )

    def _is_later(self, index: int) -> bool:
        return (index > 0 or self.continues) and self.anchor != "track"


def bit_reversal(step: int) -> float:
    """The van der Corput sequence in base 2: numbers in [0, 1) that are spread evenly from the start."""
    return int(f"{step:b}"[::-1], 2) / 2 ** max(step.bit_length(), 1)


def _rise(position: Int[np.ndarray, " W"], length: int, *, from_zero: bool) -> Float[np.ndarray, " W"]:
    """A ramp over `length` positions, 0 before it and 1 after it; its own first value is 0 or above."""
    if from_zero:
        return np.clip(position / max(length - 1, 1), 0, 1) if length else (position >= 0).astype(float)
    return np.clip((position + 1) / (length + 1), 0, 1)


def _normalised(
    frames: Sequence[Int[np.ndarray, " W"]], weights: Sequence[Float[np.ndarray, " W"]], num_frames: int
) -> Float32[np.ndarray, "N W"]:
    """Weights whose sum over windows is one in each latent frame."""
    total = np.zeros(num_frames)
    np.add.at(total, np.array(frames), np.array(weights))
    if not (total > 0).all():
        raise ValueError(f"no window has weight in latent frames {np.flatnonzero(total <= 0).tolist()}")
    return (np.array(weights) / total[np.array(frames)]).astype(np.float32)


def windowed(guided: Guided, windows: Windows, group: int) -> Guided:
    """Wraps a guided velocity so that it is predicted window by window and cross-faded.

    Args:
        guided: Of clips of one window, with conditions of such clips.
        windows: Windows of the step; their number is a multiple of `group`.
        group: Windows that are predicted at once, as a batch. Groups follow each other, so that memory is
            that of one group.

    Returns:
        A guided velocity of a track, `[1, F, h, w, C]`. Its conditions span the whole track, except those of
        the first frame and the image, which have a row for each `reference`.
    """

    def run(
        track: Float[Array, "1 F h w C"], sigma: Float[Array, ""], conditions: Conditions
    ) -> Float[Array, "1 F h w C"]:
        def add(total: Array, some: Windows) -> tuple[Array, None]:
            cut = jax.vmap(lambda x: x.at_frames(some.frames, some.reference))(conditions)
            latents = track[0, some.frames]
            # The picture alone is encoded to one latent frame, the first of the first-frame condition.
            picture = cut.first_frame[-1, :, 0, ..., -track.shape[-1] :]
            level = jnp.broadcast_to(sigma, len(picture))
            noised = add_noise(picture, jnp.broadcast_to(windows.noise[:, 0], picture.shape), level)
            first = jnp.where(some.anchored[:, None, None, None], noised, latents[:, 0])
            velocity = guided(latents.at[:, 0].set(first), sigma, cut)
            weighted = velocity * some.weights[..., None, None, None]
            return total.at[some.frames].add(weighted), None

        parts = (windows.frames, windows.weights, windows.anchored, windows.reference)
        groups = Windows(*(x.reshape(-1, group, *x.shape[1:]) for x in map(jnp.asarray, parts)))
        total, _ = jax.lax.scan(add, jnp.zeros(track.shape[1:], jnp.float32), groups)
        return total[None]

    return run
