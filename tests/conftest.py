import pytest
import torch

from illada.model import IlladaConfig, IlladaForMaskedLM


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
