"""Errors that a user's input causes; commands print the message as one line and exit with code 2."""

from collections.abc import Sequence


class FantasyError(ValueError):
    """Base class. The message says what is wrong, where, and what to do."""


class ConfigError(FantasyError):
    """A setting that is unknown, of the wrong type or out of range; the message begins with its name."""


class MediaError(FantasyError):
    """A file that cannot be read as an image, audio or video, or an output that cannot be written.

    The message begins with its path.
    """


class WeightsError(FantasyError):
    """Weights that are missing, damaged or of another model; the message begins with their path."""


class ConversionError(WeightsError):
    """Tensors of a file that do not map onto the parameters of a network.

    Attributes:
        problems: All of them, one line each.
    """

    def __init__(self, problems: Sequence[object]):
        super().__init__("\n".join(map(str, problems)))
        self.problems = list(problems)


class Stopped(Exception):
    """Work that stopped on a signal after saving; the message says how to resume."""

    def __init__(self, message: str, signal: int):
        """Sets the exit code to 128 plus the signal's number, as shells do."""
        super().__init__(message)
        self.code = 128 + signal
