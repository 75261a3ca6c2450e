"""Weights of PyTorch's networks: fetched, inspected, imported into the store, verified, and given back."""

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fantasy_jax import cli
from fantasy_jax.convert.download import download
from fantasy_jax.convert.exporter import export_weights
from fantasy_jax.convert.files import WeightsError
from fantasy_jax.convert.importer import import_weights
from fantasy_jax.convert.inspect import inspect
from fantasy_jax.convert.verify import table, to_json, to_markdown, verify
from fantasy_jax.weights import FOLDERS, LORA

EXAMPLES = """\
examples:
  python convert_weights.py download --output downloads           the official files, 80 GiB
  python convert_weights.py inspect Wan2.1-I2V-14B-720P           what a file or a folder holds
  python convert_weights.py import --wan downloads/Wan2.1-I2V-14B-720P --output weights
  python convert_weights.py export --weights weights --component audio_adapter --output adapter.safetensors
  python convert_weights.py verify --reference tests/data/wan_vae

`COMMAND --help` tells more of each.
"""

DOWNLOAD_EXAMPLES = """\
examples:
  python convert_weights.py download --output downloads           run again, it goes on where it stopped
"""

INSPECT_EXAMPLES = """\
examples:
  python convert_weights.py inspect Wan2.1-I2V-14B-720P           the official folder of seven shards
  python convert_weights.py inspect fantasytalking_model.ckpt     the FantasyTalking adapter
  python convert_weights.py inspect manifest.json --map           names and shapes only; every key's place
"""

IMPORT_EXAMPLES = """\
examples:
  python convert_weights.py import --wan downloads/Wan2.1-I2V-14B-720P \\
      --fantasytalking downloads/fantasytalking_model.ckpt \\
      --wav2vec2 downloads/wav2vec2-base-960h --output weights
  python convert_weights.py import --fantasytalking mine.safetensors --output weights --dtype float32
  python convert_weights.py import --arcface antelopev2/glintr100.onnx --output weights

What is complete is skipped, and an interrupted import goes on: run the same command again. About 10 GiB of
memory are enough.
"""

EXPORT_EXAMPLES = """\
examples:
  python convert_weights.py export --weights weights --component audio_adapter --output adapter.safetensors
  python convert_weights.py export --weights weights --component audio_adapter --layout comfyui \\
      --output ComfyUI/models/diffusion_models/fantasytalking.safetensors
  python convert_weights.py export --weights weights --component transformer --layout diffusers \\
      --output diffusion_pytorch_model.safetensors
  a LoRA as ComfyUI and diffusers read it, and the transformer with the LoRA in it:
  python convert_weights.py export --weights out/lora/weights --component lora --output lora.safetensors
  python convert_weights.py export --weights out/lora/weights --component transformer --merge_lora \\
      --output merged.safetensors
"""

VERIFY_EXAMPLES = """\
examples:
  python convert_weights.py verify --reference tests/data/wan_vae
  python convert_weights.py verify --reference A --reference B --json parity.json
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one of the commands; the exit code is 1 if something does not fit or differs."""
    arguments = _parser().parse_args(argv)
    return arguments.command(arguments)


def _download(arguments: argparse.Namespace) -> int:
    download(arguments.output)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    sources = {name: getattr(arguments, name) for name in ("wan", "fantasytalking", "wav2vec2", "arcface")}
    if not any(sources.values()):
        raise WeightsError("nothing to import; give --wan, --fantasytalking, --wav2vec2 or --arcface")
    print("\n".join(import_weights(arguments.output, **sources, dtype=jnp.dtype(arguments.dtype))))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    where = (arguments.weights, arguments.component, arguments.output)
    print(export_weights(*where, layout=arguments.layout, merge_lora=arguments.merge_lora))
    return 0


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
    if arguments.markdown:
        references = (f"--reference={folder}" for folder in arguments.reference)
        settings = (*references, f"--dtype={arguments.dtype}", f"--markdown={arguments.markdown}")
        page = to_markdown(rows, ["python convert_weights.py verify", *settings])
        Path(arguments.markdown).write_text(page, encoding="utf-8")
    failed = sum(row.verdict == "fail" for row in rows)
    print(f"\n{len(rows)} outputs compared, {failed} beyond their limit")
    return int(failed > 0)


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="convert_weights.py", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    _add_download(commands)
    _add_inspect(commands)
    _add_import(commands)
    _add_export(commands)
    _add_verify(commands)
    return parser


