import pytest
import torch

from illada.data.shards import Shards
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.preparation.shard_writer import ShardWriter, write_index
from illada.preparation.train_tokenizer import train_tokenizer
from illada.text.tokenizer import tokenizer_sha256
from illada.weights.save import write_model


def build(tie: bool, seed: int, **changes: object) -> IlladaForMaskedLM:
    """A random fp32 model whose weights are large enough for its choices to be clear-cut."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "rope_theta": 10_000.0,
        "initializer_range": 0.3,
        "tie_word_embeddings": tie,
    }
    model = IlladaForMaskedLM(IlladaConfig(**{**shape, **changes})).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
    return model


@pytest.fixture(scope="session")
def build_model():
    return build


@pytest.fixture(scope="session")
def tied():
    return build(tie=True, seed=1)


@pytest.fixture(scope="session")
def untied():
    return build(tie=False, seed=2, mask_token_id=63, num_key_value_heads=4)


def write_data(folder, documents, tokenizer=None, vocab_size=64, kind="text", per_shard=1000):
    """A prepared data set of `documents`, lists of ids or (ids, prompt tokens)."""
    writer = ShardWriter(folder, vocab_size if tokenizer is None else len(tokenizer), tokens_per_shard=per_shard)
    for document in documents:
        ids, prompt = document if isinstance(document, tuple) else (document, 0)
        writer.append(ids, prompt, source_bytes=2 * len(ids))
    sha256 = ""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
        vocab_size, sha256 = len(tokenizer), tokenizer_sha256(tokenizer)
    write_index(folder, writer.finish(), vocab_size=vocab_size, tokenizer_sha256=sha256, kind=kind)
    return Shards.open(folder)


@pytest.fixture(scope="session")
def make_data():
    return write_data


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return train_tokenizer(["one two three four five six seven"] * 3, 280)


@pytest.fixture(scope="session")
def write_tiny_model(tiny_tokenizer):
    """A function that writes a tied model with the tiny tokenizer into a new folder, and returns the folder."""

    def write(folder):
        network = build(tie=True, seed=1, vocab_size=len(tiny_tokenizer))
        tensors = {name: t for name, t in network.state_dict().items() if name != "lm_head.weight"}
        write_model(folder, folder, network.config, tensors, network.dtype, "", tokenizer=tiny_tokenizer)
        return folder

    return write


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, build_model, tiny_tokenizer):
    """A random model with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    model = build_model(tie=True, seed=3, vocab_size=len(tiny_tokenizer), max_position_embeddings=256, mask_token_id=5)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
