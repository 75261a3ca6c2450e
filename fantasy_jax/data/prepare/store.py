"""Videos' results on disk, made by several processes: each is whole or not there, so that a run can go on.

    WORK/videos/<digest>/clips.json     what became of every clip, dropped ones too
                         000.mp4        a kept clip's frames, without loss
                         000.npz        all else of its record
                         000.jpg        one frame, of dropped clips too

A folder is named by its video's content, and WORK by the settings; it is written beside, and gets its name
when all is there.
"""

import json
import multiprocessing
import multiprocessing.util
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fantasy_jax import media
from fantasy_jax.data.prepare.scan import Source
from fantasy_jax.data.prepare.stages import Clip, Detectors, OpenDetectors, Task, prepare_video
from fantasy_jax.data.records import Record

_CLIPS = "clips.json"
_DIGITS = 16
"""Of a video's digest that name its folder."""
_PARTIAL = ".partial"


@dataclass(frozen=True)
class StoredClips(Sequence[Record]):
    """Records of kept clips, each read when it is asked for."""

    work: Path
    clips: Sequence[Clip]

    def __len__(self) -> int:
        """How many."""
        return len(self.clips)

    def __getitem__(self, index: Any) -> Any:
        """A record; or a part of the sequence."""
        if isinstance(index, slice):
            return replace(self, clips=self.clips[index])
        clip = self.clips[index]
        stem = _folder(self.work, clip.digest) / f"{clip.number:03d}"
        with np.load(stem.with_suffix(".npz")) as file:
            record = {name: file[name] for name in file.files}
        return record | {"video": media.read_video(stem.with_suffix(".mp4"))[0]}


def picture_of(work: Path, clip: Clip) -> bytes | None:
    """A clip's frame, as the bytes of a JPEG file."""
    path = _folder(work, clip.digest) / f"{clip.number:03d}.jpg"
    return path.read_bytes() if path.exists() else None


def prepare_videos(
    work: Path, sources: Sequence[Source], task: Task, open_detectors: OpenDetectors, *, processes: int
) -> Iterator[tuple[Source, list[Clip]]]:
    """Every video's clips, without their records, as they are ready; those that lie there come first.

    A video whose process dies, of whatever its decoder does, is tried once more alone and then dropped.
    """
    for left_behind in (work / "videos").glob(f"*{_PARTIAL}"):
        shutil.rmtree(left_behind)
    missing = []
    for source in sources:
        if (_folder(work, source.digest) / _CLIPS).exists():
            yield source, read_clips(work, source)
        else:
            missing.append(source)
    waiting = deque(missing)
    while waiting:
        running: dict[Future, Source] = {}
        try:
            with _pool(min(processes, len(waiting)), work, task, open_detectors) as pool:
                while waiting or running:
                    while waiting and len(running) < processes:
                        running[pool.submit(_prepare, waiting[0])] = waiting[0]
                        waiting.popleft()  # not before: a broken pool takes nothing
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        source = running.pop(future)
                        yield source, read_clips(work, source)
        except BrokenProcessPool:
            for source in running.values():
                _prepare_alone(source, work, task, open_detectors)
                yield source, read_clips(work, source)


def _prepare_alone(source: Source, work: Path, task: Task, open_detectors: OpenDetectors) -> None:
    if (_folder(work, source.digest) / _CLIPS).exists():
        return
    try:
        with _pool(1, work, task, open_detectors) as pool:
            pool.submit(_prepare, source).result()
    except BrokenProcessPool:
        message = "the process that reads it dies; its stream or the machine's memory may be the cause"
        write_clips(work, source, [Clip(source.name, source.digest, -1, (0.0, 0.0), "crash", message)])


def _pool(processes: int, work: Path, task: Task, open_detectors: OpenDetectors) -> ProcessPoolExecutor:
    # Not forked: JAX and decoders have threads.
    return ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(work, task, open_detectors),
    )


_worker: dict[str, Any] = {}
"""Of a process of the pool: what it was begun with, and its detectors once they are open."""


def _begin(work: Path, task: Task, open_detectors: OpenDetectors) -> None:
    _worker.update(work=work, task=task, open_detectors=open_detectors)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A run that is killed leaves no process behind that would write where the next run does."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _prepare(source: Source) -> None:
    if "detectors" not in _worker:
        opened = ExitStack()
        _worker["detectors"] = opened.enter_context(_worker["open_detectors"](_worker["task"].config))
        multiprocessing.util.Finalize(None, opened.close, exitpriority=1)
    detectors: Detectors = _worker["detectors"]
    write_clips(_worker["work"], source, prepare_video(source, _worker["task"], detectors))


def write_clips(work: Path, source: Source, clips: Sequence[Clip] | Iterator[Clip]) -> None:
    """Writes a video's clips, whole or not at all."""
    folder = _folder(work, source.digest)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}{_PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    described = []
    for clip in clips:
        stem = partial / f"{clip.number:03d}"
        if clip.picture is not None:
            stem.with_suffix(".jpg").write_bytes(media.jpeg(clip.picture))
        if clip.record is not None:
            rest = {name: value for name, value in clip.record.items() if name != "video"}
            np.savez_compressed(stem.with_suffix(".npz"), **rest)
            media.write_video(stem.with_suffix(".mp4"), clip.record["video"], 25, lossless=True)
        described.append(clip.to_json())
    (partial / _CLIPS).write_text(json.dumps(described, indent=1))
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(partial)  # another process was faster, with the same result


def read_clips(work: Path, source: Source) -> list[Clip]:
    """A video's clips, under its present name."""
    described = json.loads((_folder(work, source.digest) / _CLIPS).read_text())
    return [Clip.from_json(clip | {"source": source.name}) for clip in described]


def _folder(work: Path, digest: str) -> Path:
    return work / "videos" / digest[:_DIGITS]
