"""Small valid files of all kinds, and random changes to them, for `fuzz.py`."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import av
import numpy as np
from PIL import Image, ImageCms
from safetensors.numpy import save
from test_media_sound import clicks, encode

from fantasy_jax.config import load_config

ROOT = Path(__file__).parent.parent
CONFIGS = ("configs/tiny.py", "configs/fantasy_talking_14b.py:debug", "configs/fantasy_portrait_14b.py:debug")

Seeds = list[tuple[str, bytes]]
"""Suffix and content of valid files."""

_NUMBERS = (0, 1, -1, 2, 127, 128, 255, 256, 4095, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31,
            2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
_WORDS = (
    *map(str, _NUMBERS),
    *("1e308", "1e999", "-1e999", "float('nan')", "nan", "inf", "1.5", "-0.0", "1j", "0x" + 5000 * "f"),
    *("9" * 5000, "None", "null", "True", "true", "''", '""', "'", '"', "{}", "[]", "()", "(1,)", "[1, 2]"),
    *("{'a': 1}", '{"a.b": 1}', "{1}", "...", "b'x'", "[[1, 2], [3]]", "(None, 'x')", "[" * 3000, "(" * 300),
    *("-" * 3000 + "1", "\0", "\n", "\r", "\r\n", "\x1b[2J", "\u2028", "\ufeff", "ä", "💬", "x" * 300, "."),
    *("..", "/", "./", "/dev/null", "~", "*", "%s", "{0}", ",", ";", "=", ":", "\\", " ", "\t", ".mp4"),
)
"""Values that readers may not expect in a text."""


def changed(random: Random, seeds: Seeds) -> tuple[str, bytes]:
    """One of the files with one to eight random changes."""
    suffix, content = random.choice(seeds)
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 3, 5, 8))):
        _change(random, data, random.choice(seeds)[1])
    data = bytes(data[: 1 << 16])
    return suffix, _with_png_checksums(data) if data.startswith(b"\x89PNG") else data


def _change(random: Random, data: bytearray, other: bytes) -> None:
    # Headers are at the start, in most formats.
    size = len(data) if random.random() < 0.5 else min(len(data), 128)
    at, length = random.randint(0, size), random.choice((1, 1, 2, 4, 8, 64))
    number, width = random.choice(_NUMBERS), random.choice((1, 2, 4, 8))
    order = random.choice(("little", "big"))
    packed = (number % 256**width).to_bytes(width, order)
    word = random.choice(_WORDS).encode()
    start = random.randint(0, len(other))
    replaced, by = random.choice(
        (
            (width, packed),
            (width, packed),
            (1, bytes([data[at] ^ 1 << random.randrange(8)]) if at < len(data) else b""),
            (length, random.randbytes(length)),
            (length, b""),
            (0, data[at : at + length] * random.choice((1, 2, 100))),
            (length, other[start : start + length]),
            (0, word),
            (length, word),
            (len(data), b""),
        )
    )
    data[at : at + replaced] = by


def _with_png_checksums(data: bytes) -> bytes:
    """A PNG file whose chunks have the right checksums, so that readers look at their content."""
    done, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack(">I", data[at : at + 4])[0]
        if end + 4 > len(data):
            break
        done += data[at:end] + struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(done) + data[at:]


def changed_json(random: Random, seeds: Seeds) -> tuple[str, bytes]:
    """One of the files; a random value of its JSON, or of its safetensors header, is another."""
    suffix, content = random.choice(seeds)
    binary = ".safetensors" in suffix and not suffix.endswith(".json")
    if random.random() < 0.3 or not (binary or suffix.endswith(".json")):
        return changed(random, [(suffix, content)])
    length = struct.unpack("<Q", content[:8])[0] if binary else 0
    tree = json.loads(content[8 : 8 + length] if binary else content)
    text = json.dumps(tree)
    for _ in range(random.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        node, key = random.choice(places)
        old, word = node[key], random.choice(_WORDS)
        values = (
            *_NUMBERS,
            word,
            -0.5,
            None,
            True,
            [],
            {},
            [old, old],
            {word: old},
            {"0": 1},
            10**400,
            "F64",
        )
        if isinstance(node, dict) and random.random() < 0.2:
            node[random.choice((word, *(str(k) for _, k in places)))] = node.pop(key)
        else:
            node[key] = random.choice(values)
        text = json.dumps(tree)
        if random.random() < 0.05:
            text = text.replace(json.dumps(old), word, 1)
        if not isinstance(tree, dict) or not tree:
            break
    header = text.encode("utf-8", "surrogatepass")
    return suffix, struct.pack("<Q", len(header)) + header + content[8 + length :] if binary else header


def _places(tree: dict | list):
    """All containers and keys or indices of their values."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def changed_settings(random: Random, seeds: Seeds) -> tuple[str, bytes]:
    """The name of a config and, in further lines, settings with unusual values."""
    suffix, content = random.choice(seeds)
    config, *settings = content.decode().splitlines()
    lines = []
    for setting in random.choices(settings, k=random.choice((1, 1, 2, 4))):
        name, _, value = setting.partition("=")
        if random.random() < 0.1:  # its section
            name = name.rpartition(".")[0]
        word = random.choice(_WORDS)
        line = random.choice((f"{name}={word}", f"{name}={word}", f"{name}=({word}, {value})", setting))
        if random.random() < 0.2:
            changed_line = bytearray(line, "utf-8")
            _change(random, changed_line, random.choice(settings).encode())
            line = changed_line.decode("utf-8", "replace")
        lines.append(line)
    return suffix, "\n".join([config, *lines]).encode()


