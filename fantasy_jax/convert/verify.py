"""Parity: a network run on a reference's inputs, with the reference's weights, against its outputs.

A reference is a folder of `config.json`, `weights.safetensors` (official key names) and
`activations.safetensors` (`input.*` and `output.*`, channels first as PyTorch has them), made by running the
original modules.
"""

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.convert.components import recognise
from fantasy_jax.convert.files import WeightsError, open_weights
from fantasy_jax.data.preprocessing import clip_pixels, normalise_waveform
from fantasy_jax.diffusion.flow import TRAIN_TIMESTEPS, sampling_sigmas, training_weight
from fantasy_jax.diffusion.sampler import SamplerConfig, SamplerInputs, sample
from fantasy_jax.models.adapters.audio import split_windows, window_ranges
from fantasy_jax.models.tiling import tiled_decode, tiled_encode
from fantasy_jax.typing import Array, DType

Activations = Mapping[str, np.ndarray]
Outputs = Iterator[tuple[str, np.ndarray | Array]]


@dataclass(frozen=True)
class Row:
    """How one output compares.

    Attributes:
        reference: Name of the reference folder.
        output: Name of the output.
        shape: Its shape.
        largest: Largest absolute difference.
        relative: Norm of the difference over norm of the reference.
        limit: What `relative` may be, 0 for outputs that must be equal; None where it is only reported.
    """

    reference: str
    output: str
    shape: tuple[int, ...]
    largest: float
    relative: float
    limit: float | None

    @property
    def verdict(self) -> str:
        """`pass`, `fail`, or `reported`."""
        if self.limit is None:
            return "reported"
        return "pass" if self.relative <= self.limit else "fail"


def verify(folder: str | Path, *, dtype: DType = jnp.float32) -> list[Row]:
    """Compares every output of a reference.

    Args:
        folder: The reference.
        dtype: Type of matrix products and weights; limits hold for float32 only.

    Raises:
        WeightsError: The folder is no reference, or of a network that is not known.
        ConversionError: Its weights do not fit.
    """
    folder = Path(folder)
    weights = open_weights(folder)
    name = weights.config.get("component")
    if name not in _RUNNERS:
        known = ", ".join(_RUNNERS)
        raise WeightsError(
            f"{folder}: config.json names the component {name!r}; what can be verified is {known}"
        )
    activations_file = open_weights(folder / "activations.safetensors")
    activations = {key: activations_file.read(key) for key in activations_file.specs}
    modules = {found.component.name: found.load(dtype) for found in recognise(weights)}
    rows = []
    with jax.default_matmul_precision("highest"):
        for output, value in _outputs(folder, _RUNNERS[name](modules, activations, weights.config)):
            if (expected := activations.get(f"output.{output}")) is None:
                continue  # a reference need not hold everything that can be computed
            limit = _limit(name, output, expected) if dtype == jnp.float32 else None
            rows.append(_compare(folder.name, output, np.asarray(value), expected, limit))
    wanted = {key for key in activations if key.startswith("output.")}
    if not wanted:
        raise WeightsError(f"{folder}: activations.safetensors holds no output.* to compare with")
    missed = wanted - {f"output.{row.output}" for row in rows}
    if missed:
        raise WeightsError(f"{folder}: nothing computes {', '.join(sorted(missed))}")
    return rows


def _outputs(folder: Path, computed: Outputs) -> Outputs:
    """What a runner computes; an input or a setting that it does not find becomes an error of the folder."""
    try:
        yield from computed
    except KeyError as error:
        raise WeightsError(f"{folder}: lacks {error.args[0]!r}, which its outputs are made from") from error


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| reference | output | shape | largest difference | relative difference | limit | |",
        "| --- | --- | --- | --: | --: | --: | --- |",
    ]
    for row in rows:
        limit = {None: "", 0.0: "equal"}.get(row.limit, f"{row.limit:.0e}" if row.limit else "")
        shape = " x ".join(map(str, row.shape))
        lines.append(
            f"| {row.reference} | {row.output} | {shape} | {row.largest:.1e} | {row.relative:.1e} | {limit} "
            f"| {row.verdict} |"
        )
    return "\n".join(lines)


def to_json(rows: list[Row]) -> str:
    """The rows as JSON."""
    return json.dumps([asdict(row) | {"verdict": row.verdict} for row in rows], indent=1)


