"""From texts to pairs of ids, and from queries about them to packed forward passes.

Shape letters: T packed tokens · L candidate tokens · M masked tokens of one query or of all · A different positions
whose hidden states are wanted · C of them in one chunk · K of M that ask about these · D width · V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada.errors import IlladaError
from illada.model.attention import Packing
from illada.model.transformer import IlladaForMaskedLM, evaluating

Pair = tuple[Sequence[int], Sequence[int]]
"""Context ids and candidate ids."""

LOGITS_HELD = 2**24
"""Most logits held at once; the head runs over this many divided by V tokens at a time."""

ON_CPU = 4096
"""Most positions of one forward pass on a CPU, whatever is allowed: more leave its caches (docs/log.md)."""


def score_layout(
    tokenizer: Any, context: str, candidates: Sequence[str], begins: bool = True
) -> tuple[list[tuple[list[int], list[int]]], tuple[int, ...]]:
    """Lay out a question as the authors' evaluation code does (spec §6); return (pairs, right_context).

    BOS, where the tokenizer has one, goes before the context if that `begins` so, and one visible EOS after the
    candidate. White space that ends the context moves to the candidate. The candidate is what follows the context's
    number of ids in the ids of both together; where nothing follows, because joining made fewer tokens, it is encoded
    alone (ours).
    """
    body = context.rstrip()
    space = context[len(body) :]
    begin = [tokenizer.bos_token_id] if begins and tokenizer.bos_token_id is not None else []
    context_ids = list(tokenizer.encode(body, add_special_tokens=False))
    pairs = []
    for candidate in candidates:
        joint = list(tokenizer.encode(body + space + candidate, add_special_tokens=False))
        alone = () if len(joint) > len(context_ids) else tokenizer.encode(space + candidate, add_special_tokens=False)
        pairs.append((begin + context_ids, [*joint[len(context_ids) :], *alone]))
    return pairs, () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


@dataclass(frozen=True)
class Candidate:
    """A candidate between its two contexts, on the host."""

    ids: NDArray[np.int64]
    """Context, candidate and right context."""
    start: int
    """Where the candidate begins."""
    length: int
    """Its number L of tokens."""

    def query(self, masked_L: NDArray[np.bool_], mask_id: int) -> "Query":
        """Ask for the true tokens at the masked positions."""
        at_M = self.start + np.flatnonzero(masked_L)
        seen = self.ids.copy()
        seen[at_M] = mask_id
        return Query(seen, at_M, self.ids[at_M])

    def causal_query(self) -> "Query":
        """Ask a causal model for all tokens, each at the position before it."""
        at_M = np.arange(self.start, self.start + self.length)
        return Query(self.ids[: at_M[-1]], at_M - 1, self.ids[at_M])


@dataclass(frozen=True)
class Query:
    """One sequence as the model sees it, and the tokens whose probabilities are wanted."""

    seen: NDArray[np.int64]
    at_M: NDArray[np.int64]
    """Positions whose logits give the probabilities."""
    target_M: NDArray[np.int64]
    """The tokens."""


class Answer(NamedTuple):
    """What the model says to a query."""

    log_p_M: NDArray[np.float64]
    """Log-probabilities of its tokens in nats."""
    score_M: NDArray[np.float32]
    """What a rule looks at, at each position; empty where nothing was asked for."""


Statistic = Callable[[Tensor, Tensor], Tensor]
"""From logits [C, V], that of MASK at -inf, and the log of their sum of exponentials with MASK [C], to scores [C]."""


def check_pairs(model: IlladaForMaskedLM, pairs: Sequence[Pair], right_context: Sequence[int]) -> list[Candidate]:
    """Check each pair and join it with the right context.

    Raises:
        IlladaError: when a candidate is empty or holds the mask token, a pair is longer than the model's context, or
            an id is outside the vocabulary; when a pair's context is empty and the model causal.
    """
    config = model.config
    context, vocabulary = config.max_position_embeddings, config.vocab_size
    candidates = []
    for i, (left, candidate) in enumerate(pairs):
        if not len(candidate):
            raise IlladaError(f"candidate {i} has no tokens: there is nothing to score")
        if config.causal and not len(left):
            raise IlladaError(f"pair {i} has no context: a causal model needs a token before the candidate, e.g. BOS")
        ids = np.array([*left, *candidate, *right_context], dtype=np.int64)
        if len(ids) > context:
            raise IlladaError(
                f"pair {i} is too long: context {len(left)} + candidate {len(candidate)} + right context "
                f"{len(right_context)} = {len(ids)} tokens, but the model's context is {context}"
            )
        if not 0 <= ids.min() <= ids.max() < vocabulary:
            raise IlladaError(f"pair {i} holds ids outside the vocabulary of {vocabulary}: check the tokenizer")
        if config.mask_token_id in candidate:
            raise IlladaError(f"candidate {i} holds the mask token {config.mask_token_id}, which is no part of a text")
        candidates.append(Candidate(ids, len(left), len(candidate)))
    return candidates


def target_log_probs(
    model: IlladaForMaskedLM, queries: Iterable[Query], max_batch_tokens: int
) -> Iterator[NDArray[np.float64]]:
    """Yield log-probabilities [M] of the targets in nats for each query in order, as `answers` does."""
    return (answer.log_p_M for answer in answers(model, queries, max_batch_tokens))


def answers(
    model: IlladaForMaskedLM, queries: Iterable[Query], max_batch_tokens: int, statistic: Statistic | None = None
) -> Iterator[Answer]:
    """Yield log-probabilities [M] of the targets in nats, and scores [M] if wanted, for each query in order.

    The softmax, in fp32, goes over all ids but MASK, which is no token of a text: so the probabilities of what a text
    can hold sum to 1 (ours; the authors' code keeps MASK in the sum, see spec §6).

    Queries are taken as they come, at most `max_batch_tokens` positions (on a CPU 4096) in one forward pass; a single
    query may exceed it. Queries of one pass with the same sequence share it, as candidates of equal length do in their
    first step. Neighbours should be of similar length.
    """
    if max_batch_tokens < 1:
        raise IlladaError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")
    most = min(max_batch_tokens, ON_CPU) if model.device.type == "cpu" else max_batch_tokens
    group: list[Query] = []
    sequences: set[bytes] = set()
    positions = 0
    for query in queries:
        key = query.seen.tobytes()
        if group and key not in sequences and positions + len(query.seen) > most:
            yield from _run(model, group, statistic)
            group, sequences, positions = [], set(), 0
        if key not in sequences:
            sequences.add(key)
            positions += len(query.seen)
        group.append(query)
    if group:
        yield from _run(model, group, statistic)


@torch.inference_mode()
def _run(model: IlladaForMaskedLM, group: Sequence[Query], statistic: Statistic | None) -> list[Answer]:
    """Run one forward pass over the distinct sequences of a group, and the head once at each position asked about."""
    keys = [query.seen.tobytes() for query in group]
    with evaluating(model):
        wanted: dict[bytes, NDArray[np.int64]] = {}
        for query, key in zip(group, keys, strict=True):
            wanted[key] = np.union1d(wanted[key], query.at_M) if key in wanted else query.at_M
        sequences = [np.frombuffer(key, dtype=np.int64) for key in wanted]
        ids_T = torch.from_numpy(np.concatenate(sequences)).to(model.device)
        packing = Packing(tuple(map(len, sequences)))
        hidden_AD = model.model.packed(ids_T, packing, wanted=list(wanted.values()))
        starts = dict(zip(wanted, np.cumsum([0, *map(len, wanted.values())]).tolist(), strict=False))
        at_M = np.concatenate(
            [starts[key] + np.searchsorted(wanted[key], q.at_M) for q, key in zip(group, keys, strict=True)]
        )
        log_p_M, score_A = _head(model, hidden_AD, at_M, np.concatenate([q.target_M for q in group]), statistic)
    ends = np.cumsum([len(q.at_M) for q in group])[:-1]
    scores = np.split(score_A[at_M], ends) if statistic is not None else [score_A] * len(group)
    return [Answer(*parts) for parts in zip(np.split(log_p_M, ends), scores, strict=True)]


def _head(
    model: IlladaForMaskedLM,
    hidden_AD: Tensor,
    at_M: NDArray[np.int64],
    target_M: NDArray[np.int64],
    statistic: Statistic | None,
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return log-probabilities [M] of the targets, each at one of the hidden states, and the scores [A], if wanted."""
    log_p_M, scores = np.empty(len(at_M)), []
    size = max(1, LOGITS_HELD // model.config.vocab_size)
    for first in range(0, len(hidden_AD), size):
        logits_CV = model.lm_head(hidden_AD[first : first + size]).float()
        log_sum_C = logits_CV.logsumexp(-1) if statistic is not None else None
        if model.config.mask_token_id is not None:
            logits_CV[:, model.config.mask_token_id] = -torch.inf
        if statistic is not None and log_sum_C is not None:
            scores.append(statistic(logits_CV, log_sum_C))
        own_K = np.flatnonzero((first <= at_M) & (at_M < first + size))
        places = torch.from_numpy(np.stack((at_M[own_K] - first, target_M[own_K]))).to(logits_CV.device)
        log_p_M[own_K] = logits_CV.log_softmax(-1)[places[0], places[1]].cpu().numpy()
    return log_p_M, torch.cat(scores).float().cpu().numpy() if scores else np.empty(0, dtype=np.float32)
