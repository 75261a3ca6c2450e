"""The official files at full size as sparse files: shapes of the manifests, zeros that take no disk space.

As a program it imports all of them and prints the peak of anonymous memory:

    .venv/bin/python tests/full_size.py FOLDER [--dtype float32] [--only fantasytalking]
"""

import argparse
import json
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

MANIFESTS = Path(__file__).parent / "data" / "manifests"
ROOT = Path(__file__).parent.parent
SHARDS = 7


def tensors(manifest):
    """Shapes of a full-size file by key."""
    return json.loads((MANIFESTS / f"{manifest}.json").read_text())["tensors"]


def sparse_safetensors(path, shapes):
    """A file of float32 zeros."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)


def sparse_pickle(path, shapes, dtype, nested=False):
    """A file of torch.save, without data."""
    import torch

    # Memory that is allocated and never written to takes no space.
    values = {key: torch.empty(shape, dtype=getattr(torch, dtype)) for key, shape in shapes.items()}
    if nested:
        parts = {key.split(".")[0] for key in values}
        values = {
            part: {k.removeprefix(f"{part}."): x for k, x in values.items() if k.startswith(f"{part}.")}
            for part in parts
        }
    with torch.serialization.skip_data():
        torch.save(values, path)


def official(folder):
    """The folder of Wan2.1-I2V-14B, with a byte tokenizer."""
    folder.mkdir(parents=True)
    shapes = tensors("wan2.1_i2v_14b_dit")
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{SHARDS:05}.safetensors" for i in range(SHARDS)]
    index = {key: names[i * SHARDS // len(shapes)] for i, key in enumerate(shapes)}
    for name in names:
        sparse_safetensors(folder / name, {key: shapes[key] for key in shapes if index[key] == name})
    content = json.dumps({"weight_map": index})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    sparse_pickle(folder / "Wan2.1_VAE.pth", tensors("wan2.1_vae"), "float32")
    umt5 = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    sparse_pickle(umt5, tensors("umt5_xxl_encoder"), "bfloat16")
    clip = folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    sparse_pickle(clip, tensors("clip_xlm_roberta_vit_h14"), "float16")
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    tokenizer = folder / "google" / "umt5-xxl" / "tokenizer_config.json"
    tokenizer.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    return folder


def adapter(path):
    """The file of FantasyTalking, nested like the hosted one."""
    sparse_pickle(path, tensors("fantasytalking_model"), "float32", nested=True)
    return path


def peak_anonymous(arguments):
    """Runs convert_weights.py; returns its exit code and its peak of anonymous memory in bytes."""
    command = [sys.executable, str(ROOT / "convert_weights.py"), *map(str, arguments)]
    program = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    peak, status = 0, Path(f"/proc/{program.pid}/status")
    while program.poll() is None:
        lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        peak = max(peak, 1024 * int(lines[0].split()[1]) if lines else 0)
        time.sleep(0.05)
    return program.returncode, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", choices=("wan", "fantasytalking"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    sources = []
    if arguments.only != "fantasytalking":
        sources += ["--wan", official(arguments.folder / "wan")]
    if arguments.only != "wan":
        sources += ["--fantasytalking", adapter(arguments.folder / "fantasytalking_model.ckpt")]
    start = time.perf_counter()
    options = ["--output", arguments.folder / "store", "--dtype", arguments.dtype]
    code, peak = peak_anonymous(["import", *sources, *options])
    print(f"exit code {code}, peak {peak / 2**30:.2f} GiB anonymous, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
