"""Samplers of others, run from their unchanged files (`--outside`), with our network behind the calls they make.

Shape letters: P prompt tokens · G answer budget · L tokens put in · K tokens with keys · H key/value heads ·
D head width · V vocabulary.
"""

import ast
import inspect
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from illada.bench.samplers import Answer, Sampler, cut
from illada.errors import IlladaError, first_line
from illada.generation.settings import GenerationSettings
from illada.model.transformer import Block, IlladaForMaskedLM, rotary_angles

SPEC = re.compile(r"(?P<file>.+?\.py)(:(?P<function>\w+))?(?P<options>(,\w+=[^,]*)*)")

CALLS_PER_TOKEN = 8
"""Most forwards for each token of the budget; a sampler that makes more, as one that commits MASK, would never end."""

Pairs = Sequence[tuple[Tensor, Tensor]]


class OutsideModel:
    """Our network, called as LLaDA's and Fast-dLLM's samplers call theirs; other attributes are the model's own.

    A key's position is its place among the keys. Fast-dLLM's model code rotates keys at each use, this class once, when
    they are made; both give the same as long as nobody moves a key.
    """

    def __init__(self, model: IlladaForMaskedLM, most_calls: int):
        self.model = model
        self.most_calls = most_calls
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(
        self,
        input_ids: Tensor,
        past_key_values: Pairs | None = None,
        use_cache: bool = False,
        replace_position: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """Return an object with `logits` [1, L, V], and with `past_key_values` if the call uses or asks for them.

        Args:
            input_ids: [1, L]; without a cache any number of rows.
            past_key_values: keys and values of every layer, [1, H, K, D] each; the tokens stand after these K.
            use_cache: return the keys and values of these tokens and of the tokens before them.
            replace_position: [1, K], true in the one stretch where the tokens stand instead; they renew its keys and
                values.
            more: as in `IlladaForMaskedLM.forward`, only without a cache.

        Raises:
            IlladaError: when there are too many calls for one answer, or a call is of another kind.
        """
        self.calls += 1
        if self.calls > self.most_calls:
            raise IlladaError(
                f"it was ended after {self.most_calls} forwards for one answer: it seems to repeat itself"
            )
        if past_key_values is None and replace_position is not None:
            raise IlladaError("replace_position needs past_key_values: there is nothing to replace")
        if past_key_values is None and not use_cache:
            return self.model(input_ids, **more)
        if odd := [name for name, value in more.items() if value is not None]:
            raise IlladaError(f"a call with a cache cannot have {odd[0]}")
        if len(input_ids) != 1:
            raise IlladaError(f"a call with a cache takes one row, got {len(input_ids)}")
        replaced = None if replace_position is None else _stretch(replace_position, input_ids.shape[1])
        hidden_LD, pairs = self._continue(input_ids[0], past_key_values, replaced)
        kept: Any = pairs if use_cache else None
        return CausalLMOutputWithPast(logits=self.model.lm_head(hidden_LD)[None], past_key_values=kept)

    def _continue(
        self, ids_L: Tensor, past: Pairs | None, replaced: slice | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return final states [L, D], and the keys and values that the tokens saw.

        This goes layer by layer because our own caches know no keys after the tokens. New keys and values go after the
        past ones or, as in Fast-dLLM, replace some of them in the caller's own tensors.
        """
        config, trunk = self.model.config, self.model.model
        start = replaced.start if replaced else past[0][0].shape[2] if past else 0
        positions_L = torch.arange(start, start + len(ids_L), device=ids_L.device)
        rotary = rotary_angles(positions_L, config.head_dim, config.rope_theta)
        hidden_LD, pairs = trunk.embed_tokens(ids_L), []
        for layer, block in enumerate(trunk.layers):
            assert isinstance(block, Block)
            heads = block.pre_attention(hidden_LD, rotary, None)
            query, key, value = (x_LHD.transpose(0, 1)[None] for x_LHD in heads)
            if past is not None:
                old_key, old_value = past[layer]
                if replaced is None:
                    key, value = torch.cat((old_key, key), 2), torch.cat((old_value, value), 2)
                else:
                    old_key[:, :, replaced], old_value[:, :, replaced] = key, value
                    key, value = old_key, old_value
            pairs.append((key, value))
            attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])
            hidden_LD = block.post_attention(hidden_LD, attended[0].transpose(0, 1).flatten(1))
        return trunk.norm(hidden_LD), pairs


def _stretch(replace_position: Tensor, length: int) -> slice:
    places = replace_position[0].nonzero()[:, 0].tolist()
    if not places or places != list(range(places[0], places[0] + length)):
        raise IlladaError(f"replace_position must mark one stretch of {length} places, as many as there are tokens")
    return slice(places[0], places[-1] + 1)


def outside_samplers(specs: Sequence[str], model: IlladaForMaskedLM, exact: GenerationSettings) -> list[Sampler]:
    """Run the user's Python files and return the samplers they define; a sampler answers one request at a time.

    A spec is `FILE.py` or `FILE.py:FUNCTION` (default `generate`), followed by any number of `,OPTION=VALUE`, where a
    VALUE is a Python literal or a string. The function is called as LLaDA's and Fast-dLLM's are, with
    `(model, prompt [1, P], steps=, gen_length=, block_length=, ...)` as far as it accepts them, and with the options.
    It returns ids [1, P + G], alone or first in a tuple. Its model is an `OutsideModel`.

    Raises:
        IlladaError: when a spec has another form, when there is no such file, function or option, or when one fails.
    """
    files: dict[Path, dict[str, Any]] = {}
    samplers = []
    for spec in specs:
        parts = SPEC.fullmatch(spec)
        if parts is None:
            raise IlladaError(f"{spec!r} does not say what to run: write FILE.py, FILE.py:FUNCTION or ...,OPTION=VALUE")
        file = Path(parts["file"])
        if not file.is_file():
            raise IlladaError(f"no Python file {file}: --outside takes one that defines generate(model, prompt, ...)")
        if file not in files:
            files[file] = _load(file)
        name = parts["function"] or "generate"
        function = files[file].get(name)
        if not callable(function):
            raise IlladaError(f"{file} defines no function {name}(model, prompt, ...)")
        options = dict(pair.split("=", 1) for pair in parts["options"].split(",")[1:])
        title = "outside " + re.sub(r"(^|=)[^,=]*/", r"\1", spec)  # paths without their folders
        samplers.append(_outside_sampler(title, function, options, model, exact))
    return samplers


def _load(file: Path) -> dict[str, Any]:
    """Run a file and return its names; its imports look beside it first, and modules from there are then forgotten."""
    folder, known = str(file.parent.resolve()), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        return runpy.run_path(str(file), run_name=f"outside_{file.stem}")
    except Exception as error:
        raise IlladaError(f"{file} cannot be run: {first_line(error)}") from error
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - known:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                del sys.modules[name]


def _outside_sampler(
    title: str,
    function: Callable[..., Any],
    options: dict[str, str],
    model: IlladaForMaskedLM,
    exact: GenerationSettings,
) -> Sampler:
    wanted: dict[str, Any] = {
        "steps": exact.max_new_tokens,
        "gen_length": exact.max_new_tokens,
        "block_length": exact.block_length,
        "temperature": 0.0,
        "cfg_scale": 0.0,
        "remasking": "low_confidence",
        "mask_id": model.config.mask_token_id,
    }
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        wanted = {name: value for name, value in wanted.items() if name in parameters}
        if odd := [name for name in options if name not in parameters]:
            raise IlladaError(f"{title}: {odd[0]} is none of its options: {', '.join(list(parameters)[2:])}")
    wanted |= {name: _value(text) for name, text in options.items()}

    @torch.inference_mode()
    def answer_one(prompt: Sequence[int]) -> Answer:
        theirs = OutsideModel(model, CALLS_PER_TOKEN * exact.max_new_tokens)
        try:
            out = function(theirs, torch.tensor([prompt], dtype=torch.long, device=model.device), **wanted)
            ids: list[int] = (out[0] if isinstance(out, tuple) else out)[0, len(prompt) :].tolist()
        except Exception as error:
            raise IlladaError(f"{title} failed: {first_line(error)}") from error
        return Answer(cut(ids, exact.eos_ids), theirs.calls)

    threshold = wanted.get("threshold")
    rule = isinstance(threshold, int | float) and 0 < threshold <= 1
    return Sampler(title, lambda prompts: [answer_one(prompt) for prompt in prompts], threshold if rule else None)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