def pictures(folder: Path) -> Seeds:
    """Pictures of most kinds that Pillow writes, with profiles, orientation, palettes, transparency."""
    ramp = np.arange(24 * 20 * 4, dtype=np.uint32).reshape(24, 20, 4)
    rgba = Image.fromarray((ramp * 7 % 256).astype(np.uint8))
    rgb, grey = rgba.convert("RGB"), Image.fromarray((ramp[..., 0] * 9).astype(np.uint16))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    choices = [
        *((rgb, x, {}) for x in ("BMP", "GIF", "ICO", "PCX", "PPM", "SGI", "TGA", "JPEG2000", "IM", "DDS")),
        *((rgb, kind, {"icc_profile": profile, "exif": exif}) for kind in ("PNG", "JPEG", "WEBP", "TIFF")),
        *((rgb, kind, {"exif": exif}) for kind in ("AVIF", "HEIF")),
        *((rgba, kind, {}) for kind in ("PNG", "WEBP", "TIFF", "ICNS")),
        *((rgb.convert("CMYK"), kind, {"icc_profile": profile}) for kind in ("JPEG", "TIFF")),
        *((rgb.convert("P"), kind, {}) for kind in ("PNG", "TIFF")),
        *((rgb, kind, frames) for kind in ("GIF", "PNG", "TIFF", "MPO", "WEBP")),
        (rgb, "JPEG", {"progressive": True}),
        (grey, "PNG", {}),
        (Image.fromarray(ramp[..., 0].astype(np.float32)), "TIFF", {"compression": "tiff_lzw"}),
        (rgb.convert("LAB"), "TIFF", {}),
        (rgb.convert("1"), "TIFF", {"compression": "group4"}),
    ]
    found = []
    for image, kind, options in choices:
        file = io.BytesIO()
        image.save(file, kind, **options)
        found.append((f".{kind.lower()}", file.getvalue()))
    return [x for x in found if len(x[1]) < 1 << 14]


def sounds(folder: Path) -> Seeds:
    """A tenth of a second of sound in many codecs and containers, with and without video, and with a hole."""
    kinds = [
        *(("wav", codec) for codec in ("pcm_s16le", "pcm_f32le", "pcm_u8", "adpcm_ms")),
        *((codec, codec) for codec in ("flac", "aac", "ac3", "mp2")),
        *(("au", "pcm_s16be"), ("aiff", "pcm_s16be"), ("mp3", "libmp3lame"), ("ogg", "libopus")),
        *(("ogg", "flac"), ("m4a", "aac"), ("m4a", "alac"), ("mka", "libopus")),
    ]
    for i, (suffix, codec) in enumerate(kinds):
        channels, rate = 1 + i % 2, 8_000 if "pcm" in codec else 48_000
        path, lost = folder / f"{codec}.{suffix}", [(0.04, 0.07)] * (suffix == "mka")
        encode(path, clicks(seconds=0.1, channels=channels), codec, rate, lost=lost, video=False)
    encode(folder / "video.mkv", clicks(seconds=0.1), "aac", late=0.02)
    encode(folder / "video.mp4", clicks(seconds=0.1, channels=6), "aac", layout="5.1")
    return [(path.suffix, path.read_bytes()) for path in sorted(folder.iterdir())]


