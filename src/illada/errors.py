"""The one exception that means "the user can fix this": the command line prints it as one line and exits with 2."""


class IlladaError(ValueError):
    """Bad input. The message says what is wrong and what to do about it."""
