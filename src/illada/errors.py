"""The one exception that means "the user can fix this": the command line prints it as one line and exits with 2."""


class IlladaError(ValueError):
    """Bad input. The message says what is wrong and what to do about it."""


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, or the name of its error when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
