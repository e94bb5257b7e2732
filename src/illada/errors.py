"""Errors that a user can do something about; the command line prints each as one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class IlladaError(ValueError):
    """Bad input. The message says what is wrong and what to do about it. Exit code 2."""


class DamagedError(IlladaError):
    """A file is not as it was written. The message names it. Exit code 2."""


class MissingExtraError(IlladaError):
    """An optional package is not installed. The message names the extra that brings it."""


class DivergedError(RuntimeError):
    """Loss or gradient stopped being finite; the message names the last good checkpoint. Exit code 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, or the name of its error when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def needs(extra: str, purpose: str) -> Iterator[None]:
    """Turn the import of a package that is not installed into one line that names the extra to install.

        with needs("report", "a picture"):
            from matplotlib.figure import Figure

    Raises:
        MissingExtraError: "a picture needs matplotlib: pip install 'illada[report]'".
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise MissingExtraError(f"{purpose} needs {package}: pip install 'illada[{extra}]'") from error
