"""Recognition of what a file is by its content, whatever its name says."""

import struct
import zipfile
from pathlib import Path
from typing import Literal

from fantasy_jax.errors import WeightsError
from fantasy_jax.files import parse_json

Kind = Literal["safetensors", "pickle", "gguf", "onnx", "json"]

_UNFINISHED = (
    ".aria2",
    ".crdownload",
    ".download",
    ".incomplete",
    ".opdownload",
    ".part",
    ".partial",
    ".tmp",
)
"""Suffixes that programs give to a download that is not complete, or to a file beside it."""
_HEAD = 1024
_PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
_SAFETENSORS_SUFFIXES = (".safetensors", ".sft")


def kind_of(path: Path) -> Kind:
    """Recognises a file of weights by its content, and by its suffix where the content does not tell.

    Raises:
        WeightsError: The file is something else: a Git LFS pointer, a web page, an archive, an unfinished
            download, or of an unknown kind.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    size = path.stat().st_size
    _refuse_what_is_none(path, head, size)
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return "pickle"
    if path.suffix in _SAFETENSORS_SUFFIXES or _is_safetensors(head):
        _check_safetensors(path, head, size)
        return "safetensors"
    if path.suffix in _PICKLE_SUFFIXES or head.startswith(b"\x80"):
        return "pickle"
    if path.suffix == ".onnx":
        return "onnx"
    if path.suffix == ".json":
        return "json"
    raise WeightsError(f"{path}: unknown kind of file; give .safetensors, .pth, .ckpt, .gguf, .onnx or .json")


def _refuse_what_is_none(path: Path, head: bytes, size: int) -> None:
    """Raises a WeightsError for content that downloads leave in place of weights."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    beside = path.with_name(f"{path.name}.aria2")
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        fault = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    elif text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        fault = "is a web page, not weights; download the file itself, after accepting its terms if needed"
    elif path.suffix in _UNFINISHED or beside.exists():
        fault = "is a download that has not finished; let it finish"
    elif not size:
        fault = "damaged: it is empty; download it again"
    elif not head.strip(b"\0"):
        fault = "damaged: it begins with zeros, as a download that has not finished does; download it again"
    elif head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ")):
        fault = "is a compressed archive; unpack it first"
    elif path.suffix != ".json" and text.startswith(b"{") and _is_json_object(path, size):
        fault = "is JSON, such as the message of a server, not weights; download the file again"
    elif path.suffix != ".json" and size < _HEAD and head.isascii() and head.decode("ascii").isprintable():
        fault = f"damaged: it holds only the text {head[:60].decode()!r}; download it again"
    else:
        return
    raise WeightsError(f"{path}: {fault}")


def _is_json_object(path: Path, size: int) -> bool:
    try:
        return size < 1 << 20 and isinstance(parse_json(path.read_bytes()), dict)
    except ValueError:
        return False


def _check_zip(path: Path) -> None:
    """Raises a WeightsError if an archive, as PyTorch's files are, lacks its end, or is another archive."""
    if not zipfile.is_zipfile(path):
        size = path.stat().st_size
        raise WeightsError(f"{path}: damaged: its end is missing, after {size:,} bytes; download it again")
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("data.pkl") for name in archive.namelist()):
            raise WeightsError(f"{path}: is a .zip archive, not a file of PyTorch; unpack it first")


def _is_safetensors(head: bytes) -> bool:
    """Whether a header of JSON follows its length."""
    return len(head) > 9 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] < 1 << 30


def _check_safetensors(path: Path, head: bytes, size: int) -> None:
    """Raises a WeightsError if the file is shorter than its header says."""
    if not _is_safetensors(head):
        return  # the reader says what is wrong
    length = struct.unpack("<Q", head[:8])[0]
    try:
        with path.open("rb") as file:
            header = parse_json(file.read(8 + length)[8:])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        if size >= 8 + length:
            return
        needed = 8 + length
    if size < needed:
        raise WeightsError(
            f"{path}: damaged: it has {size:,} bytes of at least {needed:,}; the download was cut off, "
            "download it again"
        )
