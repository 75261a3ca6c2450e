"""Settings of sampling, and the file in a store that holds a pipeline's defaults."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fantasy_jax.config import Factor, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, as_json, build
from fantasy_jax.diffusion.guidance import GuidanceBranch, Scale, guidance_branches
from fantasy_jax.diffusion.sampler import SamplerConfig
from fantasy_jax.diffusion.windows import Anchor, WindowSchedule
from fantasy_jax.errors import ConfigError, WeightsError
from fantasy_jax.files import atomic_write, parse_json
from fantasy_jax.models.adapters.audio import AudioAttention
from fantasy_jax.models.adapters.identity import IDENTITY_SCALE
from fantasy_jax.models.adapters.motion import NEUTRAL
from fantasy_jax.preprocessing.driving import DrivingConfig
from fantasy_jax.preprocessing.landmarks import LandmarkConfig
from fantasy_jax.sharding import MeshConfig, WeightsMemory
from fantasy_jax.system.conditioning import AdapterOptions
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.streaming import Tiling
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.checksums import SUMS, damaged_files, skipped, write_sums
from fantasy_jax.weights.lora import LoRAFile

PIPELINE_FILE = "pipeline.json"

NEGATIVE_PROMPT = (
    "人物静止不动，静止，色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The official script's."""


NEGATIVE_PROMPT_SEVERAL = "人物嘴巴不停地说话，" + NEGATIVE_PROMPT
"""That of the official script for several people."""


@dataclass(frozen=True)
class PipelineConfig(SamplerConfig):
    """How a pipeline samples a clip.

    Attributes:
        text_guidance_scale: Guidance scale of the prompt, a number or a schedule over the steps.
        negative_prompt: What the video should not show.
        mesh: Sizes of the mesh; `tensor` shards weights, too. In the VAE, `context` and `tensor` together
            share the rows.
        merge_lora: Whether LoRAs are added to the weights. Beside them a LoRA costs a percent more operations
            (at rank 32), and nothing is rounded.
        loras: LoRA files of other programs, whose changes add up; `from_pretrained` reads them.
        keep: Networks that stay in memory between clips.
        weights_memory: Where the weights of a store's transformer and its adapters lie: `host` copies each
            block to the device when it runs, and takes the same values to the same result. For one device.
        eight_bit_products: Whether the transformer's MLPs multiply in 8 bits, which changes the result; the
            store's weights must have 8 bits (`convert_weights.py quantize`).
        vae_dtype: Type of the VAE's weights and products; None: that of the model.
        tiling: Whether one device decodes in tiles: `auto` where the whole image does not fit its memory,
            `on` as the official scripts do, `off` never.
        tile: Rows and columns of latents of a tile.
        tile_stride: Rows and columns from one tile to the next; overlaps are blended.
        start: Seconds of sound, or of driving videos, that are left out at the beginning.
        max_seconds: Seconds of sound, or of driving videos, that are used after that; None: all.
        overlap: Latent frames that neighbouring windows of a long clip share (`diffusion/windows.py`). More
            are smoother and cost more: with 5 of 21, 1.4 times the evaluations of a clip per second.
        anchor: What the first position of a later window holds.
        moving: Whether windows move from step to step, which takes one more window.
    """

    batch_branches: bool = False  # at full size each branch fills a device
    text_guidance_scale: Scale = 5.0
    negative_prompt: str = NEGATIVE_PROMPT
    mesh: MeshConfig = MeshConfig(fsdp=1)
    merge_lora: bool = True
    loras: tuple[LoRAFile, ...] = ()
    keep: Literal["all", "transformer", "none"] = "none"
    weights_memory: WeightsMemory = "device"
    eight_bit_products: bool = False
    vae_dtype: Literal["float32", "bfloat16"] | None = None
    tiling: Tiling = "auto"
    tile: tuple[PositiveInt, PositiveInt] = (30, 52)
    tile_stride: tuple[PositiveInt, PositiveInt] = (15, 26)
    start: NonNegativeFloat = 0.0
    max_seconds: PositiveFloat | None = None
    overlap: PositiveInt = 5
    anchor: Anchor = "picture"
    moving: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not all(stride <= tile for tile, stride in zip(self.tile, self.tile_stride, strict=True)):
            raise ConfigError(f"tile_stride {self.tile_stride} must be at most tile {self.tile}")
        if self.moving and self.magcache.curve is not None:
            raise ConfigError(
                "moving is True, but MagCache needs windows that stay; set moving to False, or "
                "magcache.curve to None"
            )
        self.evaluation_plan(self.guidance)  # finds a curve that does not fit before any work

    def windows(self, clip: VideoConfig, window: VideoConfig) -> WindowSchedule | None:
        """The windows of a clip; None if it is a single one.

        Raises:
            ConfigError: `overlap` does not fit.
        """
        if clip.num_frames <= window.num_frames:
            return None
        return WindowSchedule(
            clip.latent_frames, window.latent_frames, self.overlap, self.anchor, self.moving
        )

    @property
    def guidance(self) -> tuple[GuidanceBranch, ...]:
        """The branches of guidance."""
        return guidance_branches(self.num_inference_steps, self.text_guidance_scale)

    @property
    def needs_negative_prompt(self) -> bool:
        """Whether a branch replaces the prompt."""
        return any("text" in branch.dropped for branch in self.guidance)

    @property
    def adapter_options(self) -> AdapterOptions:
        """Keyword arguments of the adapters."""
        return {}

    @property
    def decoding(self) -> dict[str, Any]:
        """Keyword arguments of `system.streaming.StreamingDecoder` and `plan_decoding`."""
        return {"tiling": self.tiling, "tile": self.tile, "stride": self.tile_stride}


