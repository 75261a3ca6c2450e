"""Download of the published files from the Hugging Face hub, into the folders of fantasy-talking's README."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fantasy_jax.disk import check_space, free_bytes
from fantasy_jax.errors import WeightsError
from fantasy_jax.system.registry import components


@dataclass(frozen=True)
class Repository:
    """A repository on the hub.

    Attributes:
        name: Its name.
        folder: Folder for its files, relative to the output folder.
        patterns: Shell patterns of the files that are needed.
    """

    name: str
    folder: str
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class HostedFile:
    """A file on the hub, with its size in bytes."""

    repository: Repository
    name: str
    bytes: int

    def is_in(self, output: Path) -> bool:
        """Whether the output folder holds the complete file."""
        path = output / self.repository.folder / self.name
        return path.is_file() and path.stat().st_size == self.bytes


def hosted_slots() -> list[str]:
    """Returns the slots of the networks that are published, in the order of their rows."""
    return list(dict.fromkeys(row.slot for row in components().values() if row.download.repository))


def repositories(networks: Collection[str] | None = None) -> list[Repository]:
    """Returns the repositories of networks, by their slots; None: of all."""
    found: dict[str, Repository] = {}
    rows = [row for row in components().values() if networks is None or row.slot in networks]
    for source in (row.download for row in rows):
        if source.repository:
            patterns = found[source.repository].patterns if source.repository in found else ()
            found[source.repository] = Repository(
                source.repository, source.folder, (*patterns, *source.patterns)
            )
    return list(found.values())


def hosted_files(networks: Collection[str] | None = None) -> list[HostedFile]:
    """Returns all files that networks need, with their sizes.

    Args:
        networks: Slots of the networks; None: all.

    Raises:
        WeightsError: The hub cannot be reached, or a repository does not hold a file.
    """
    from huggingface_hub import HfApi

    files = []
    for repository in repositories(networks):
        try:
            siblings = HfApi().model_info(repository.name, files_metadata=True, timeout=30).siblings or []
        except (
            Exception
        ) as error:  # errors of the hub, the transport and the system have no common base class
            raise WeightsError(_failure(repository.name, error)) from error
        for pattern in repository.patterns:
            found = [x for x in siblings if fnmatchcase(x.rfilename, pattern)]
            if not found:
                raise WeightsError(f"{repository.name}: holds no {pattern}; is there a newer fantasy_jax?")
            files += [HostedFile(repository, x.rfilename, x.size or 0) for x in found]
    return list(dict.fromkeys(files))


def download(output: str | Path, networks: Collection[str] | None = None) -> None:
    """Downloads all files and prints their sizes first; continues an interrupted call.

    Args:
        output: A folder; 85 GiB are needed for all networks.
        networks: Slots of the networks; None: all.

    Raises:
        WeightsError: `output` is a file, the hub cannot be reached, the disk has not enough space, or a
            download fails.
    """
    from huggingface_hub import hf_hub_download

    output = Path(output)
    if output.exists() and not output.is_dir():
        raise WeightsError(f"{output}: is a file; give the name of a folder")
    files = hosted_files(networks)
    missing = [file for file in files if not file.is_in(output)]
    for file in files:
        state = "to download" if file in missing else "complete"
        print(f"{file.bytes / 2**30:8.2f} GiB  {file.repository.name}/{file.name}  {state}")
    needed = sum(file.bytes for file in missing)
    free = free_bytes(output) + _incomplete_bytes(output)
    print(
        f"{needed / 2**30:8.2f} GiB  to download into {output}; {free / 2**30:.2f} GiB are free", flush=True
    )
    check_space(output, needed, free)
    existed = output.exists()
    for file in missing:
        folder = output / file.repository.folder
        try:
            hf_hub_download(file.repository.name, file.name, local_dir=folder)
        except Exception as error:  # as above
            _remove_empty(folder, output, keep=existed)
            raise WeightsError(_failure(f"{file.repository.name}/{file.name}", error)) from error
        if not file.is_in(output):
            raise WeightsError(f"{folder / file.name}: is incomplete; run the same command again")


def _remove_empty(folder: Path, output: Path, *, keep: bool) -> None:
    """Removes what a failed download leaves behind in a repository's folder, unless it can be continued.

    Args:
        folder: Folder of the repository's files.
        output: Folder of all repositories.
        keep: Whether `output` stays if it is empty.
    """
    cache = folder / ".cache"
    if not any(path.stat().st_size for path in cache.rglob("*.incomplete")):
        shutil.rmtree(cache, ignore_errors=True)
    empty = [path for path in sorted(folder.rglob("*"), reverse=True) if path.is_dir()]
    for path in (*empty, *([] if folder == output else [folder]), *([] if keep else [output])):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _incomplete_bytes(output: Path) -> int:
    """Size of the partial downloads of an interrupted call, which are continued."""
    folders = {output / repository.folder / ".cache" for repository in repositories()}
    return sum(x.stat().st_size for folder in folders for x in folder.rglob("*.incomplete"))


def _failure(name: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return f"{name}: download failed ({reason}); check the connection, then run the same command again"
