"""Downloads, inspects, imports, checks, exports and verifies the weights of PyTorch's networks."""

if __name__ == "__main__":
    from fantasy_jax.cli import exit_on_interrupt

    exit_on_interrupt("convert_weights.py")

import argparse
from typing import Any

import jax.numpy as jnp

from fantasy_jax import cli
from fantasy_jax.config import load_config, section
from fantasy_jax.errors import WeightsError
from fantasy_jax.files import atomic_write, check_outputs
from fantasy_jax.models.eight_bit import DTYPES
from fantasy_jax.parity.reference import reference_files
from fantasy_jax.parity.report import table, to_json, to_markdown
from fantasy_jax.parity.verify import verify
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import EIGHT_BIT_LAYERS
from fantasy_jax.system.registry import slots
from fantasy_jax.weights.check import check_store
from fantasy_jax.weights.download import download, hosted_slots
from fantasy_jax.weights.exporter import export_weights
from fantasy_jax.weights.importer import import_options, import_weights
from fantasy_jax.weights.initial import init_store
from fantasy_jax.weights.inspect import inspect
from fantasy_jax.weights.lora import parse_lora
from fantasy_jax.weights.quantize import quantize_store
from fantasy_jax.weights.store import LORA

EXAMPLES = """\
examples:
  python convert_weights.py download --output=downloads
  python convert_weights.py inspect downloads/Wan2.1-I2V-14B-720P
  python convert_weights.py import --wan=downloads/Wan2.1-I2V-14B-720P --output=weights
  python convert_weights.py export --weights=weights --component=audio_adapter --output=adapter.safetensors
  python convert_weights.py verify --reference=tests/data/wan_vae

Help of a command: python convert_weights.py import --help
"""

DOWNLOAD_EXAMPLES = """\
examples:
  python convert_weights.py download --config=configs/fantasy_talking_14b.py --output=downloads
  python convert_weights.py download --config=configs/fantasy_portrait_14b.py --output=downloads
  python convert_weights.py download --output=downloads
      both, the LoRA of fantasy_talking_14b.py:fast, and TAEW2.1, which decodes previews
  python convert_weights.py download --component=lora --output=downloads    this LoRA alone

80 GiB for one, 85 GiB for all. After an interruption, run the same command again: it continues.
"""

INSPECT_EXAMPLES = """\
examples:
  python convert_weights.py inspect downloads/Wan2.1-I2V-14B-720P         the official folder of seven shards
  python convert_weights.py inspect downloads/fantasytalking_model.ckpt   the FantasyTalking adapter
  python convert_weights.py inspect lora.safetensors                      a LoRA of any program
  python convert_weights.py inspect manifest.json --map                   names and shapes; places of all keys
"""

IMPORT_EXAMPLES = """\
examples:
  python convert_weights.py import --wan=downloads/Wan2.1-I2V-14B-720P \\
      --fantasytalking=downloads/fantasytalking_model.ckpt \\
      --wav2vec2=downloads/wav2vec2-base-960h --output=weights
  python convert_weights.py import --fantasytalking=mine.safetensors --output=weights --dtype=float32
  python convert_weights.py import --arcface=antelopev2/glintr100.onnx --output=weights
  python convert_weights.py import --preview_decoder=downloads/taew2_1.safetensors --output=weights
  python convert_weights.py import --wan=downloads/Wan2.1-I2V-14B-720P \\
      --fantasyportrait=downloads/fantasyportrait_model.ckpt --pd_fpg=downloads/pd_fpg.pth \\
      --output=weights/fantasy_portrait_14b
  files of ComfyUI, also quantised ones, in place of the folder or of some of its networks:
  python convert_weights.py import --transformer=wan2.1_i2v_720p_14B_fp8_scaled.safetensors \\
      --vae=wan_2.1_vae.safetensors --text_encoder=umt5_xxl_fp16.safetensors \\
      --image_encoder=clip_vision_h.safetensors --output=weights

Complete networks are skipped. After an interruption, run the same command again: it continues. 10 GiB of
memory are sufficient.
"""

