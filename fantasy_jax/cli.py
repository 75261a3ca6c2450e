"""Shared parts of the command lines: settings as arguments, errors in one line, timings of phases."""

import argparse
import io
import logging
import math
import os
import re
import select
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, get_args

from ml_collections import ConfigDict
from tqdm import tqdm

from fantasy_jax.config import Range, load_config, override
from fantasy_jax.errors import FantasyError, Stopped

EXPECTED = (FantasyError, FloatingPointError, OSError)
"""Errors that a user's input causes; `run` prints them as one line."""

_PATIENCE_SECONDS = 1.0
_SAME_SECONDS = 0.5
"""Time after SIGINT in which another one is the same: `timeout` signals the program and then its group."""
_STOPPING = "stopping when the step or the compilation that runs has ended; press Ctrl-C again to end now"
_LOG = logging.getLogger(__package__)
_EXAMPLE = re.compile(r"^  python ", re.MULTILINE)


class ArgumentParser(argparse.ArgumentParser):
    """A parser with one-line errors, whose help keeps the line breaks of its examples.

    Examples begin with two spaces and `python`, which is shown as the interpreter that runs.
    """

    def __init__(self, **arguments):
        """As argparse's, without abbreviations: a new argument must not change old commands."""
        arguments.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **arguments)

    def format_help(self) -> str:
        """The help, with examples that run as they are written."""
        return _EXAMPLE.sub(lambda _: f"  {interpreter()} ", super().format_help())

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def interpreter() -> str:
    """What starts the interpreter that runs, from the current folder: `python` where the path has it."""
    running = Path(sys.executable)
    if (found := shutil.which("python")) and Path(found) == running:
        return "python"
    try:
        return shlex.quote(str(running.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(running))


def add_config_argument(parser: ArgumentParser) -> None:
    """Adds `--config=FILE[:ARGUMENT]`, in addition to which `parse` accepts `--config.NAME=VALUE`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARGUMENT]",
        help="config file, such as configs/tiny.py; --config.NAME=VALUE overrides one of its settings",
    )


def parse(parser: ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, ConfigDict]:
    """Parses a command line; returns its arguments and the config with its overrides applied."""
    argv = sys.argv[1:] if argv is None else argv
    prefix = "--config."
    settings = [argument.removeprefix(prefix) for argument in argv if argument.startswith(prefix)]
    arguments = parser.parse_args([argument for argument in argv if not argument.startswith(prefix)])
    return arguments, override(load_config(arguments.config), settings)


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """A type of command-line arguments: integers of a range."""
    return number(Annotated[int, Range(low, high)])


def number(declared: Any) -> Callable[[str], int | float]:
    """A type of command-line arguments: numbers declared as settings are, such as `config.PositiveFloat`."""
    kind, allowed = get_args(declared)

    def convert(text: str) -> int | float:
        value = kind(text)
        try:
            allowed.check(value, "the number")
        except FantasyError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    convert.__name__ = kind.__name__  # named by argparse where the conversion fails
    return convert


def config_files(location: str, config: ConfigDict) -> list[str]:
    """The config file and the files that its settings name, such as models: inputs of the command."""
    found, rest = [location.partition(":")[0]], list(config.values())
    while rest:
        value = rest.pop()
        if isinstance(value, ConfigDict):
            rest += value.values()
        elif isinstance(value, list | tuple):
            rest += value
        elif isinstance(value, str) and os.path.isfile(value):
            found.append(value)
    return found


def run(main: Callable[[], int | None], prog: str) -> NoReturn:
    """Runs a command; an expected error prints one line and exits with code 2, an interruption with 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        with _interruptible(prog), _warnings_shown():
            status = main()
        sys.exit(status or 0)
    except BrokenPipeError:  # the reader has closed the pipe, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except EXPECTED as error:
        print(f"{prog}: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # JAX's error of a device without enough memory is a RuntimeError; its class is not imported here.
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{prog}: error: not enough memory, use smaller sizes ({_one_line(error)})", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        handler = signal.getsignal(signal.SIGINT)
        if isinstance(handler, partial) and handler.func is _end:
            sys.stdout.flush()
            handler()  # JAX's threads, such as of a compilation, can crash a Python that exits the usual way
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)


def exit_on_interrupt(prog: str) -> None:
    """Makes Ctrl-C end a program at once, in one line: for its imports, which take seconds, before `run`."""
    signal.signal(signal.SIGINT, partial(_end, prog))


def _end(prog: str, number: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    _write_error(f"{prog}: interrupted\n")
    os._exit(128 + number)


def _write_error(text: str) -> None:
    """Writes to standard error where the streams may be in use, as in signal handlers; ignores failures."""
    with suppress(OSError):
        os.write(2, text.encode())


class _WarningHandler(logging.Handler):
    """Prints the package's warnings like the other messages of a command, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one line, unless the reader of standard error is gone, which must not end the command."""
        text = _printable(" ".join(record.getMessage().splitlines()))
        with suppress(BrokenPipeError):
            tqdm.write(f"{record.levelname.lower()}: {text}", file=sys.stderr)


_WARNING_HANDLER = _WarningHandler()


def show_warnings() -> None:
    """Prints the package's warnings as `warning: ...`, whatever handlers libraries have set up."""
    _LOG.addHandler(_WARNING_HANDLER)
    _LOG.propagate = False


@contextmanager
def _warnings_shown() -> Iterator[None]:
    show_warnings()
    try:
        yield
    finally:
        _LOG.removeHandler(_WARNING_HANDLER)
        _LOG.propagate = True


@contextmanager
def _interruptible(prog: str) -> Iterator[None]:
    """Makes SIGINT a KeyboardInterrupt, whatever the code that it interrupts makes of that.

    Python drops exceptions in callbacks of the garbage collector, and libraries replace them by their own.
    """
    interrupts: list[float] = []  # when they came
    repeated: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not interrupts or time.monotonic() - interrupts[-1] > _SAME_SECONDS:
            interrupts.append(time.monotonic())
            raise KeyboardInterrupt

    def repeat_if_dropped(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            interrupts.append(-math.inf)
            repeated.append(signal.SIGINT)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            before(dropped)

    handler, before = signal.signal(signal.SIGINT, interrupt), sys.unraisablehook
    sys.unraisablehook = repeat_if_dropped
    try:
        with _interrupts_answered(prog, repeated):
            yield
    except Exception as error:
        if interrupts and not isinstance(error, Stopped):
            raise KeyboardInterrupt from error
        raise
    finally:
        sys.unraisablehook = before
        signal.signal(signal.SIGINT, signal.default_int_handler if handler is None else handler)


@contextmanager
def _interrupts_answered(prog: str, repeated: list[int]) -> Iterator[None]:
    """Reports that Ctrl-C was received while the main thread is busy; a second Ctrl-C ends the program.

    Python's handlers run in the main thread, which a compilation holds for minutes; a thread reads the
    signals' numbers as they arrive. Those in `repeated` are sent by the program itself.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_answer_interrupts, args=(prog, reading, repeated), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


def _answer_interrupts(prog: str, reading: int, repeated: list[int]) -> None:
    first, patience = None, None  # when the first one came, and how long to wait before that is reported
    while True:
        if not select.select([reading], [], [], patience)[0]:
            _write_error(f"\n{prog}: {_STOPPING}\n")
            patience = None
            continue
        if not (number := os.read(reading, 1)):  # the other end is closed
            break
        if number[0] != signal.SIGINT:
            continue
        if repeated:
            repeated.pop()
        elif first is None:
            first, patience = time.monotonic(), _PATIENCE_SECONDS
        elif time.monotonic() - first > _SAME_SECONDS:
            _end(prog)
    os.close(reading)


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Prints the duration of a phase: `Text encoder ................... 1.2 s`."""
    start = time.perf_counter()
    yield
    print(f"{name + ' ':.<40} {time.perf_counter() - start:6.1f} s", flush=True)


def markdown_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Collection[str] = ()
) -> str:
    """Formats a Markdown table.

    Args:
        columns: Headings.
        rows: The cells of each row.
        numbers: Headings of the columns that are aligned right.
    """
    aligned = ["--:" if column in numbers else "---" for column in columns]

    def line(cells: Sequence[str]) -> str:
        escaped = (cell.replace("|", "&#124;") for cell in cells)
        return "".join(f"| {cell} " if cell else "| " for cell in escaped) + "|"

    return "\n".join(map(line, (columns, aligned, *rows)))


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return _printable(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    first, *more = str(error).splitlines() or [type(error).__name__]
    return _printable(f"{first} (and {len(more)} more)" if more else first)


def _printable(text: str) -> str:
    """The text with escapes in place of what terminals do not print, such as their control sequences."""
    return "".join(x if x.isprintable() else ascii(x).strip("'") for x in text)
