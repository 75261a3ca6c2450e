"""Clips of any length: windows that overlap are denoised together, as one track of latents.

The transformer is trained on clips of one window. In each step, the velocity of every window is predicted
alone, and the velocities are cross-faded where windows overlap; the solver then advances the whole track.
Every window is conditioned on the picture, so that nothing drifts. No training is needed.

Source: the joint denoising of StableAvatar (`wan/pipeline/wan_inference_long_pipeline.py`). There and
elsewhere a later window begins with a latent of the track, in the position that the transformer knows as the
single frame of the picture. Here it begins with the picture itself, at the step's noise level (anchor
`picture`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.diffusion.flow import add_noise
from fantasy_jax.errors import ConfigError
from fantasy_jax.sharding import constrain, constrain_last
from fantasy_jax.system.conditioning import Conditions
from fantasy_jax.typing import Array, Float, Float32, Int, Leaf

Anchor = Literal["picture", "preceding", "track"]
"""What the first position of a later window holds: the picture's latent at the step's noise level, or the
latent before the window, both of which are thrown away after the step; or the window's own first latent."""

Residuals = tuple[Leaf, ...]
"""Values that the blocks add to the tokens, for each branch (`diffusion/caching.py`); empty if not cached."""
Guided = Callable[[Array, Array, Conditions, Residuals], tuple[tuple[Array, ...], Residuals]]
"""Computes the guided velocity from latents `[B, W, h, w, C]`, sigma, conditions with an axis of branches
first, and residuals that are added in place of running the blocks. Returns fields of the shape of the
latents, the first of which is the velocity, and the residuals that are kept."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Windows:
    """Windows of a track in one step.

    Attributes:
        start: First latent frame of the track that each window holds, int32 `[N]`.
        weights: Weights of its latent frames, float32 `[N, W]`; those of each frame of the track sum to
            one.
        anchored: Windows whose first position holds the picture's latent in place of the track's, bool `[N]`.
        reference: Row of the first-frame condition and of the image that each window has, int32 `[N]`.
        noise: Noise of the picture's latent, `[1, 1, h, w, C]`; set by the sampler.
    """

    start: Leaf
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
        continues: Whether the track goes on from another one, so that its first window is a later window, and
            its first latent frame, which is held, only the one before the window.
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
        if self.num_frames < self.window:
            raise ValueError(f"a track of {self.num_frames} latent frames is shorter than a window")
        if self.num_frames > self.window and not 1 <= self.overlap < self.useful:
            raise ConfigError(
                f"overlap is {self.overlap}; it must be at least 1 and less than the {self.useful} latent "
                "frames that a window adds"
            )

    @classmethod
    def single(cls, num_frames: int) -> "WindowSchedule":
        """The only window of a clip that is no longer than the model's."""
        return cls(num_frames, num_frames)

    @property
    def useful(self) -> int:
        """Latent frames of the track in a later window."""
        return self.window if self.anchor == "track" else self.window - 1

    @property
    def count(self) -> int:
        """Number of windows, without those that only fill a group of devices."""
        if self.num_frames == self.window:
            return 1
        count = 1 + -(-(self.num_frames - self.window) // (self.useful - self.overlap))
        return count + 1 if self.moving else count

    def starts(self, step: int = 0) -> list[int]:
        """First latent frame of the track in each window, evenly spread."""
        rest = self.num_frames - self.window
        if not self.moving or self.count == 1:
            places = np.linspace(0, rest, self.count)
        else:
            spacing = rest / (self.count - 2)
            inner = (np.arange(self.count - 2) + bit_reversal(step)) * spacing
            places = np.array([0, *inner, rest])
        return [round(place) for place in places]

    def at(self, step: int = 0, *, multiple: int = 1) -> Windows:
        """The windows of a step, filled up to a multiple with windows of weight zero."""
        starts = np.array(self.starts(step))
        later = np.arange(len(starts)) > (-1 if self.continues else 0)
        # What a window adds to the track begins after the position that is thrown away.
        begins = (starts + np.where(later, self.window - self.useful, 0)).tolist()
        ends = (starts + self.window).tolist()
        rise = partial(_rise, from_zero=self.anchor == "track")
        weights = np.zeros((len(starts), self.window))
        for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            held = starts[i] + np.arange(self.window)
            before = ends[i - 1] if i else begin
            after = begins[i + 1] if i + 1 < len(starts) else end
            fade = rise(held - begin, before - begin) * (1 - rise(held - after, end - after))
            weights[i] = np.where(held >= begin, fade, 0)
        rows = np.maximum(np.searchsorted(self.references, starts, side="right") - 1, 0)
        missing = -len(starts) % multiple
        return Windows(
            start=np.pad(starts, (0, missing), "edge").astype(np.int32),
            weights=np.pad(self._normalised(starts, weights), ((0, missing), (0, 0))),
            anchored=np.pad(later & (self.anchor == "picture"), (0, missing)),
            reference=np.pad(rows, (0, missing)).astype(np.int32),
        )

    def _normalised(
        self, starts: Int[np.ndarray, " N"], weights: Float[np.ndarray, "N W"]
    ) -> Float32[np.ndarray, "N W"]:
        """Weights whose sum over windows is one in each latent frame, except one that is only held."""
        frames = starts[:, None] + np.arange(self.window)
        total = np.zeros(self.num_frames)
        np.add.at(total, frames, weights)
        if self.continues:
            total[0] = 1
        if not (total > 0).all():
            raise ValueError(f"no window has weight in latent frames {np.flatnonzero(total <= 0).tolist()}")
        return (weights / total[frames]).astype(np.float32)


def bit_reversal(step: int) -> float:
    """The van der Corput sequence in base 2: numbers in [0, 1) that are spread evenly from the start."""
    return int(f"{step:b}"[::-1], 2) / 2 ** max(step.bit_length(), 1)


def _rise(position: Int[np.ndarray, " W"], length: int, *, from_zero: bool) -> Float[np.ndarray, " W"]:
    """A ramp over `length` positions, 0 before it and 1 after it; its own first value is 0 or above."""
    if from_zero:
        # The first latent of a window of the anchor `track` stands where the picture's belongs.
        return np.clip(position / max(length - 1, 1), 0, 1) if length else (position >= 0).astype(float)
    return np.clip((position + 1) / (length + 1), 0, 1)


def windowed(guided: Guided, windows: Windows, group: int, fields: int = 1) -> Guided:
    """Wraps a guided velocity so that it is predicted window by window and cross-faded.

    Args:
        guided: Of clips of one window, with conditions of such clips.
        windows: Windows of the step; their number is a multiple of `group`.
        group: Windows that are predicted at once, as a batch. Groups follow each other, so that memory is
            that of one group.
        fields: Number of fields that it gives, which are cross-faded alike.

    Returns:
        A guided velocity of a track, `[1, F, h, w, C]`. Its conditions span the whole track, except those of
        the first frame and the image, which have a row for each `reference`. Residuals have an axis of groups
        first.
    """

    def run(
        track: Float[Array, "1 F h w C"],
        sigma: Float[Array, ""],
        conditions: Conditions,
        residuals: Residuals,
    ) -> tuple[tuple[Float[Array, "1 F h w C"], ...], Residuals]:
        length, (_, num_frames, *size) = windows.weights.shape[1], track.shape
        flat, conditions = _spread(track.reshape(num_frames, -1)), _spread_tokens(conditions)

        def cut(some: Windows) -> tuple[Array, Conditions]:
            latents = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, flat, slice_size=length))(some.start)
            given = jax.vmap(lambda x: x.at_frames(some.start, length, some.reference))(conditions)
            return latents.reshape(-1, length, *size), given

        def add(
            totals: tuple[Array, ...], part: tuple[Windows, Residuals]
        ) -> tuple[tuple[Array, ...], Residuals]:
            some, added = part
            latents, given = cut(some)
            # The picture alone is encoded to one latent frame, the first of the first-frame condition.
            picture = given.first_frame[-1, :, 0, ..., -size[-1] :]
            level = jnp.broadcast_to(sigma, len(picture))
            noised = add_noise(picture, jnp.broadcast_to(windows.noise[:, 0], picture.shape), level)
            first = jnp.where(some.anchored[:, None, None, None], noised, latents[:, 0])
            # The transformer's activations are not sharded as the track is.
            latents = constrain(latents.at[:, 0].set(first), "batch", None, None, None, None)
            predicted, kept = guided(latents, sigma, given, added)
            frames = some.start[:, None] + jnp.arange(length)

            def faded(total: Array, field: Array) -> Array:
                field = constrain(field, "batch", None, None, None, None)
                weighted = field.reshape(-1, length, flat.shape[1]) * some.weights[..., None]
                return _spread(total.at[frames].add(weighted))

            return tuple(map(faded, totals, predicted)), kept

        parts = (windows.start, windows.weights, windows.anchored, windows.reference)
        groups = Windows(*(x.reshape(-1, group, *x.shape[1:]) for x in map(jnp.asarray, parts)))
        zeros = (_spread(jnp.zeros(flat.shape, jnp.float32)),) * fields
        totals, kept = jax.lax.scan(add, zeros, (groups, residuals))
        return tuple(total.reshape(track.shape) for total in totals), kept

    return run


def _spread(x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
    """Shards what spans a track over the devices that share a clip, so that none has another whole one."""
    return constrain_last(x, "rows")


def _spread_tokens(conditions: Conditions) -> Conditions:
    """Conditions whose tokens per latent frame are sharded likewise; they have an axis of branches first."""
    attended = {
        name: replace(x, tokens=_spread(x.tokens)) if x.rows is None and x.tokens.ndim > 4 else x
        for name, x in conditions.attended.items()
    }
    return replace(conditions, attended=attended)