CHECK_EXAMPLES = """\
examples:
  python convert_weights.py check weights/fantasy_talking_14b
  python convert_weights.py check out/adapters/weights        a trained store, with the networks it links to
"""

QUANTIZE_EXAMPLES = """\
examples:
  python convert_weights.py quantize --weights=weights/fantasy_talking_14b --dtype=int8 --output=weights/int8
  the transformer's MLPs alone:
  python convert_weights.py quantize --weights=weights/fantasy_talking_14b --dtype=fp8 \\
      --layers='^transformer/blocks/mlp' --output=weights/mlp_fp8

Networks that stay as they are become links. After an interruption, run the same command again: it continues.
"""

INIT_EXAMPLES = """\
examples:
  python convert_weights.py init --config=configs/fantasy_talking_14b.py:debug --output=out/random
"""

EXPORT_EXAMPLES = """\
examples:
  python convert_weights.py export --weights=weights --component=audio_adapter --output=adapter.safetensors
  python convert_weights.py export --weights=weights --component=audio_adapter --layout=comfyui \\
      --output=ComfyUI/models/diffusion_models/fantasytalking.safetensors
  python convert_weights.py export --weights=weights --component=transformer --layout=diffusers \\
      --output=diffusion_pytorch_model.safetensors
  a LoRA for ComfyUI and diffusers, and the transformer with the LoRA merged:
  python convert_weights.py export --weights=out/lora/weights --component=lora --output=lora.safetensors
  python convert_weights.py export --weights=out/lora/weights --component=transformer --merge_lora \\
      --output=merged.safetensors
  a LoRA of another program, for good:
  python convert_weights.py export --weights=weights --component=transformer --lora=style.safetensors:0.8 \\
      --output=merged.safetensors
"""

VERIFY_EXAMPLES = """\
examples:
  python convert_weights.py verify --reference=tests/data/wan_vae
  python convert_weights.py verify --reference=A --reference=B --json=parity.json
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the exit code is 1 if weights do not fit or outputs differ."""
    arguments = _parser().parse_args(argv)
    return arguments.command(arguments)


def _download(arguments: argparse.Namespace) -> int:
    networks = [arguments.component] if arguments.component else None
    if arguments.config:
        config = load_config(arguments.config)
        networks = list(section(ModelConfig, config, "model").networks)
        networks += [LORA] * bool(config.get("sample", {}).get("loras"))
    download(arguments.output, networks)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    options = import_options()
    sources = {name: path for name in options if (path := getattr(arguments, name)) is not None}
    if arguments.wan is None and not sources:
        raise WeightsError(f"nothing to import; give --wan, --{', --'.join(options)}")
    eight_bit = arguments.dtype if arguments.dtype in DTYPES else None
    dtype = jnp.dtype("bfloat16" if eight_bit else arguments.dtype)
    if arguments.tokenizer and "text_encoder" not in sources:
        raise WeightsError("--tokenizer goes with --text_encoder, which is not given")
    lines = import_weights(
        arguments.output,
        wan=arguments.wan,
        sources=sources,
        dtype=dtype,
        eight_bit=eight_bit,
        variant=arguments.variant,
        tokenizer=arguments.tokenizer,
    )
    print("\n".join(lines))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    checked = check_store(arguments.directory)
    for result in checked:
        print(f"{result.path}: {'DAMAGED' if result.faults else 'intact, ' + result.text}")
        print("".join(f"  {fault}\n" for fault in result.faults), end="")
    damaged = sum(bool(result.faults) for result in checked)
    print(f"\n{len(checked)} checked, {damaged} damaged")
    return int(damaged > 0)


def _quantize(arguments: argparse.Namespace) -> int:
    where = (arguments.weights, arguments.output, arguments.dtype)
    print("\n".join(quantize_store(*where, layers=arguments.layers)))
    return 0


