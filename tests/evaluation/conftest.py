import contextlib
from pathlib import Path

import pytest

try:
    import datasets
    import lm_eval  # noqa: F401
except ImportError:  # the extra "eval" is not installed
    collect_ignore_glob = ["test_*.py"]

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, build_model, tiny_tokenizer):
    """A random model with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    model = build_model(tie=True, seed=3, vocab_size=len(tiny_tokenizer), max_position_embeddings=256, mask_token_id=5)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory):
    """Local data only, cached where it is thrown away."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    patch.undo()


@pytest.fixture
def in_tasks():
    """The folder of the task files, where their data are."""
    with contextlib.chdir(TASKS):
        yield TASKS
