"""Results of videos on disk, made by parallel processes; each is complete or absent, so that runs can resume.

    WORK/videos/<digest>/clips.json     all clips, kept and dropped
                         000.mp4        frames of a clip that is kept, lossless
                         000.npz        the rest of its record
                         000.jpg        thumbnail, of dropped clips too

A folder is named by its video's content, and WORK by the settings. It is written under a temporary name and
renamed when complete.
"""

import json
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
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
from fantasy_jax.data.records import Record
from fantasy_jax.prepare.analysis import Detectors, OpenDetectors, PrepareTask
from fantasy_jax.prepare.scan import SourceVideo
from fantasy_jax.prepare.stages import PreparedClip, prepare_video
from fantasy_jax.processes import STOP_SIGNALS, init_worker, signals_blocked

_CLIPS = "clips.json"
_DIGITS = 16
"""Digits of a video's digest that name its folder."""
_PARTIAL = ".partial"


@dataclass(frozen=True)
class StoredClips(Sequence[Record]):
    """Raw records of clips that are kept, each read when it is accessed.

    Attributes:
        work: Folder of the results.
        clips: The clips, in the order of the dataset.
    """

    work: Path
    clips: Sequence[PreparedClip]

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.clips)

    def __getitem__(self, index: Any) -> Any:
        """Reads a record, or selects a part of the sequence."""
        if isinstance(index, slice):
            return replace(self, clips=self.clips[index])
        clip = self.clips[index]
        stem = _folder(self.work, clip.digest) / f"{clip.number:03d}"
        with np.load(stem.with_suffix(".npz")) as file:
            record = {name: file[name] for name in file.files}
        return record | {"video": media.read_video(stem.with_suffix(".mp4"))[0]}


def read_thumbnail(work: Path, clip: PreparedClip) -> bytes | None:
    """Returns a clip's thumbnail as the bytes of a JPEG file, or None if it has none."""
    path = _folder(work, clip.digest) / f"{clip.number:03d}.jpg"
    return path.read_bytes() if path.exists() else None


def prepare_videos(
    work: Path,
    sources: Sequence[SourceVideo],
    task: PrepareTask,
    open_detectors: OpenDetectors,
    *,
    processes: int,
) -> Iterator[tuple[SourceVideo, list[PreparedClip]]]:
    """Yields every video's clips, without their records: those on disk first, then others as they are ready.

    A video whose process dies, for example in its decoder, is tried once more alone and then dropped.
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
        running: dict[Future, SourceVideo] = {}
        try:
            with _pool(min(processes, len(waiting)), work, task, open_detectors) as pool:
                while waiting or running:
                    while waiting and len(running) < processes:
                        running[_submit(pool, waiting[0])] = waiting[0]
                        waiting.popleft()  # after submit, which a broken pool refuses
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        source = running.pop(future)
                        yield source, read_clips(work, source)
        except BrokenProcessPool:
            for source in running.values():
                _prepare_alone(source, work, task, open_detectors)
                yield source, read_clips(work, source)


def _prepare_alone(source: SourceVideo, work: Path, task: PrepareTask, open_detectors: OpenDetectors) -> None:
    if (_folder(work, source.digest) / _CLIPS).exists():
        return
    try:
        with _pool(1, work, task, open_detectors) as pool:
            _submit(pool, source).result()
    except BrokenProcessPool:
        message = "the process that reads it dies, because of its stream or for lack of memory"
        write_clips(work, source, [PreparedClip.whole_video(source, "crash", message)])


def _pool(
    processes: int, work: Path, task: PrepareTask, open_detectors: OpenDetectors
) -> ProcessPoolExecutor:
    # Not forked: JAX and decoders have threads.
    return ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(work, task, open_detectors),
    )


def _submit(pool: ProcessPoolExecutor, source: SourceVideo) -> Future:
    with signals_blocked():  # it may start a worker
        return pool.submit(_prepare, source)


_worker: dict[str, Any] = {}
"""State of a worker process: its initial arguments, and the detectors once they are open."""


def _start_worker(work: Path, task: PrepareTask, open_detectors: OpenDetectors) -> None:
    _worker.update(work=work, task=task, open_detectors=open_detectors)
    init_worker()  # it ends with its parent, so that no worker writes where the next run does
    # A worker has nothing to save: Ctrl-C ends it without a word, from its start on.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _prepare(source: SourceVideo) -> None:
    if "detectors" not in _worker:
        opened = ExitStack()
        _worker["detectors"] = opened.enter_context(_worker["open_detectors"](_worker["task"].config))
        multiprocessing.util.Finalize(None, opened.close, exitpriority=1)
    detectors: Detectors = _worker["detectors"]
    write_clips(_worker["work"], source, prepare_video(source, _worker["task"], detectors))


def write_clips(
    work: Path, source: SourceVideo, clips: Sequence[PreparedClip] | Iterator[PreparedClip]
) -> None:
    """Writes a video's clips, atomically."""
    folder = _folder(work, source.digest)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}{_PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    described = []
    for clip in clips:
        stem = partial / f"{clip.number:03d}"
        if clip.thumbnail is not None:
            stem.with_suffix(".jpg").write_bytes(media.encode_jpeg(clip.thumbnail))
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


def read_clips(work: Path, source: SourceVideo) -> list[PreparedClip]:
    """Reads a video's clips, under its current name."""
    described = json.loads((_folder(work, source.digest) / _CLIPS).read_text())
    return [PreparedClip.from_json(clip | {"source": source.name}) for clip in described]


def _folder(work: Path, digest: str) -> Path:
    return work / "videos" / digest[:_DIGITS]