def to_markdown(rows: list[Row], command: Sequence[str]) -> str:
    """The page `docs/parity.md`: the rows, how they come about, and with which versions.

    Args:
        rows: Of every reference.
        command: What the page says it is written by; an argument a line.
    """
    first, *arguments = command
    failed = sum(row.verdict == "fail" for row in rows)
    versions = [f"| {name} | {version} |" for name, version in _versions().items()]
    written_by = " \\\n    ".join([first, *arguments])
    return f"""{_PARITY.format(command=written_by)}
## Versions

| | |
| --- | --- |
{chr(10).join(versions)}

## References

{len(rows)} outputs compared, {failed} beyond their limit.

{table(rows)}
"""


_PARITY = """\
# Parity with PyTorch

This page is written by a command; do not edit it.

```
{command}
```

A reference holds small random weights under the official key names, inputs, and what the official modules
made of them in float32 on a CPU (wav2vec2: transformers' module). Here the modules that sample load the same
weights and run on the same inputs, with the highest precision of matrix products. The difference is
relative: norm of the difference over norm of the reference. A guided sample and UMT5 may be 5e-6 off,
everything else 2e-6; what is counted must be equal. References named `small_activations` have tiny inputs to
norms, so that a wrong epsilon shows.

The tests compare live, with whatever versions they find:

- `tests/test_end_to_end.py`: from picture, sound, prompt and noise to the final latents, within 1e-5; the
  encoders of transformers, the VAE of diffusers, and the transformer with its adapter written in PyTorch.
- `tests/test_wan_diffusers.py`, `tests/test_vae_diffusers.py`: layer by layer and whole, weights both ways.
- `tests/test_umt5.py`, `tests/test_clip_vision.py`, `tests/test_wav2vec2.py`: transformers, both ways.
- `tests/test_preprocessing.py`: what is done to picture, sound and text before, against Pillow, PyTorch,
  transformers, soxr and ftfy.
"""


