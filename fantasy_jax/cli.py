"""What the command lines share: settings on the command line, one-line errors, phases with their time."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from ml_collections import ConfigDict

from fantasy_jax.config import ConfigError, load_config, override
from fantasy_jax.convert.files import WeightsError
from fantasy_jax.convert.rules import ConversionError
from fantasy_jax.media import MediaError

EXPECTED = (ConfigError, ConversionError, FloatingPointError, MediaError, WeightsError, OSError)
"""Errors that a user's input causes: one line says what, where and what to do."""


class Stopped(Exception):
    """Work that was told to stop, and has saved what it did; the message says how to go on."""

    def __init__(self, message: str, signal: int):
        """Of the signal follows the exit code, as shells have it: 128 and its number."""
        super().__init__(message)
        self.code = 128 + signal


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help keeps the line breaks of its examples."""

    def __init__(self, **arguments):
        """As argparse's; arguments cannot be abbreviated, so that none changes meaning later."""
        arguments.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help explains\n")


def add_config_argument(parser: ArgumentParser) -> None:
    """Adds `--config=FILE[:ARGUMENT]`, beside which `parse` takes `--config.NAME=VALUE`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARGUMENT]",
        help="settings, such as configs/tiny.py; --config.NAME=VALUE changes one of them",
    )


def parse(parser: ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, ConfigDict]:
    """Arguments, and the config with what the command line changes in it."""
    argv = sys.argv[1:] if argv is None else argv
    prefix = "--config."
    settings = [argument.removeprefix(prefix) for argument in argv if argument.startswith(prefix)]
    arguments = parser.parse_args([argument for argument in argv if not argument.startswith(prefix)])
    return arguments, override(load_config(arguments.config), settings)


def run(main: Callable[[], int | None], prog: str) -> NoReturn:
    """Runs a command; an expected error becomes one line and exit code 2, an interruption 130."""
    try:
        sys.exit(main() or 0)
    except BrokenPipeError:  # whoever read the output has seen enough, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except EXPECTED as error:
        print(f"{prog}: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Reports how long a part of the work took: `Text encoder ................... 1.2 s`."""
    start = time.perf_counter()
    yield
    print(f"{name + ' ':.<40} {time.perf_counter() - start:6.1f} s", flush=True)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first, *more = str(error).splitlines() or [type(error).__name__]
    return f"{first} (and {len(more)} more)" if more else first