def videos(folder: Path) -> Seeds:
    """A few small frames in many codecs and containers."""
    kinds = {
        "mp4": "libx264", "mkv": "libx264", "webm": "libvpx", "avi": "mpeg4", "mov": "mjpeg",
        "ts": "mpeg2video", "flv": "flv", "gif": "gif", "apng": "apng", "hevc": "libx265",
        "wmv": "wmv2", "nut": "ffv1",
    }  # fmt: skip
    for suffix, codec in kinds.items():
        with av.open(str(folder / f"v.{suffix}"), "w") as output:
            options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
            stream = output.add_stream(codec, rate=25, options=options)
            stream.width, stream.height = 32, 16
            formats = {"mjpeg": "yuvj420p", "gif": "rgb8", "apng": "rgb24"}
            stream.pix_fmt = formats.get(codec, "yuv420p")
            for i in range(12 if suffix == "ts" else 4):  # a shorter MPEG transport stream is not recognised
                pixels = np.full((16, 32, 3), 20 * i, np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            output.mux(stream.encode(None))
    return [(path.suffix, path.read_bytes()) for path in sorted(folder.iterdir())]


def weights(folder: Path) -> Seeds:
    """A safetensors file of several dtypes, one of scaled weights, an index, a manifest and a GGUF file."""
    plain = {
        "a.weight": np.zeros((2, 3), np.float32),
        "b": np.ones(4, np.float16),
        "c": np.arange(3),
        "d": np.float64(1),
    }
    scaled = {"a.weight": np.ones((2, 3), np.int8), "a.weight_scale": np.ones(2, np.float32)}
    tensors = {"a.weight": [2, 3], "b": [4]}
    for name in ("a", "b"):  # the index, as all inputs, lies in the folder above
        (folder / f"{name}.safetensors").write_bytes(save({name: np.ones(1, np.float32)}))
    files = {name: f"{folder.name}/{name}.safetensors" for name in ("a", "b")}
    index = {"weight_map": files, "metadata": {"total_size": 8}}
    return [
        (".safetensors", save({k: np.asarray(x) for k, x in plain.items()}, {"format": "pt"})),
        (".safetensors", save(scaled)),
        (".safetensors.index.json", json.dumps(index).encode()),
        (".json", json.dumps({"dtype": "float16 (.pth)", "tensors": tensors}).encode()),
        (".gguf", _gguf(folder / "x.gguf")),
    ]


def _gguf(path: Path) -> bytes:
    import gguf

    writer = gguf.GGUFWriter(path, "wan")
    writer.add_array("comfy.gguf.orig_shape.a", [4, 8])
    writer.add_tensor("a", np.ones((1, 32), np.float32))
    writer.add_tensor("b", np.ones((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def latents(folder: Path) -> Seeds:
    """Saved latents and noise."""
    values = np.ones((1, 4, 2, 2, 2), np.float32)
    return [
        (".safetensors", save({"latents": values}, {"num_frames": "5"})),
        (".safetensors", save({"noise": values})),
        (".safetensors", save({"latents": values.astype(np.float16)})),
    ]


def settings(folder: Path) -> Seeds:
    """All settings of some configs."""
    found = []
    for location in CONFIGS:
        lines = [f"{name}={value!r}" for name, value in _settings(load_config(str(ROOT / location)))]
        found.append((".txt", "\n".join([location, *lines]).encode()))
    return found


def _settings(section, prefix: str = ""):
    """Names and values of all settings."""
    pairs = section.items() if hasattr(section, "items") else enumerate(section)
    for name, value in pairs:
        parts = value if isinstance(value, tuple) else [value]
        if any(hasattr(part, "items") for part in parts):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def batches(folder: Path) -> Seeds:
    """Rows of clips."""
    return [
        (".csv", b'image,audio,prompt,output\na.png,a.wav,"A man, talking",out/a.mp4\nb.png,b.wav,,c.mp4\n'),
        (".csv", b"\xef\xbb\xbfoutput,image,audio\r\nc.mp4,a.png,a.wav\r\n"),
    ]


def captions(folder: Path) -> Seeds:
    """Prompts of videos."""
    return [
        (".csv", b'file_name,prompt\na.mp4,A woman talks\nb/c.mp4,"A man, who sings"\n'),
        (".jsonl", b'{"file_name": "a.mp4", "prompt": "A woman"}\n{"file_name": "b", "prompt": "A man"}\n'),
    ]


def stores(folder: Path) -> Seeds:
    """Records of stored networks, whose items are empty, and of a pipeline."""
    assets = ROOT / "fantasy_jax/assets/tiny"
    records = [
        json.loads((assets / f"{slot}/component.json").read_text()) for slot in ("vae", "audio_adapter")
    ]
    records = [record | {"items": dict.fromkeys(record["items"], 0)} for record in records]
    files = [*(json.dumps(record).encode() for record in records), (assets / "pipeline.json").read_bytes()]
    return [(".json", content) for content in files]


MAKERS: dict[str, tuple[Callable[[Path], Seeds], Callable[[Random, Seeds], tuple[str, bytes]]]] = {
    "picture": (pictures, changed),
    "sound": (sounds, changed),
    "video": (videos, changed),
    "weights": (weights, changed_json),
    "latents": (latents, changed_json),
    "settings": (settings, changed_settings),
    "batch": (batches, changed),
    "captions": (captions, changed),
    "store": (stores, changed_json),
}
"""How valid files of each target are made, and how they are changed."""
