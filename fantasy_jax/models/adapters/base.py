"""The interface of adapters: conditions that can be added to the transformer."""

from typing import Any, ClassVar, Literal

from flax import nnx

from fantasy_jax.models.condition import Condition, KVProjection
from fantasy_jax.typing import Array, Float
from fantasy_jax.video import VideoConfig


class Adapter(nnx.Module):
    """Turns one input of a clip into tokens for cross-attention, or into an offset of the timestep embedding.

    A subclass defines one of the two methods, as `gives` says.

    Attributes:
        input: Name of its field in `system.inputs.ClipInputs.adapters`.
        dropout_group: The group with which it is dropped in training and left out in guidance; None: it never
            is.
        gives: `tokens` that cross-attention attends to, or a `time_offset`, added to the timestep embedding.
        per_person: Whether the input has a leading axis of people, `[P, ...]`: `never`, `always`, or only in
            clips of `several` people, each with an input of their own.
        default_scale: Multiplier of the attended values.
        layers: Stacked key and value projections of all blocks, of an adapter that gives tokens.
    """

    input: ClassVar[str]
    dropout_group: ClassVar[str | None] = None
    gives: ClassVar[Literal["tokens", "time_offset"]] = "tokens"
    per_person: ClassVar[Literal["never", "always", "several"]] = "never"
    default_scale: ClassVar[float] = 1.0
    layers: KVProjection

    @property
    def masked(self) -> bool:
        """Whether video tokens that show a person attend to that person's input only."""
        return True

    @classmethod
    def input_shape(cls, config: Any, video: VideoConfig) -> tuple[int, ...]:
        """Shape of one clip's input, of one person where it is given per person.

        Args:
            config: Sizes of the adapter.
            video: Size and length of the clip.
        """
        raise NotImplementedError

    def condition(
        self, features: Float[Array, "B ..."], num_frames: int, *, scale: float | Float[Array, " B"] = 1.0
    ) -> Condition:
        """Tokens that the blocks attend to.

        Args:
            features: The adapter's input.
            num_frames: Video frames T = 4k + 1 of the clip.
            scale: Multiplier of the attended values.
        """
        raise NotImplementedError

    def time_offset(self, features: Float[Array, "B ..."]) -> Float[Array, "B D"]:
        """An offset that is added to the timestep embedding."""
        raise NotImplementedError
