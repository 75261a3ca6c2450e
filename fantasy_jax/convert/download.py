"""The official files from the Hugging Face hub, under the names that fantasy-talking's README gives them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fantasy_jax.convert.files import WeightsError


@dataclass(frozen=True)
class Repository:
    """Where files are hosted, and where they go.

    Attributes:
        name: Of the hub.
        folder: Below the output folder; empty for that itself.
        patterns: Of the files that are needed.
    """

    name: str
    folder: str
    patterns: Sequence[str]


REPOSITORIES = (
    Repository(
        "Wan-AI/Wan2.1-I2V-14B-720P",
        "Wan2.1-I2V-14B-720P",
        ("diffusion_pytorch_model*", "config.json", "Wan2.1_VAE.pth", "models_*.pth", "google/umt5-xxl/*"),
    ),
    Repository("acvlab/FantasyTalking", "", ("fantasytalking_model.ckpt",)),
    Repository("facebook/wav2vec2-base-960h", "wav2vec2-base-960h", ("*.json", "model.safetensors")),
)


@dataclass(frozen=True)
class HostedFile:
    """One file to fetch, with its size in bytes."""

    repository: Repository
    name: str
    bytes: int

    def is_in(self, output: Path) -> bool:
        """Whether it is there already, complete."""
        path = output / self.repository.folder / self.name
        return path.is_file() and path.stat().st_size == self.bytes


def hosted_files() -> list[HostedFile]:
    """All files that the system needs, with their sizes.

    Raises:
        WeightsError: The hub cannot be reached, or a repository no longer holds what is needed.
    """
    from huggingface_hub import HfApi

    files = []
    for repository in REPOSITORIES:
        try:
            siblings = HfApi().model_info(repository.name, files_metadata=True, timeout=30).siblings or []
        except Exception as error:  # the hub's, the transport's and the system's errors have no common base
            raise WeightsError(_failure(repository.name, error)) from error
        for pattern in repository.patterns:
            found = [x for x in siblings if fnmatchcase(x.rfilename, pattern)]
            if not found:
                raise WeightsError(f"{repository.name}: holds no {pattern}; is there a newer fantasy_jax?")
            files += [HostedFile(repository, x.rfilename, x.size or 0) for x in found]
    return list(dict.fromkeys(files))


def download(output: str | Path) -> None:
    """Fetches all files; goes on where an interrupted call has stopped, and prints sizes before it starts.

    Args:
        output: A folder; 80 GiB are needed.

    Raises:
        WeightsError: The hub cannot be reached, the disk has no room, or a file cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    output = Path(output)
    files = hosted_files()
    missing = [file for file in files if not file.is_in(output)]
    for file in files:
        state = "to fetch" if file in missing else "there already"
        print(f"{file.bytes / 2**30:8.2f} GiB  {file.repository.name}/{file.name}  {state}")
    needed = sum(file.bytes for file in missing)
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free + _begun(output)
    print(f"{needed / 2**30:8.2f} GiB  to fetch into {output}; {free / 2**30:.2f} GiB are free", flush=True)
    if needed > free:
        raise WeightsError(
            f"{output}: no room; {needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} are free"
        )
    for file in missing:
        folder = output / file.repository.folder
        try:
            hf_hub_download(file.repository.name, file.name, local_dir=folder)
        except Exception as error:  # see above
            raise WeightsError(_failure(f"{file.repository.name}/{file.name}", error)) from error
        if not file.is_in(output):
            raise WeightsError(f"{folder / file.name}: did not arrive whole; run the same command again")


def _begun(output: Path) -> int:
    """Bytes of what an interrupted call has left, which is gone on with."""
    folders = {output / repository.folder / ".cache" for repository in REPOSITORIES}
    return sum(x.stat().st_size for folder in folders for x in folder.rglob("*.incomplete"))


def _failure(what: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return f"{what}: cannot be fetched ({reason}); check the connection, then run the same command again"