@dataclass(frozen=True)
class SampleConfig(PipelineConfig):
    """How FantasyTalking samples a clip; the defaults are the official script's.

    Attributes:
        audio_guidance_scale: Guidance scale of the audio, a number or a schedule over the steps.
        audio_attention: Whether each latent frame attends to its own window of the audio (second training
            stage, and the released weights) or every token to the whole clip (first stage).
        audio_attention_scale: Multiplier of the audio cross-attention in the branch that has audio.
        identity_scale: Multiplier of the identity cross-attention, for a model with an identity adapter.
        motion_scale: Extrapolation of the motion intensities away from neutral, for a model with a motion
            adapter; 1 is as trained, more helps where training was short.
        face_motion: Intensity of the face's motion, in [0, 1] of the training clips; needs a motion adapter.
            The paper's subtle, natural and intense clips have 0.1, 0.5 and 1 for face and body.
        body_motion: Intensity of the body's motion, likewise.
        landmarks: Settings of the face detector, for a model with an identity adapter.
        face_box: The head's left, top, right and bottom as fractions of the image, for drawings in which no
            detector finds a face. None: the face is detected.
        face: Number of the face where there are several, from 1, counted from the left; None: the largest.
        strength: Noise level at which the dubbing of a video starts from the source, in [0, 1]; 1 starts from
            noise. Below 0.8 the old mouth shows through.
    """

    audio_guidance_scale: Scale = 5.0
    audio_attention: AudioAttention = "frame"
    audio_attention_scale: Factor = 1.0
    identity_scale: Factor = IDENTITY_SCALE
    motion_scale: Factor = 1.0
    face_motion: Fraction = NEUTRAL
    body_motion: Fraction = NEUTRAL
    landmarks: LandmarkConfig = LandmarkConfig()
    face_box: tuple[Fraction, Fraction, Fraction, Fraction] | None = None
    face: PositiveInt | None = None
    strength: Fraction = 1.0

    def windows(self, clip: VideoConfig, window: VideoConfig) -> WindowSchedule | None:
        """As of every pipeline; ConfigError, too, if a long clip would attend to all of its audio at once."""
        windows = super().windows(clip, window)
        if windows is not None and self.audio_attention == "clip":
            raise ConfigError(
                f"audio_attention is 'clip', which spans a single window of {window.seconds:.2f} s; use "
                "'frame', or set max_seconds"
            )
        return windows

    @property
    def guidance(self) -> tuple[GuidanceBranch, ...]:
        """The branches of guidance."""
        return guidance_branches(
            self.num_inference_steps, self.text_guidance_scale, self.audio_guidance_scale, "audio"
        )

    @property
    def adapter_options(self) -> AdapterOptions:
        """Keyword arguments of the adapters."""
        return {
            "audio": {"attention": self.audio_attention, "scale": self.audio_attention_scale},
            "identity": {"scale": self.identity_scale},
            "motion": {"scale": self.motion_scale},
        }


