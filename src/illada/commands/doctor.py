"""`illada doctor`."""

from illada.commands import heavy


def doctor() -> None:
    """Say what is installed here, what will be used, and why: versions, devices, kernels, extras."""
    print(heavy.checkup.report())
