"""Conversations as token ids: prompt, answer, and exactly one end-of-sequence token (paper §2.2; spec §4).

`CHAT_TEMPLATE` is ours; the functions take any tokenizer with a template. Text in a message that looks like a special
token is encoded as text, so that nobody can forge the end of a turn. transformers does so with two private marker
characters, which it drops from messages.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from illada.errors import IlladaError
from illada.text.prompts import encode_plain

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int] | Mapping[str, Any]
"""A text, a chat, token ids, or what a tokenizer returns (a BatchEncoding of one row)."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def check_messages(messages: Any, last: str, record: str = "conversation") -> list[dict[str, str]]:
    """Return the messages as plain dictionaries: [system,] user, assistant, user, … ending with the role `last`.

    Raises:
        IlladaError: when they have another form; the message names `record`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise IlladaError(f"{record}: messages must be a non-empty list")
    plain: list[dict[str, str]] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise IlladaError(f"{record}: message {number} is not an object with role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise IlladaError(f"{record}: message {number} needs a role and a content, both text")
        has_system = bool(plain) and plain[0]["role"] == "system"
        expected = ("user", "assistant")[(number - has_system) % 2]
        if role != expected and not (number == 0 and role == "system"):
            raise IlladaError(f"{record}: message {number} is from {role!r}, expected {expected!r}")
        plain.append({"role": role, "content": content})
    if plain[-1]["role"] != last:
        raise IlladaError(f"{record}: the last message is from {plain[-1]['role']!r}, it must be from {last!r}")
    return plain


def split_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Return one conversation for each assistant turn, which ends it: the older LLaDA rule (spec §4)."""
    return [list(messages[: i + 1]) for i, message in enumerate(messages) if message["role"] == "assistant"]


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], record: str = "conversation"
) -> list[int]:
    """Return the ids after which the assistant's answer is generated; the last message is the user's.

    Raises:
        IlladaError: when the messages do not alternate or the tokenizer's template refuses them.
    """
    return render(tokenizer, check_messages(messages, "user", record), record, generation=True)


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], record: str = "conversation"
) -> tuple[list[int], int]:
    """Return (ids, prompt tokens) of a conversation to learn from; its last message is the assistant's.

    The ids end with exactly one EOS. The prompt is everything before the last answer; its ids are those that
    `encode_prompt` gives.

    Raises:
        IlladaError: when the messages do not alternate, the tokenizer has no EOS, its template refuses them, or renders
            the prompt differently once the answer follows.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise IlladaError("the tokenizer has no eos_token: answers could not end")
    plain = check_messages(messages, "assistant", record)
    prompt = render(tokenizer, plain[:-1], record, generation=True)
    ids = render(tokenizer, plain, record, generation=False)
    if ids[: len(prompt)] != prompt:
        raise IlladaError(f"{record}: the chat template renders the prompt differently once an answer follows it")
    answer = ids[len(prompt) :]
    opening = _next_turn_opening(tokenizer, str(tokenizer.chat_template))
    if opening and answer[-len(opening) :] == opening:
        answer = answer[: -len(opening)]
    if eos in answer:
        # Templates like to write a newline after the EOS: white space there goes, anything else stays.
        end = len(answer) - answer[::-1].index(eos)
        if not tokenizer.decode(answer[end:]).strip():
            answer = answer[:end]
    while answer and answer[-1] == eos:
        answer.pop()
    return [*prompt, *answer, eos], len(prompt)


def render(
    tokenizer: Any, messages: list[dict[str, Any]], record: str, generation: bool, tools: Any = None
) -> list[int]:
    """Return the ids that the tokenizer's chat template gives messages; errors as in `encode_prompt`."""
    if not tokenizer.chat_template:
        raise IlladaError("the tokenizer has no chat template: use one made by `illada tokenizer` or of a chat model")
    first_error: Exception | None = None
    merged = without_system(messages)
    for attempt in (messages,) if merged is messages else (messages, merged):
        try:
            ids: list[int] = tokenizer.apply_chat_template(
                attempt,
                tools=tools,
                add_generation_prompt=generation,
                sanitize_control_tokens=True,
                return_dict=False,
                tokenizer_kwargs={"verbose": False},
            )
            return ids
        except Exception as error:  # a template is a program of theirs
            first_error = first_error or error
    raise IlladaError(f"{record}: the chat template refuses it: {' '.join(str(first_error).split())}")


@lru_cache(maxsize=4)
def _next_turn_opening(tokenizer: PreTrainedTokenizerFast, _template: str) -> list[int]:
    """Return what the template writes after the token that ends an answer, to open the next turn: mostly nothing.

    LLaDA's templates open the assistant's turn with or without `add_generation_prompt`.
    """
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    prompt = render(tokenizer, [question], "template", generation=True)
    if prompt != render(tokenizer, [question], "template", generation=False):
        return []
    rest = render(tokenizer, [question, answer], "template", generation=False)[len(prompt) :]
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = next((place for place, token_id in enumerate(rest) if token_id in special), len(rest))
    return rest[end + 1 :]


def without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put what system messages say before the first user message, for templates that reject that role.

    As in the authors' evaluation code, the text of each is stripped and followed by a blank line, and where the
    conversation does not begin with the user, it becomes a user message of its own. Empty texts are dropped (ours).
    """
    rest = [message for message in messages if message["role"] != "system"]
    if len(rest) == len(messages):
        return messages
    texts = [message["content"].strip() for message in messages if message["role"] == "system"]
    if rest and rest[0]["role"] == "user":
        texts.append(rest.pop(0)["content"])
    return [{"role": "user", "content": "\n\n".join(text for text in texts if text)}, *rest]


def encode_any(prompt: Prompt, tokenizer: Any | None, name: str) -> Sequence[int]:
    """Return the ids of a text, a chat or an encoding, and anything else as it is: the model checks that it is ids."""
    if is_encoding(prompt):
        rows = encoded_ids(prompt)
        if len(rows) != 1:
            raise IlladaError(f"{name} is an encoding of {len(rows)} rows: give it alone, or a list of single ones")
        return rows[0]
    is_chat = isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping)
    if not is_chat and not isinstance(prompt, str):
        return prompt  # type: ignore[return-value]
    if tokenizer is None:
        raise IlladaError(
            f"{name} is a {'chat' if is_chat else 'text'}: give a tokenizer, or one list of integers per prompt"
        )
    return encode_prompt(tokenizer, prompt, name) if is_chat else encode_plain(tokenizer, prompt)  # type: ignore


def is_encoding(prompt: Any) -> bool:
    """Say whether this is what a tokenizer returns."""
    return isinstance(prompt, Mapping) and "input_ids" in prompt


def encoded_ids(encoding: Any) -> list[list[int]]:
    """Return the ids of each row of an encoding, of lists or tensors, without its padding."""
    found = (encoding["input_ids"], encoding.get("attention_mask"))
    ids, masks = (values.tolist() if hasattr(values, "tolist") else values for values in found)
    if not ids or not isinstance(ids[0], Sequence):
        ids, masks = [ids], [masks]
    masks = masks or [None] * len(ids)
    return [
        row if mask is None else [token for token, seen in zip(row, mask, strict=True) if seen]
        for row, mask in zip(ids, masks, strict=True)
    ]