@dataclass(frozen=True)
class PortraitSampleConfig(PipelineConfig):
    """How FantasyPortrait samples a clip; the defaults are the official scripts'.

    Attributes:
        expression_guidance_scale: Guidance scale of the expression, a number or a schedule over the steps.
        expression_attention_scale: Multiplier of the expression cross-attention in the branch that has it.
        driving: Settings of the face detector and of tracking.
    """

    text_guidance_scale: Scale = 1.0  # no negative prompt: two branches
    negative_prompt: str = NEGATIVE_PROMPT_SEVERAL
    expression_guidance_scale: Scale = 4.0
    expression_attention_scale: Factor = 1.0
    driving: DrivingConfig = DrivingConfig()

    @property
    def guidance(self) -> tuple[GuidanceBranch, ...]:
        """The branches of guidance."""
        return guidance_branches(
            self.num_inference_steps, self.text_guidance_scale, self.expression_guidance_scale, "expression"
        )

    @property
    def adapter_options(self) -> AdapterOptions:
        """Keyword arguments of the adapters."""
        return {"expression": {"scale": self.expression_attention_scale}}


def check_motion(model: ModelConfig, config: SampleConfig) -> None:
    """Raises a ConfigError if a motion is asked for that the model has no adapter for."""
    wanted = (config.face_motion, config.body_motion)
    if model.motion_adapter is None and wanted != (NEUTRAL, NEUTRAL):
        raise ConfigError(
            f"sample.face_motion and sample.body_motion are {wanted[0]} and {wanted[1]}, but the model has "
            f"no motion_adapter; leave them at {NEUTRAL}, or use a model with one"
        )


def write_pipeline(directory: str | Path, pipeline: str, video: VideoConfig, sample: Any) -> None:
    """Writes a store's `pipeline.json`, from which `from_pretrained` takes its defaults.

    Args:
        directory: The store.
        pipeline: Name of the pipeline's class.
        video: Size and length of clips.
        sample: Settings of sampling.
    """
    content = {"pipeline": pipeline, "video": as_json(video), "sample": as_json(sample)}
    with atomic_write(Path(directory) / PIPELINE_FILE) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_sums(Path(directory), [PIPELINE_FILE])


def check_pipeline(directory: str | Path, pipeline: str) -> dict[str, Any]:
    """The content of a store's `pipeline.json`; empty where there is none.

    Raises:
        WeightsError: The file is damaged, or the store was made for another pipeline.
    """
    path = Path(directory) / PIPELINE_FILE
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        name = content["pipeline"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: damaged ({error}); delete it to use the default settings") from error
    if not skipped() and damaged_files(path.parent, PIPELINE_FILE):
        raise WeightsError(f"{path}: differs from its checksum in {SUMS}; if that is meant, delete {SUMS}")
    if name != pipeline:
        raise WeightsError(f"{directory}: is a store of {name}, but {pipeline} is asked for; use its config")
    return content


def read_pipeline(
    directory: str | Path, pipeline: str, config_type: type[PipelineConfig]
) -> tuple[VideoConfig, PipelineConfig]:
    """The settings of a store's `pipeline.json`; the official script's where there is none.

    Args:
        directory: The store.
        pipeline: Name of the pipeline's class.
        config_type: Class of its settings of sampling.

    Raises:
        WeightsError: The file is damaged, or the store was made for another pipeline.
    """
    content = check_pipeline(directory, pipeline)
    try:
        video = build(VideoConfig, content.get("video", {}), "video")
        return video, build(config_type, content.get("sample", {}), "sample")
    except ConfigError as error:
        raise WeightsError(f"{Path(directory) / PIPELINE_FILE}: {error}") from error
