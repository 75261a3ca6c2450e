"""Worker processes: signals are handled by the main process alone, and no worker outlives it.

Ctrl-C in a terminal, and many schedulers' SIGTERM, go to every process of a group. A worker that ends on its
own makes its pool raise while the main process saves.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from fantasy_jax.cli import show_warnings

STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM in this thread, and in the processes and threads that it starts meanwhile.

    A signal that arrives is delivered at the end. Processes keep the mask from their start on; handlers that
    they set themselves would come seconds later, after their imports.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it inside, and then unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker() -> None:
    """Sets up a worker process: its warnings are printed as those of the command are.

    It ends when the process that started it has ended, even by SIGKILL.
    """
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    show_warnings()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