def _versions() -> dict[str, str]:
    """Of what computes here, and of what the tests compare with."""
    found = {"computed on": jax.default_backend(), "python": platform.python_version()}
    for name in ("jax", "flax", "numpy", "torch", "transformers", "diffusers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _limit(component: str, output: str, expected: np.ndarray) -> float:
    """Float32's own floor with little room: looser limits have been seen to hide real faults."""
    if expected.dtype.kind in "iu":
        return 0.0
    return 5e-6 if component == "umt5_encoder" or output.startswith("sample_latents") else 2e-6


def _compare(
    reference: str, output: str, value: np.ndarray, expected: np.ndarray, limit: float | None
) -> Row:
    if value.shape != expected.shape:
        raise WeightsError(f"{reference}: {output} has shape {value.shape}, the reference {expected.shape}")
    difference = value.astype(np.float64) - expected.astype(np.float64)
    norm = np.linalg.norm(expected.astype(np.float64))
    relative = float(np.linalg.norm(difference) / norm) if norm else float(np.linalg.norm(difference))
    return Row(reference, output, expected.shape, float(np.abs(difference).max()), relative, limit)


def _channels_last(x: np.ndarray) -> Array:
    return jnp.asarray(np.moveaxis(x, 1, -1))


def _channels_first(x: Array) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def _run_fantasytalking(
    modules: Mapping[str, nnx.Module], activations: Activations, config: Mapping[str, Any]
) -> Outputs:
    """The transformer with the audio adapter: tokens, windows, velocities, and a guided sample."""
    model, adapter = modules["wan2.1_i2v_dit"], modules["fantasytalking"]
    model.adapters["audio"] = adapter
    num_frames, expand = config["num_frames"], config["expand_length"]
    inputs = {name.removeprefix("input."): x for name, x in activations.items() if name.startswith("input.")}
    latents, first_frame = (_channels_last(inputs[name]) for name in ("latents", "condition_latents"))
    features, image = jnp.asarray(inputs["audio_features"]), jnp.asarray(inputs["clip_features"])
    forward = nnx.jit(lambda model, *arguments: model(*arguments))

    def velocity(
        *, text: str = "text", timestep: float | None = None, scale: float = 1.0, clip_level: bool = False
    ) -> np.ndarray:
        conditions = model.conditions(jnp.asarray(inputs[text]), image)
        conditions["audio"] = (
            adapter.clip_level(features, num_frames, scale=scale)
            if clip_level
            else adapter.frame_level(features, num_frames, expand=expand, scale=scale)
        )
        time = inputs["timestep"] if timestep is None else np.array([timestep])
        return _channels_first(
            forward(model, latents, first_frame, jnp.asarray(time, jnp.float32), conditions)
        )

    tokens = adapter.tokens(features)
    yield "audio_tokens", tokens
    yield "velocity_audio_scale_1", velocity()
    if "output.sample_sigmas" not in activations:
        return
    ranges = window_ranges(tokens.shape[1], num_frames)
    windows, lengths = split_windows(tokens, window_ranges(tokens.shape[1], num_frames, expand=expand))
    yield "audio_window_ranges", ranges
    yield "audio_window_lengths", lengths
    yield "audio_windows", windows
    yield "velocity_audio_scale_0", velocity(scale=0.0)
    yield "velocity_audio_scale_0.5", velocity(scale=0.5)
    yield "velocity_clip_level", velocity(clip_level=True)
    yield "velocity_negative_text_audio_scale_0", velocity(text="negative_text", scale=0.0)
    yield "velocity_timestep_12.5", velocity(timestep=12.5)
    yield "velocity_timestep_999.75", velocity(timestep=999.75)

    settings = config["sampler"]
    sampler = SamplerConfig(
        steps=settings["steps"],
        shift=settings["shift"],
        prompt_scale=settings["prompt_cfg_scale"],
        audio_scale=settings["audio_cfg_scale"],
        loudness=settings["audio_scale"],
    )
    sigmas = sampling_sigmas(sampler.steps, sampler.shift)[:-1]
    yield "sample_sigmas", sigmas
    yield "sample_timesteps", TRAIN_TIMESTEPS * sigmas
    train = TRAIN_TIMESTEPS * sampling_sigmas(TRAIN_TIMESTEPS, sampler.shift)[:-1]
    yield "train_timesteps_1000", train
    yield "train_weights_1000", training_weight(jnp.asarray(train), shift=sampler.shift)
    steps: list[np.ndarray] = []
    texts = (jnp.asarray(inputs[name]) for name in ("text", "negative_text"))
    sampled = SamplerInputs(first_frame, *texts, image, features)
    sample(model, latents, sampled, sampler, each_step=lambda _, x: steps.append(_channels_first(x)))
    for number, x in enumerate(steps, 1):
        yield f"sample_latents_step{number}", x


def _run_vae(
    modules: Mapping[str, nnx.Module], activations: Activations, config: Mapping[str, Any]
) -> Outputs:
    """Encode and decode, whole and in tiles."""
    vae = modules["wan_vae"]
    encode, decode = nnx.jit(lambda vae, x: vae.encode(x)), nnx.jit(lambda vae, x: vae.decode(x))
    yield "latents", _channels_first(encode(vae, _channels_last(activations["input.video"])))
    yield "decoded", _channels_first(decode(vae, _channels_last(activations["output.latents"])))
    if "input.video_tiled" not in activations:
        return
    tiles = {
        name: tuple(config["tile_latents"][key]) for name, key in (("tile", "size"), ("stride", "stride"))
    }
    tiled = tiled_encode(vae, _channels_last(activations["input.video_tiled"]), **tiles)
    yield "latents_tiled", _channels_first(tiled)
    tiled = tiled_decode(vae, _channels_last(activations["output.latents_tiled"]), **tiles)
    yield "decoded_tiled", _channels_first(tiled)


def _run_umt5(
    modules: Mapping[str, nnx.Module], activations: Activations, config: Mapping[str, Any]
) -> Outputs:
    ids, mask = (jnp.asarray(activations[f"input.{name}"], jnp.int32) for name in ("ids", "mask"))
    yield "hidden", modules["umt5_encoder"](ids, mask.sum(axis=1, dtype=jnp.int32))


def _run_clip(
    modules: Mapping[str, nnx.Module], activations: Activations, config: Mapping[str, Any]
) -> Outputs:
    pixels = clip_pixels(_channels_last(activations["input.image"]), config["image_size"])
    yield "pixel_values", _channels_first(pixels)
    yield "features", modules["clip_vision"](pixels)


def _run_wav2vec2(
    modules: Mapping[str, nnx.Module], activations: Activations, config: Mapping[str, Any]
) -> Outputs:
    normalised = np.stack([normalise_waveform(x) for x in np.asarray(activations["input.waveform"])])
    yield "input_values", normalised
    yield "last_hidden_state", modules["wav2vec2"](jnp.asarray(normalised))


_RUNNERS: dict[str, Callable[[Mapping[str, nnx.Module], Activations, Mapping[str, Any]], Outputs]] = {
    "fantasytalking_dit": _run_fantasytalking,
    "wan_vae": _run_vae,
    "umt5_encoder": _run_umt5,
    "clip_vision": _run_clip,
    "wav2vec2": _run_wav2vec2,
}