def _init(arguments: argparse.Namespace) -> int:
    model = section(ModelConfig, load_config(arguments.config), "model")
    print("\n".join(init_store(arguments.output, model, seed=arguments.seed)))
    print("All weights are random: what is sampled from them is noise.")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    where = (arguments.weights, arguments.component, arguments.output)
    options = {"layout": arguments.layout, "merge_lora": arguments.merge_lora}
    print(export_weights(*where, **options, loras=[parse_lora(text) for text in arguments.lora]))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    found = inspect(arguments.path, preset=arguments.preset, variant=arguments.variant)
    for network in found:
        print("\n".join(network.lines(every_key=arguments.map)))
    return int(any(network.plan.problems for network in found))


def _verify(arguments: argparse.Namespace) -> int:
    read = [path for folder in arguments.reference for path in reference_files(folder)]
    check_outputs([arguments.json, arguments.markdown], read)
    rows = [row for folder in arguments.reference for row in verify(folder, dtype=jnp.dtype(arguments.dtype))]
    print(table(rows))
    if arguments.json:
        _write(arguments.json, to_json(rows) + "\n")
    if arguments.markdown:
        references = (f"--reference={folder}" for folder in arguments.reference)
        settings = (*references, f"--dtype={arguments.dtype}", f"--markdown={arguments.markdown}")
        _write(
            arguments.markdown, to_markdown(rows, [".venv/bin/python convert_weights.py verify", *settings])
        )
    failed = sum(row.verdict == "fail" for row in rows)
    print(f"\n{len(rows)} outputs compared, {failed} above their limit")
    return int(failed > 0)


def _write(path: str, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # names need not be UTF-8


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="convert_weights.py", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    added = (_add_download, _add_inspect, _add_import, _add_check, _add_quantize, _add_init, _add_export)
    for add in (*added, _add_verify):
        add(commands)
    return parser


def _add(commands: Any, name: str, run: Any, summary: str, describe: str, epilog: str) -> cli.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=describe, epilog=epilog)
    command.set_defaults(command=run)
    return command


def _add_download(commands: Any) -> None:
    describe = "Downloads the published files from the Hugging Face hub; complete files are skipped."
    command = _add(
        commands, "download", _download, "download the published files", describe, DOWNLOAD_EXAMPLES
    )
    command.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the files; created if needed"
    )
    chosen = command.add_mutually_exclusive_group()
    chosen.add_argument(
        "--config",
        metavar="FILE[:ARGUMENT]",
        help="config file whose networks are downloaded (default: all published networks)",
    )
    chosen.add_argument("--component", choices=hosted_slots(), help="the only network to download")


def _add_inspect(commands: Any) -> None:
    describe = "Prints the networks of a weights file, and whether every tensor maps onto a parameter."
    summary = "print the networks of a file and how they map"
    command = _add(commands, "inspect", _inspect, summary, describe, INSPECT_EXAMPLES)
    command.add_argument(
        "path", help="a .safetensors, .pth, .ckpt, .gguf or .onnx file, a folder of them, or a JSON manifest"
    )
    _add_variant(command)
    command.add_argument("--preset", help="name of the network's sizes, if they cannot be detected: umt5_xxl")
    command.add_argument("--map", action="store_true", help="list the parameter of every tensor")


def _add_variant(command: cli.ArgumentParser) -> None:
    command.add_argument(
        "--variant",
        default="",
        metavar="NAME",
        help="part of the name of the file to use where a folder holds several, such as fp16",
    )


