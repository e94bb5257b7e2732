"""The Hugging Face hub and its libraries: only this module may use the network, and only for a name a user gave."""

import logging
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from illada.errors import IlladaError, first_line
from illada.folders import SUMS

TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors", SUMS)

_banned_by_us = threading.Event()


def is_hub_name(name: str) -> bool:
    """Say whether a text looks like owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]*[\w-]", name) is not None


def hub_folder(name: str, files: Sequence[str]) -> Path:
    """Return the folder of the local cache that holds files of a hub repository; download what is missing.

    Without a network, take what an earlier download left in the cache.

    Args:
        name: owner/name, for instance GSAI-ML/iLLaDA-8B-Instruct.
        files: patterns of the files to fetch; never code.

    Raises:
        IlladaError: when the repository does not exist, is gated, or cannot be reached or stored.
    """
    unreachable = (
        f"no folder {name}, and the hub cannot be reached: check the network and HF_HUB_OFFLINE, or fetch it elsewhere "
        f"with `hf download {name} --local-dir FOLDER` and give that folder"
    )
    try:
        with network():
            return Path(snapshot_download(name, allow_patterns=list(files)))
    except errors.GatedRepoError as error:
        raise IlladaError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name} and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise IlladaError(
            f"neither a folder nor a hub repository {name}: check the name; for a private one, `hf auth login` first"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise IlladaError(unreachable) from error
    except errors.HfHubHTTPError as error:
        raise IlladaError(f"the hub refused {name}: {first_line(error)}") from error
    except OSError as error:
        raise IlladaError(
            f"{name} could not be stored ({error.strerror or first_line(error)}): free some disk or set HF_HOME to a "
            "larger one; what has arrived is kept"
        ) from error
    except Exception as error:  # a broken connection: the transfer libraries have errors of their own
        try:
            return Path(snapshot_download(name, allow_patterns=list(files), local_files_only=True))
        except Exception:
            raise IlladaError(f"{unreachable} ({first_line(error)})") from error


@contextmanager
def importing_quietly() -> Iterator[None]:
    """Silence torchao, which transformers imports wherever it is installed, about kernels for machines unlike this."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torchao", "torch.utils._pytree"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def quiet_libraries() -> None:
    """Let transformers say only what is an error, and draw no progress bars."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def ban_network() -> None:
    """Keep other libraries from the network, except while `network` lifts the ban."""
    if not constants.HF_HUB_OFFLINE:
        constants.HF_HUB_OFFLINE = True
        _banned_by_us.set()


@contextmanager
def network() -> Iterator[None]:
    """Lift our own ban on the network for a while; a ban that the user set (HF_HUB_OFFLINE) stays."""
    banned, quiet = constants.HF_HUB_OFFLINE, are_progress_bars_disabled()
    constants.HF_HUB_OFFLINE = banned and not _banned_by_us.is_set()
    if sys.stderr.isatty():  # 16 GB take a while
        enable_progress_bars()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = banned
        if quiet:
            disable_progress_bars()
