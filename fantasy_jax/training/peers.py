"""The processes of a run end together: where one fails, the others would wait for it, some without end.

A process that fails tells the others through JAX's coordination service, which a thread of each one polls. A
process whose main thread waits then, in a collective or in a barrier of a checkpoint, ends itself.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import jax
from tqdm import tqdm

from fantasy_jax.errors import Stopped

GRACE_SECONDS = 10.0
"""Time in which a process fails by itself, as it does where all have the same reason."""
_POLL_SECONDS = 0.5
_FOLDER = "fantasy_jax/failed"
_FOLLOWED = "followed"
"""Message of a process that ends because another one failed."""
_RUNS = count()
"""Numbers of the runs of this process; all processes begin the same runs."""


class Peers:
    """The processes of a run, from the view of one of them."""

    def __init__(self, client: Any):
        """Starts a thread that polls for failures of other processes.

        Args:
            client: The client of JAX's coordination service.
        """
        self._client, self._folder = client, f"{_FOLDER}/{next(_RUNS)}"
        self._index, self._count = jax.process_index(), jax.process_count()
        self._failed, self._left = threading.Event(), threading.Event()
        self._lock, self._follows = threading.Lock(), False
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tells the others if this process fails; ends it unless all fail by themselves."""
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            if not self._failed.is_set():
                self._settle(self._failed)
                self._fail(error)
            raise

    def leave(self) -> None:
        """Stops the thread."""
        self._settle(self._left)

    def _settle(self, outcome: threading.Event) -> None:
        """Sets an event; does not return if the thread is ending this process because of another one."""
        with self._lock:
            if not self._follows:
                outcome.set()
                return
        threading.Event().wait()

    def _fail(self, error: Exception) -> None:
        message = " ".join(str(error).split()) or type(error).__name__
        told: dict[int, str] = {}
        try:
            self._tell(message)
            deadline = time.monotonic() + 2 * GRACE_SECONDS
            while len(told := self._all_told()) < self._count and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        except RuntimeError:  # the service is gone, and the first process with it
            told = {}
        if len(told) < self._count or _FOLLOWED in told.values():
            self._end(message)

    def _watch(self) -> None:
        while not self._left.wait(_POLL_SECONDS):
            try:
                told = self._all_told()
            except RuntimeError:  # the service is gone; JAX ends this process by itself
                return
            others = {index: text for index, text in told.items() if text != _FOLLOWED}
            if others:
                if not self._failed.wait(GRACE_SECONDS):
                    self._follow(*min(others.items()))
                return

    def _follow(self, index: int, message: str) -> None:
        """Ends this process because another one failed, unless it fails by itself or is done."""
        with self._lock:
            self._follows = not (self._failed.is_set() or self._left.is_set())
        if self._follows:
            with suppress(RuntimeError):  # the service is gone
                self._tell(_FOLLOWED)
            self._end(f"process {index} failed: {message}")

    def _tell(self, message: str) -> None:
        self._client.key_value_set(f"{self._folder}/{self._index}", message)

    def _all_told(self) -> dict[int, str]:
        """Messages of the failed processes, by process index."""
        told = self._client.key_value_dir_get(self._folder)
        return {int(key.rpartition("/")[2]): text for key, text in told}

    def _end(self, message: str) -> NoReturn:
        """Ends this process, whatever its other threads wait for."""
        try:
            tqdm.write(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
            sys.stderr.flush()
            if self._index == 0:  # has the service, without which the others end in an error of their own
                time.sleep(4 * _POLL_SECONDS)
        finally:
            os._exit(2)


@contextmanager
def failing_together() -> Iterator[Peers | None]:
    """Ends all processes of a run, each in one line and within a bounded time, if one of them fails.

    Where all fail by themselves, as with settings that are refused, the errors are raised; so they are where
    there is one process or no coordination service, and None is yielded then.
    """
    client = None
    if jax.process_count() > 1:
        from jax._src import distributed  # JAX has no public access to the service

        client = distributed.global_state.client
    if client is None:
        yield None
        return
    peers = Peers(client)
    try:
        with peers.told():
            yield peers
    finally:
        peers.leave()
