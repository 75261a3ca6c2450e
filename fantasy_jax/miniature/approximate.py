"""What approximations cost: held-out clips by exact sampling, and from the same noise by each method.

    .venv/bin/python -m fantasy_jax.miniature.approximate --config=configs/tiny.py --clips=16

The exact steps are also those from which the curve of MagCache is measured. 8-bit weights are those that
`convert_weights.py quantize` makes, in a temporary folder, of the transformer and of the encoders of text and
images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
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
    store_of,
    write_figures,
)
from fantasy_jax.models.eight_bit import EightBit
from fantasy_jax.typing import Float, UInt8
from fantasy_jax.weights.loading import stored_networks
from fantasy_jax.weights.quantize import quantize_store

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


@dataclass(frozen=True)
class Method:
    """How clips are sampled.

    Attributes:
        settings: Changes of the sampling settings, given the curve of the exact steps.
        eight_bit: Type of 8-bit weights; None: the weights are those of the store.
    """

    settings: Settings = lambda curve: {}
    eight_bit: EightBit | None = None


METHODS = {
    "gated 0.4, 0.7": Method(lambda curve: _gated(0.4, 0.7)),
    "gated 0.5, 0.5": Method(lambda curve: _gated(0.5, 0.5)),
    "gated 0.25, 0.25": Method(lambda curve: _gated(0.25, 0.25)),
    "MagCache 0.06, 2": Method(lambda curve: _skipping(curve, 0.06, 2)),
    "MagCache 0.12, 2": Method(lambda curve: _skipping(curve, 0.12, 2)),
    "MagCache 0.24, 4": Method(lambda curve: _skipping(curve, 0.24, 4)),
    "gated 0.4, 0.7; MagCache 0.06, 2": Method(lambda curve: _gated(0.4, 0.7) | _skipping(curve, 0.06, 2)),
    "gated 0.4, 0.7; MagCache 0.12, 2": Method(lambda curve: _gated(0.4, 0.7) | _skipping(curve, 0.12, 2)),
    "8 steps": Method(lambda curve: {"num_inference_steps": 8}),
    "4 steps": Method(lambda curve: {"num_inference_steps": 4}),
    "int8 weights": Method(eight_bit="int8"),
    "fp8 weights": Method(eight_bit="fp8"),
    "int8 weights and products": Method(lambda curve: {"eight_bit_products": True}, "int8"),
    "fp8 weights and products": Method(lambda curve: {"eight_bit_products": True}, "fp8"),
    "decoder in bfloat16": Method(lambda curve: {"vae_dtype": "bfloat16"}),
}
"""Methods by name: the fractions of steps to which the prompt's and the audio's differences are computed; the
error bound and the most steps that are skipped in a row; other numbers of steps, which are exact; 8 bits;
the type of the VAE that decodes."""


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


def measure(held_out: HeldOutClips, weights: str | Path, names: Sequence[str]) -> dict[str, Row]:
    """Samples all clips exactly and by each method, and measures them.

    Args:
        held_out: The clips.
        weights: The store of their networks.
        names: Which of `METHODS`.

    Raises:
        WeightsError: The weights have 8 bits already.
    """
    config, calibration = held_out.config, Calibration()
    with TemporaryDirectory() as folder:
        stores = {x: Path(folder, x) for name in names if (x := METHODS[name].eight_bit) is not None}
        for dtype, store in stores.items():
            quantize_store(weights, store, dtype, progress=False)
        exact = _sample(held_out, {}, "exact", calibration)
        curve = calibration.curve(config.shift, config.guidance)
        rows = {"exact": _row(held_out, {}, exact, exact)}
        for name in names:
            method, clips = METHODS[name], held_out
            changes = method.settings(curve)
            if method.eight_bit is not None:
                clips = _of_store(held_out, stores[method.eight_bit], changes)
            rows[name] = _row(held_out, changes, _sample(clips, changes, name), exact)
    return rows


def _of_store(held_out: HeldOutClips, store: Path, changes: Mapping[str, Any]) -> HeldOutClips:
    """The same clips, encoded and generated by the networks of another store."""
    products = changes.get("eight_bit_products", False)
    networks = stored_networks(store, held_out.networks.config, eight_bit_products=products)
    return HeldOutClips(networks, held_out.video, held_out.config, held_out.clips, seed=held_out.seed)


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


def table(rows: Mapping[str, Row]) -> str:
    """The rows as a table."""
    numbers = ("evaluations", "lip sync", "first frame, dB", "latents, dB", "frames, dB")
    return cli.markdown_table(("method", *numbers), map(_cells, rows, rows.values()), numbers=numbers)


def _cells(name: str, row: Row) -> list[str]:
    cells = [name, str(row.evaluations), f"{row.lip_sync.mean:.3f} +- {row.lip_sync.standard_error:.3f}"]
    compared = [f"{x.mean:.1f}" for x in (row.latents, row.frames)]
    return [*cells, f"{row.first_frame.mean:.1f}", *(("-", "-") if name == "exact" else compared)]


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
    rows = measure(held_out, store_of(config, arguments.weights), arguments.only or list(METHODS))
    print(table(rows))
    if arguments.json:
        write_figures(rows, arguments.json)


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.approximate")
