"""Weights of PyTorch's networks: what a file holds, and whether the networks here compute the same."""

import argparse
from pathlib import Path

import jax.numpy as jnp

from fantasy_jax import cli
from fantasy_jax.convert.inspect import inspect
from fantasy_jax.convert.verify import table, to_json, verify

EXAMPLES = """\
examples:
  python convert_weights.py inspect Wan2.1-I2V-14B-720P           the official folder of seven shards
  python convert_weights.py inspect fantasytalking_model.ckpt     the FantasyTalking adapter
  python convert_weights.py inspect manifest.json --map           names and shapes only; every key's place
  python convert_weights.py verify --reference tests/data/wan_vae
  python convert_weights.py verify --reference A --reference B --json parity.json

`COMMAND --help` tells more of each.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one of the commands; the exit code is 1 if something does not fit or differs."""
    arguments = _parser().parse_args(argv)
    return arguments.command(arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    reports = inspect(arguments.path, preset=arguments.preset)
    for report in reports:
        print("\n".join(report.lines(every_key=arguments.map)))
    return int(any(report.plan.problems for report in reports))


def _verify(arguments: argparse.Namespace) -> int:
    rows = [row for folder in arguments.reference for row in verify(folder, dtype=jnp.dtype(arguments.dtype))]
    print(table(rows))
    if arguments.json:
        Path(arguments.json).write_text(to_json(rows) + "\n")
    failed = sum(row.verdict == "fail" for row in rows)
    print(f"\n{len(rows)} outputs compared, {failed} beyond their limit")
    return int(failed > 0)


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="convert_weights.py", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    describe = "Tells what a weights file is, and whether all of it has a place in the network that samples."
    command = commands.add_parser("inspect", help="what a file holds and how it maps", description=describe)
    command.add_argument(
        "path", help="a .safetensors, .pth or .ckpt file, a folder of them, or a JSON manifest"
    )
    command.add_argument("--preset", help="sizes of the network, where they cannot be told from the file")
    command.add_argument("--map", action="store_true", help="list where every tensor goes")
    command.set_defaults(command=_inspect)

    describe = "Runs a reference's network on its inputs with its own weights, and compares every output."
    command = commands.add_parser("verify", help="parity with PyTorch", description=describe)
    command.add_argument(
        "--reference",
        action="append",
        required=True,
        metavar="DIR",
        help="a folder of config.json, weights.safetensors and activations.safetensors; may be repeated",
    )
    command.add_argument("--json", metavar="FILE", help="write the same as JSON")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16 reports what it costs, and has no limits (default: %(default)s)",
    )
    command.set_defaults(command=_verify)
    return parser


if __name__ == "__main__":
    cli.run(main, "convert_weights.py")
