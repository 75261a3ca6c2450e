"""What approximations cost: held-out clips by exact sampling, and from the same noise by each method.

    .venv/bin/python -m fantasy_jax.miniature.approximate --config=configs/tiny.py --clips=16

The exact steps are also those from which the curve of MagCache is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fantasy_jax import cli
from fantasy_jax.diffusion.guidance import GatingConfig
from fantasy_jax.diffusion.magcache import Calibration, MagCacheConfig, MagnitudeCurve
from fantasy_jax.evaluation.metrics import psnr
from fantasy_jax.miniature.held_out import (
    Figure,
    HeldOutClips,
    add_arguments,
    check_json,
    figure,
    load_held_out,
    write_figures,
)
from fantasy_jax.typing import Float, UInt8

EXAMPLES = """\
examples:
  all methods at the config's number of steps, and fewer steps:
  python -m fantasy_jax.miniature.approximate --config=configs/tiny.py --clips=16 --json=out/approximate.json

  with guidance by the prompt, too, in the 30 steps of the 14B model:
  python -m fantasy_jax.miniature.approximate --config=configs/tiny.py --clips=16 \\
      --config.sample.text_guidance_scale=3 --config.sample.num_inference_steps=30
"""

Settings = Callable[[MagnitudeCurve], Mapping[str, Any]]
"""Changes of the sampling settings, given the curve of the exact steps."""


def _gated(text: float, adapter: float) -> dict[str, Any]:
    return {"gating": GatingConfig(True, text, adapter)}


def _skipping(curve: MagnitudeCurve, bound: float, skips: int) -> dict[str, Any]:
    return {"magcache": MagCacheConfig(curve, bound, skips)}


EXACT = {"gating": GatingConfig(), "magcache": MagCacheConfig(), "vae_dtype": None}
"""The settings of exact sampling, whatever the config has."""

METHODS: dict[str, Settings] = {
    "gated 0.4, 0.7": lambda curve: _gated(0.4, 0.7),
    "gated 0.5, 0.5": lambda curve: _gated(0.5, 0.5),
    "gated 0.25, 0.25": lambda curve: _gated(0.25, 0.25),
    "MagCache 0.06, 2": lambda curve: _skipping(curve, 0.06, 2),
    "MagCache 0.12, 2": lambda curve: _skipping(curve, 0.12, 2),
    "MagCache 0.24, 4": lambda curve: _skipping(curve, 0.24, 4),
    "gated 0.4, 0.7; MagCache 0.06, 2": lambda curve: _gated(0.4, 0.7) | _skipping(curve, 0.06, 2),
    "gated 0.4, 0.7; MagCache 0.12, 2": lambda curve: _gated(0.4, 0.7) | _skipping(curve, 0.12, 2),
    "8 steps": lambda curve: {"num_inference_steps": 8},
    "4 steps": lambda curve: {"num_inference_steps": 4},
    "decoder in bfloat16": lambda curve: {"vae_dtype": "bfloat16"},
}
"""Methods by name: the fractions of steps to which the prompt's and the audio's differences are computed; the
error bound and the most steps that are skipped in a row; other numbers of steps, which are exact; the type of
the VAE that decodes."""


@dataclass(frozen=True)
class _Clips:
    """Sampled clips: latents and frames."""

    latents: Float[np.ndarray, "N F h w C"]
    videos: UInt8[np.ndarray, "N T H W 3"]


@dataclass(frozen=True)
class Row:
    """What one method gives.

    Attributes:
        evaluations: Evaluations of the transformer for a clip.
        lip_sync: Correlation of the opening of the mouth with that of the sound.
        first_frame: PSNR of the first frame to the picture, in dB.
        latents: PSNR of the latents to the exact ones, in dB; the peak is the range of the exact ones.
        frames: PSNR of the frames to the exact ones, in dB.
    """

    evaluations: int
    lip_sync: Figure
    first_frame: Figure
    latents: Figure
    frames: Figure


def measure(held_out: HeldOutClips, names: Sequence[str], show: Callable[[str, Row], None]) -> dict[str, Row]:
    """Samples all clips exactly and by each method, and measures them.

    Args:
        held_out: The clips.
        names: Which of `METHODS`.
        show: Called with name and figures of each method as soon as it is measured.
    """
    config, calibration = held_out.config, Calibration()
    exact = _sample(held_out, {}, "exact", calibration)
    curve, rows = calibration.curve(config.shift, config.guidance), {}
    for name in ("exact", *names):
        changes = {} if name == "exact" else METHODS[name](curve)
        clips = exact if name == "exact" else _sample(held_out, changes, name)
        rows[name] = _row(held_out, changes, clips, exact)
        show(name, rows[name])
    return rows


def _sample(
    held_out: HeldOutClips, changes: Mapping[str, Any], name: str, calibration: Calibration | None = None
) -> _Clips:
    config = replace(held_out.config, **EXACT | changes)
    batches = held_out.sample(held_out.encoded, name, config, residual_callback=calibration)
    latents = np.concatenate([np.asarray(x) for x in batches])
    return _Clips(latents, held_out.decode(latents, config.vae_dtype))


def _row(held_out: HeldOutClips, changes: Mapping[str, Any], clips: _Clips, exact: _Clips) -> Row:
    config, records = replace(held_out.config, **EXACT | changes), held_out.clips
    return Row(
        int(config.evaluation_plan(config.guidance).evaluations.sum()),
        held_out.correlation_with(clips.videos, [record["opening"] for record in records]),
        figure([psnr(x[0], record["video"][0]) for x, record in zip(clips.videos, records, strict=True)]),
        figure([psnr(x, y, float(np.ptp(y))) for x, y in zip(clips.latents, exact.latents, strict=True)]),
        figure([psnr(*pair) for pair in zip(clips.videos, exact.videos, strict=True)]),
    )


def header() -> str:
    """The head of the table."""
    columns = ("method", "evaluations", "lip sync", "first frame, dB", "latents, dB", "frames, dB")
    return f"| {' | '.join(columns)} |\n|---|" + "--:|" * (len(columns) - 1)


def line(name: str, row: Row) -> str:
    """The line of a method."""
    same = name == "exact"
    cells = [f"{row.lip_sync.mean:.3f} +- {row.lip_sync.standard_error:.3f}"]
    cells += [f"{x.mean:.1f}" for x in (row.first_frame, row.latents, row.frames)]
    return f"| {name} | {row.evaluations} | {' | '.join([*cells[:2], '-', '-'] if same else cells)} |"


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.miniature.approximate",
        description="Compares approximate sampling with exact sampling, on held-out synthetic speakers.",
        epilog=EXAMPLES,
    )
    add_arguments(parser)
    parser.add_argument(
        "--only", action="append", choices=METHODS, help="a method; may be repeated (default: all)"
    )
    arguments, config = cli.parse(parser, argv)
    check_json(arguments, config)
    held_out = load_held_out(config, arguments.weights, num_clips=arguments.clips, seed=arguments.seed)
    print(header())
    rows = measure(
        held_out, arguments.only or list(METHODS), lambda name, row: print(line(name, row), flush=True)
    )
    if arguments.json:
        write_figures(rows, arguments.json)


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.approximate")
