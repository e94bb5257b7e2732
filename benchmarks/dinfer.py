"""dInfer's decoders on our weights, for `illada bench generate`:

    --outside "benchmarks/dinfer.py,dinfer=CHECKOUT/python/dinfer,cache=dual,threshold=0.9"

They are taken from the package's `decoding` alone, which needs torch and transformers: `import dinfer` itself asks for
vLLM. Theirs are the loops over blocks, the cache policy, the rule and the early end; ours is the network they call.
"""

import importlib.util
import sys
from functools import cache as cached
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class Network:
    """What their decoders call: keys and values come as one flat list and go as one of their KVCache."""

    def __init__(self, model: Any):
        self.model = model
        self.device = model.device

    def __call__(
        self,
        ids: Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
        replace_position: tuple[int, int] | None = None,
    ) -> Any:
        """Compute logits of ids, or of those that replace a stretch of a cache, which itself stays as it is."""
        if past_key_values is None:
            out = self.model(ids, use_cache=use_cache)
            if use_cache:
                out.past_key_values = [tensor for pair in out.past_key_values for tensor in pair]
            return out
        past = past_key_values
        pairs = [(past.get_keys(n).clone(), past.get_values(n).clone()) for n in range(past.num_layers)]
        assert replace_position is not None
        places = torch.zeros(1, past.seq_len, dtype=torch.bool)
        places[:, slice(*replace_position)] = True
        return self.model(ids, past_key_values=pairs, replace_position=places)


class Blocks:
    """Makes their blocks and keeps the tokens: what their generate returns has lost the place of the end."""

    def __init__(self, theirs: Any):
        self.theirs = theirs
        self.tokens: Any = None

    def create(self, tokens: Any, block_length: int) -> Any:
        """Return their iterator."""
        self.tokens = tokens
        return self.theirs.create(tokens, block_length)


@cached
def decoding(folder: str) -> ModuleType:
    """Import `decoding` from the folder of dInfer's package, without that package."""
    place = Path(folder) / "decoding"
    spec = importlib.util.spec_from_file_location(
        "dinfer_decoding", place / "__init__.py", submodule_search_locations=[str(place)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generate(
    model: Any,
    prompt: Tensor,
    gen_length: int,
    block_length: int,
    mask_id: int,
    dinfer: str,
    cache: str | None = None,
    threshold: float = 0.9,
    look: int | None = None,
) -> Tensor:
    """Answer one prompt [1, P]; returns ids [1, P + G].

    Args:
        model: an `OutsideModel`.
        prompt: ids.
        gen_length: G.
        block_length: of their blocks.
        mask_id: of the mask.
        dinfer: folder of their package in a checkout.
        cache: None, "prefix" or "dual", as they call them.
        threshold: of their parallel decoder.
        look: None for their decoder by blocks; else that with a window, so many tokens wider on both sides.
    """
    theirs = decoding(dinfer)
    eos = model.config.eos_token_id
    rule = theirs.ThresholdParallelDecoder(
        0, threshold, mask_id=mask_id, eos_id=eos[0] if isinstance(eos, list) else eos
    )
    blocks = Blocks(theirs.BlockIteratorFactory())
    options: dict[str, Any] = {"cache_factory": None if cache is None else theirs.KVCacheFactory(cache)}
    if look is None:
        decoder = theirs.BlockWiseDiffusionLLM(Network(model), rule, blocks, **options)
    else:
        options |= {"prefix_look": look, "after_look": look}
        decoder = theirs.VicinityCacheDiffusionLLM(Network(model), rule, blocks, **options)
    decoder.generate(prompt, gen_length, block_length)
    ids: Tensor = blocks.tokens.data
    return ids