def _add(commands: Any, name: str, run: Any, summary: str, describe: str, epilog: str) -> cli.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=describe, epilog=epilog)
    command.set_defaults(command=run)
    return command


def _add_download(commands: Any) -> None:
    describe = (
        "Fetches the official files from the Hugging Face hub; what is there already is not fetched again."
    )
    command = _add(commands, "download", _download, "fetch the official files", describe, DOWNLOAD_EXAMPLES)
    command.add_argument("--output", required=True, metavar="DIR", help="where they go; made if missing")


def _add_inspect(commands: Any) -> None:
    describe = "Tells what a weights file is, and whether all of it has a place in the network that samples."
    summary = "what a file holds and how it maps"
    command = _add(commands, "inspect", _inspect, summary, describe, INSPECT_EXAMPLES)
    command.add_argument(
        "path", help="a .safetensors, .pth or .ckpt file, a folder of them, or a JSON manifest"
    )
    command.add_argument("--preset", help="sizes of the network, where they cannot be told from the file")
    command.add_argument("--map", action="store_true", help="list where every tensor goes")


def _add_import(commands: Any) -> None:
    describe = "Converts downloads into the store that sampling and training load from, block by block."
    command = _add(commands, "import", _import, "downloads into the store", describe, IMPORT_EXAMPLES)
    command.add_argument(
        "--wan", metavar="DIR", help="Wan2.1-I2V-14B, the official folder or diffusers', as it was downloaded"
    )
    command.add_argument("--fantasytalking", metavar="FILE", help="the adapter, .ckpt or .safetensors")
    command.add_argument("--wav2vec2", metavar="DIR", help="a wav2vec2, as transformers has it")
    command.add_argument(
        "--arcface",
        metavar="FILE",
        help="insightface's IResNet-50 or -100: backbone.pth, or the package's .onnx",
    )
    command.add_argument("--output", required=True, metavar="DIR", help="the store; made if missing")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="type of the stored weights; the official scripts compute in bfloat16 (default: %(default)s)",
    )


def _add_export(commands: Any) -> None:
    describe = "Writes one network of a store as safetensors, under the names that PyTorch's programs read."
    command = _add(commands, "export", _export, "the store back to safetensors", describe, EXPORT_EXAMPLES)
    command.add_argument("--weights", required=True, metavar="DIR", help="the store")
    command.add_argument(
        "--component", required=True, choices=(*FOLDERS.values(), LORA), help="which network"
    )
    command.add_argument(
        "--layout",
        default="official",
        help="official, diffusers, comfyui or another that the network has (default: %(default)s)",
    )
    command.add_argument(
        "--merge_lora", action="store_true", help="add the store's LoRA to the transformer's weights"
    )
    command.add_argument("--output", required=True, metavar="FILE", help="the .safetensors file to write")


def _add_verify(commands: Any) -> None:
    describe = "Runs a reference's network on its inputs with its own weights, and compares every output."
    command = _add(commands, "verify", _verify, "parity with PyTorch", describe, VERIFY_EXAMPLES)
    command.add_argument(
        "--reference",
        action="append",
        required=True,
        metavar="DIR",
        help="a folder of config.json, weights.safetensors and activations.safetensors; may be repeated",
    )
    command.add_argument("--json", metavar="FILE", help="write the same as JSON")
    command.add_argument("--markdown", metavar="FILE", help="write a page of it, such as docs/parity.md")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16 reports what it costs, and has no limits (default: %(default)s)",
    )


if __name__ == "__main__":
    cli.run(main, "convert_weights.py")