def _add_import(commands: Any) -> None:
    describe = (
        "Converts downloaded files into a store, which sampling and training load; one block at a time."
    )
    command = _add(commands, "import", _import, "import files into a store", describe, IMPORT_EXAMPLES)
    command.add_argument(
        "--wan", metavar="DIR", help="folder of Wan2.1-I2V-14B, in the official or in diffusers' layout"
    )
    for name, component in import_options().items():
        source = component.download
        command.add_argument(f"--{name}", metavar=source.metavar, help=source.help)
    command.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder of the text encoder's tokenizer, if it is neither in its file nor beside it",
    )
    _add_variant(command)
    command.add_argument("--output", required=True, metavar="DIR", help="the store; created if needed")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", *DTYPES),
        default="bfloat16",
        help="dtype of the stored weights; the official scripts compute in bfloat16. int8 and fp8 are of the "
        "layers that quantize chooses; all else is bfloat16 then (default: %(default)s)",
    )


def _add_check(commands: Any) -> None:
    describe = "Compares every file of a store with its checksum; the exit code is 1 if one differs."
    command = _add(commands, "check", _check, "check a store for damage", describe, CHECK_EXAMPLES)
    command.add_argument("directory", metavar="DIR", help="the store")


def _add_quantize(commands: Any) -> None:
    describe = "Writes a store with 8-bit weights in linear layers, half the size; one block at a time."
    summary = "make a store with 8-bit weights"
    command = _add(commands, "quantize", _quantize, summary, describe, QUANTIZE_EXAMPLES)
    command.add_argument("--weights", required=True, metavar="DIR", help="the store of 16 or 32 bits")
    command.add_argument("--output", required=True, metavar="DIR", help="the new store; created if needed")
    command.add_argument("--dtype", required=True, choices=tuple(DTYPES), help="type of the weights")
    command.add_argument(
        "--layers",
        default=EIGHT_BIT_LAYERS,
        metavar="REGEX",
        help="the linear layers, by paths such as transformer/blocks/mlp_in (default: %(default)s)",
    )


def _add_init(commands: Any) -> None:
    describe = "Writes a store of random weights: training, sampling and export can be tried with it."
    command = _add(commands, "init", _init, "make a store of random weights", describe, INIT_EXAMPLES)
    command.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARGUMENT]",
        help="config file of the networks",
    )
    command.add_argument("--output", required=True, metavar="DIR", help="the store; created if needed")
    command.add_argument(
        "--seed",
        type=cli.integer(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="seed of the weights (default: %(default)s)",
    )


def _add_export(commands: Any) -> None:
    describe = "Writes one network of a store as safetensors, with the keys that PyTorch programs read."
    command = _add(commands, "export", _export, "export a network of a store", describe, EXPORT_EXAMPLES)
    command.add_argument("--weights", required=True, metavar="DIR", help="the store")
    command.add_argument("--component", required=True, choices=slots(), help="the network to export")
    command.add_argument(
        "--layout",
        default="official",
        help="layout of the keys, such as official, diffusers or comfyui (default: %(default)s)",
    )
    command.add_argument(
        "--merge_lora", action="store_true", help="add the store's LoRA to the transformer's weights"
    )
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="add a LoRA of another program to the transformer's weights; may be repeated",
    )
    command.add_argument(
        "--output", required=True, metavar="FILE", help="file to write, such as adapter.safetensors"
    )


def _add_verify(commands: Any) -> None:
    describe = "Runs networks with the weights and inputs of references, and compares every output."
    summary = "compare with outputs of PyTorch"
    command = _add(commands, "verify", _verify, summary, describe, VERIFY_EXAMPLES)
    command.add_argument(
        "--reference",
        action="append",
        required=True,
        metavar="DIR",
        help="folder of config.json, weights.safetensors and activations.safetensors; may be repeated",
    )
    command.add_argument("--json", metavar="FILE", help="write the results as JSON, such as parity.json")
    command.add_argument(
        "--markdown", metavar="FILE", help="write the results as a page, such as docs/parity.md"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of weights and products; bfloat16 has no limits (default: %(default)s)",
    )


if __name__ == "__main__":
    cli.run(main, "convert_weights.py")
