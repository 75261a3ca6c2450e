"""The processes of a run end together: where one fails, the others would wait for it, some without end.

A process that fails tells the others through JAX's coordination service; a thread of each listens. A process
that hears of it while its main thread waits, in a collective or in a barrier of a checkpoint, ends itself.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import jax
from jax._src import distributed  # JAX has no public access to the service
from tqdm import tqdm

from fantasy_jax.errors import Stopped

GRACE_SECONDS = 10.0
"""Time in which a process fails by itself, as it does where all have the same reason."""
_POLL_SECONDS = 0.5
_FOLDER = "fantasy_jax/failed"
_FOLLOWED = "followed"
"""What a process tells that ends because of another one."""


class Peers:
    """The processes of a run, from the view of one of them."""

    def __init__(self):
        """Begins to listen."""
        self._client = distributed.global_state.client
        self._index, self._count = jax.process_index(), jax.process_count()
        self._failed, self._left = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tells the others if this process fails; ends it unless all fail by themselves."""
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            if not self._failed.is_set():
                self._fail(error)
            raise

    def leave(self) -> None:
        """Ends listening."""
        self._left.set()

    def _fail(self, error: Exception) -> None:
        self._failed.set()
        message = " ".join(str(error).split()) or type(error).__name__
        self._tell(message)
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while len(told := self._all_told()) < self._count and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if len(told) < self._count or _FOLLOWED in told.values():
            self._end(message)

    def _listen(self) -> None:
        while not self._left.wait(_POLL_SECONDS):
            try:
                told = self._all_told()
            except RuntimeError:  # the service is gone; JAX ends this process by itself
                return
            others = {index: text for index, text in told.items() if text != _FOLLOWED}
            if others and not self._failed.wait(GRACE_SECONDS) and not self._left.is_set():
                index, message = min(others.items())
                self._tell(_FOLLOWED)
                self._end(f"process {index} failed: {message}")
            if others:
                return

    def _tell(self, message: str) -> None:
        self._client.key_value_set(f"{_FOLDER}/{self._index}", message)

    def _all_told(self) -> dict[int, str]:
        """What each process that fails has told, by its number."""
        return {int(key.rpartition("/")[2]): text for key, text in self._client.key_value_dir_get(_FOLDER)}

    def _end(self, message: str) -> NoReturn:
        """Ends this process, whatever its other threads wait for."""
        tqdm.write(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.stderr.flush()
        if self._index == 0:  # has the service, without which the others end in an error of their own
            time.sleep(4 * _POLL_SECONDS)
        os._exit(2)


@contextmanager
def failing_together() -> Iterator[Peers | None]:
    """Ends all processes of a run, each in one line and within a bounded time, if one of them fails.

    Where all fail by themselves, as with settings that are refused, the errors are raised; so they are where
    there is one process, and None is yielded then.
    """
    if jax.process_count() == 1:
        yield None
        return
    peers = Peers()
    try:
        with peers.told():
            yield peers
    finally:
        peers.leave()
