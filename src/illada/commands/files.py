"""Reading the small text files that commands take."""

from collections.abc import Iterator
from pathlib import Path

from illada.errors import IlladaError


def read_lines(file: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of a UTF-8 text file, empty lines left out.

    Raises:
        IlladaError: when it is missing, is no text or holds nothing.
    """
    path = Path(file)
    if not path.is_file():
        raise IlladaError(f"no file {file}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise IlladaError(f"{file} is not UTF-8 text: {error}") from error
    if not any(line.strip() for line in lines):
        raise IlladaError(f"{file} is empty")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line
