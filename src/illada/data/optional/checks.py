"""Checks prepared data against the checksums that `illada prepare` keeps beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from illada.errors import DamagedError
from illada.folders import damage

READ_AT_ONCE = 16 << 30
"""Bytes of tokens in a data set up to which all are read for a check when a run begins: some seconds (ours)."""


def check_data(places: Sequence[str | Mapping[str, float] | None], share: tuple[int, int]) -> list[str]:
    """Check the files of data sets on this machine; return a remark about each whose tokens are too many to read now.

    Args:
        places: data sets and mixtures of them, as `Shards.open` takes them; None for none.
        share: which share of the files to check, and how many shares there are.

    Raises:
        DamagedError: when a file is not as it was written.
    """
    remarks = []
    names = [name for place in places if place for name in ([place] if isinstance(place, str) else place)]
    for name in names:
        if "://" in name:
            continue
        size = sum(path.stat().st_size for path in Path(name).glob("*.tokens"))
        large = size > READ_AT_ONCE
        if faults := damage(Path(name), lambda file, large=large: not (large and file.endswith(".tokens")), share):  # type: ignore[misc]
            raise DamagedError(f"{faults[0]}: copy the whole folder again, or prepare the data again")
        if large:
            remarks.append(f"{size / 1e9:,.0f} GB of tokens are not read for a check now: `illada verify {name}` does")
    return remarks
