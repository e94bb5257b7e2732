"""The model "illada" of lm-evaluation-harness (spec §6, §7).

Shape letters: L candidate tokens.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, cast, get_args

import torch
from jinja2.exceptions import TemplateError
from torch import distributed

from illada.errors import IlladaError, first_line, needs
from illada.evaluation.journal import Entry, Journal, fingerprint
from illada.evaluation.kinds import KINDS, read_value
from illada.evaluation.options import Bos, Scoring, SpecialTokens
from illada.generation.engine import MAX_BATCH_TOKENS, Engine, generate
from illada.generation.settings import OF_DIFFUSION, GenerationSettings, settings_for
from illada.reporting import PLAIN_EVERY, duration
from illada.scoring.confidence import confidence_scores
from illada.scoring.layout import Pair, score_layout
from illada.scoring.likelihood import likelihood_scores
from illada.scoring.path import refuse_rule, walk
from illada.text.chat import without_system
from illada.text.prompts import encode_plain
from illada.weights.load import load_model
from illada.weights.options import Dtype, Quantization
from illada.weights.quantize import quantization_of

with needs("eval", "evaluation"):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from more_itertools import constrained_batches

Job = TypeVar("Job")
log = logging.getLogger(__name__)
SCORES = 2
"""Version of what requests give, part of their keys in the journal: 2 leaves MASK out of scores, slices candidates."""
PASSES_PER_CHUNK = 8
"""Scoring writes to the journal when jobs have filled so many first passes, so that few passes are partly empty."""


@dataclass(frozen=True)
class Scorable:
    """A request for a score, as ids."""

    key: str
    pair: Pair
    greedy: bool
    """Whether to find out, too, if greedy generation gives the candidate."""


def _check_arguments(scoring: object, bos: object, special_tokens: object, settings: dict[str, Any]) -> None:
    """Refuse values and names of model_args that mean nothing; the harness hands on whatever its user writes.

    Raises:
        IlladaError: when one is unknown.
    """
    if unknown := sorted(settings.keys() - KINDS.keys()):
        raise IlladaError(f"unknown model_args {', '.join(unknown)}: choose from {', '.join(sorted(KINDS))}")
    for name, value in settings.items():
        settings[name] = read_value(name, value, KINDS[name])
    choices = {"scoring": (*get_args(Scoring), None), "bos": get_args(Bos), "special_tokens": get_args(SpecialTokens)}
    for (name, known), value in zip(choices.items(), (scoring, bos, special_tokens), strict=True):
        if value not in known:
            raise IlladaError(f"{name} must be one of {', '.join(filter(None, known))}, got {value}")


def _check_texts(requests: list[Instance]) -> None:
    """Refuse requests for anything but texts, which a document or a task file may make.

    Raises:
        IlladaError: when there is one.
    """
    for request in requests:
        for part in request.args:
            if not isinstance(part, str | dict):  # settings of generation are a dict
                where = f"task {request.task_name}, document {request.doc_id}"
                raise IlladaError(f"{where}: {str(part)[:60]!r} is no text: check the task's file and its data")


@register_model("illada")
class IlladaLM(LM):
    """Scores and generates for the harness; results do not depend on the batch or the number of processes.

    Scores use the authors' layout (spec §6): BOS before the context, one visible EOS after the candidate. A context
    with special tokens comes from a chat template, and its white space stays where the template put it.

    Under torchrun every process has the whole model and a share of the documents.

    Args:
        pretrained: model, adapter or run folder, or hub name.
        scoring: "confidence" (paper Eq. 2), "likelihood" (LLaDA Eq. 6), or "path", the exact likelihood under the
            decoding rule of the settings (`path_log_likelihoods`); null takes confidence, and for a causal model the
            likelihood, which is exact there and takes one pass.
        samples: Monte-Carlo samples of the likelihood (LLaDA: 128). One-token answers, where both scores coincide, and
            causal models take one.
        seed: seed of the likelihood's masks and of generation.
        max_batch_tokens: most positions of one forward pass when scoring.
        max_gen_tokens: answer budget of tasks that name none (the harness's own default).
        generation_batch_tokens: most positions of one forward pass when generating.
        results: folder of the journal, from which a killed evaluation continues; null writes none.
        dtype: type of the weights; auto takes the checkpoint's own.
        device: device to run on; auto takes a GPU where there is one, and under torchrun the process's own. cuda:0 does
            the same, because the harness's command line passes it by default.
        quantize: weights in 8 or 4 bits, as in `illada score`.
        bos: where a BOS begins the context: "always", as in training; "scores" as in the authors' script, which adds it
            for scores only; "tokenizer" as in the harness's model hf, where the tokenizer adds one by itself. In the
            last two a generation prompt has the BOS that the tokenizer or the chat template puts there. There are
            never two (the authors' script would have two in scores with a tokenizer that adds one).
        special_tokens: "drop" deletes special tokens from answers, all but the marks of thinking; "keep" leaves them,
            as in the authors' script, and takes the text of EOS for a stop string.
        batch_size: ignored, because passes are filled up to max_batch_tokens; the harness always passes it.
        max_batch_size: ignored, too.
        settings: fields of `GenerationSettings` (block_length, steps_per_block, threshold, cache, ...) for all tasks;
            a task's own generation_kwargs, which may use the same names, override them.

    Raises:
        IlladaError: when the model cannot be loaded or a setting is unknown, out of range, or about masks where the
            model is causal.
    """

    def __init__(
        self,
        pretrained: str,
        scoring: Scoring | None = None,
        samples: int = 128,
        seed: int = 0,
        max_batch_tokens: int = 16_384,
        generation_batch_tokens: int = MAX_BATCH_TOKENS,
        max_gen_tokens: int = 256,
        results: str | None = None,
        dtype: Dtype = "auto",
        device: str = "auto",
        quantize: Quantization | None = None,
        bos: Bos = "always",
        special_tokens: SpecialTokens = "drop",
        batch_size: object = None,  # noqa: ARG002
        max_batch_size: object = None,  # noqa: ARG002
        **settings: Any,
    ):
        super().__init__()
        _check_arguments(scoring, bos, special_tokens, settings)
        self._join()
        if device in ("auto", "cuda:0"):
            many = self._world_size > 1 and torch.cuda.is_available()
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if many else "auto"
        self.model, self.tokenizer = load_model(pretrained, dtype, device, quantize)
        self._device = torch.device("cpu")  # of the small tensors that the processes exchange
        self.causal = self.model.config.causal
        if scoring == "confidence":
            self.model.config.refuse_causal("scoring=confidence is", "take scoring=likelihood, which is exact there")
        self.scoring = scoring or ("likelihood" if self.causal else "confidence")
        self.pretrained, self.samples, self.seed = pretrained, 1 if self.causal else samples, seed
        self.max_batch_tokens, self.generation_batch_tokens = max_batch_tokens, generation_batch_tokens
        base = GenerationSettings(**{"max_new_tokens": max_gen_tokens, "seed": seed, **settings})
        base = settings_for(self.model, base)
        self.settings = base.left_to_right() if self.causal else base
        self.rule = self.settings
        """The decoding rule of scoring=path."""
        self.fingerprint = fingerprint(pretrained)
        self.precision = f"{self.model.dtype} {quantization_of(self.model.config) or ''}".removeprefix("torch.").strip()
        self.journal = Journal(results, self._rank)
        self.forwards: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cut: Counter[str] = Counter()
        """Forward passes of rows, seconds, and requests whose context was cut to fit, each by task."""
        self.bos, self.special_tokens = bos, special_tokens
        ids = self.tokenizer("x")["input_ids"]
        self.tokenizer_begins = bool(ids) and ids[0] == self.tokenizer.bos_token_id
        special = {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.dropped = sorted(set(special.values()) - {"<think>", "</think>"}, key=len, reverse=True)
        self.markup = special.keys() - {self.tokenizer.bos_token_id}

    # The harness's interface

    def loglikelihood(self, requests: list[Instance], **_: object) -> list[tuple[float, bool]]:
        """Return (score in nats, whether greedy generation gives it) of each continuation.

        The second is computed, by greedy generation of as many tokens, only for documents with one continuation; with
        several, where the scores decide, it is False.
        """
        _check_texts(requests)
        settings: dict[str, Any] = {"scoring": self.scoring}
        if self.scoring == "likelihood":
            settings |= {"samples": self.samples, "seed": self.seed}
        elif self.scoring == "path":
            settings |= {"rule": asdict(self.rule)}
        once = {id(request): request for request in requests}.values()  # the harness repeats some to fill up a process
        continuations = Counter((request.task_name, request.doc_id) for request in once)
        of_context = defaultdict(list)
        for request in once:
            of_context[request.args[0]].append(request.args[1])
        pairs = {
            (context, text): pair
            for context, texts in of_context.items()
            for text, pair in zip(texts, self._layout(context, texts), strict=True)
        }
        jobs = []
        for request in requests:
            greedy = continuations[request.task_name, request.doc_id] == 1
            left, answer = pairs[request.args]
            left = self._fit(request, list(left), self.max_length - len(answer) - 1)
            key = self._key(request, {**settings, "greedy": greedy}, request.args)
            jobs.append((key, request, Scorable(key, (left, answer), greedy)))
        return [(float(entry.value[0]), bool(entry.value[1])) for entry in self._finish(jobs, self._score)]

    def loglikelihood_rolling(self, requests: list[Instance], **_: object) -> list[float]:
        """Return an estimate of a lower bound on log p(text) in nats, by LLaDA Eq. 6 of whole texts; not a likelihood.

        The bound is the training loss's (paper Eq. 1). With scoring=path it is log p(text) under the decoding rule, and
        a causal model gives log p(text) itself. Texts longer than the
        context are cut into windows; each begins with a BOS and does not see the others.
        """
        _check_texts(requests)
        begin = encode_plain(self.tokenizer, "")
        size = self.max_length - len(begin)
        jobs = []
        for request in requests:
            ids = list(self.tokenizer.encode(request.args[0], add_special_tokens=False))
            pairs: list[Pair] = [(begin, ids[start : start + size]) for start in range(0, len(ids), size)]
            exact = self.scoring == "path"
            settings = {"rule": asdict(self.rule)} if exact else {"samples": self.samples, "seed": self.seed}
            key = self._key(request, settings, request.args)
            jobs.append((key, request, (key, pairs)))
        return [float(entry.value[0]) for entry in self._finish(jobs, self._bound)]

    def generate_until(self, requests: list[Instance], **_: object) -> list[str]:
        """Return each answer, cut before the first of its `until` strings; see `special_tokens`.

        A request to sample that comes several times is drawn several times, with consecutive seeds.
        """
        _check_texts(requests)
        jobs = []
        drawn: Counter[int] = Counter()
        for request in requests:
            settings = self.settings_of(request.args[1])
            if settings.temperature:
                settings = replace(settings, seed=settings.seed + drawn[id(request)])
                drawn[id(request)] += 1
            if self.special_tokens == "keep" and self.tokenizer.eos_token:
                settings = replace(settings, stop=(*settings.stop, self.tokenizer.eos_token))
            ways = {} if self.special_tokens == "drop" else {"special_tokens": self.special_tokens}
            key = self._key(request, {**asdict(settings), **ways}, request.args[:1])
            ids = self._encode(request.args[0], self._begins(scoring=False))
            ids = self._fit(request, ids, self.max_length - settings.block_length)
            jobs.append((key, request, (key, ids, settings)))
        return [str(entry.value[0]) for entry in self._finish(jobs, self._generate)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation in the tokenizer's template; without a generation prompt the last message stays open.

        Raises:
            IlladaError: when there is no template or it refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise IlladaError("the tokenizer has no chat template: leave out --apply_chat_template or use a chat model")
        error: Exception | None = None
        for messages in (chat_history, without_system(chat_history)):
            try:
                return str(
                    self.tokenizer.apply_chat_template(
                        messages,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        continue_final_message=not add_generation_prompt,
                    )
                )
            except (TemplateError, ValueError) as refused:
                error = error or refused
        raise IlladaError(f"the chat template refuses the conversation: {first_line(cast(Exception, error))}")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template in use, for the harness's record."""
        return str(self.tokenizer.chat_template) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests; it changes with the tokenizer's vocabulary and template."""
        text = repr(sorted(self.tokenizer.get_vocab().items())) + str(self.tokenizer.chat_template)
        return f"illada-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def max_length(self) -> int:
        """The model's context."""
        return int(self.model.config.max_position_embeddings)

    def get_model_info(self) -> dict[str, Any]:
        """Return the facts about the model that the harness writes beside its results."""
        return {
            "model_fingerprint": self.fingerprint,
            "model_dtype": self.precision,
            "model_device": str(self.model.device),
            "bos": self.bos,
            "special_tokens": self.special_tokens,
            "scoring": self.scoring,
            "likelihood_samples": self.samples,
            "loglikelihood_rolling": self._rolling(),
            "generation": asdict(self.settings),
            "row_forwards": dict(self.forwards),
            "contexts_cut": dict(self.cut),
        }

    # Work

    def settings_of(self, generation_kwargs: dict[str, Any]) -> GenerationSettings:
        """Return the settings of a task's generation_kwargs, which may use the harness's names and ours.

        A block longer than the answer is shortened to it. Dropped are top_k and top_p without sampling, where they have
        no meaning but tasks often name them, and settings about masks where the model is causal.

        Raises:
            IlladaError: when a name is unknown or a value out of range.
        """
        rest = dict(generation_kwargs)
        until = rest.pop("until", None) or []
        read_value("until", until, str | list[str])
        stop = [until] if isinstance(until, str) else list(until)
        changes = {name: rest.pop(name) for name in KINDS.keys() & rest.keys()}
        if self.causal:
            changes = {name: value for name, value in changes.items() if name not in OF_DIFFUSION}
        for name in ("max_gen_toks", "max_tokens"):
            if (budget := rest.pop(name, None)) is not None:
                changes.setdefault("max_new_tokens", budget)
        sample = rest.pop("do_sample", None)
        read_value("do_sample", sample, bool | None)
        changes = {name: read_value(name, value, KINDS[name]) for name, value in changes.items()}
        if sample is False:
            changes["temperature"] = 0.0
        elif sample and not changes.get("temperature"):
            changes["temperature"] = self.settings.temperature or 1.0
        if rest:
            names = ", ".join(sorted(map(str, rest)))
            raise IlladaError(f"unknown generation_kwargs {names}: choose from {', '.join(sorted(KINDS))}")
        if not changes.get("temperature", self.settings.temperature):
            changes |= {"top_k": None, "top_p": 1.0}
        budget = changes.get("max_new_tokens", self.settings.max_new_tokens)
        changes["block_length"] = min(changes.get("block_length", self.settings.block_length), budget)
        return replace(self.settings, **changes, stop=tuple(filter(None, stop)))

    def _key(self, request: Instance, settings: dict[str, Any], arguments: Sequence[Any]) -> str:
        """Return the key of a request: a hash of the model, the task, the settings and the request itself."""
        model, task = (self.fingerprint, self.precision), (request.request_type, request.task_name)
        if self.bos != "always":
            settings = {**settings, "bos": self.bos}
        parts = (SCORES, *model, *task, settings, arguments)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]

    def _finish(
        self, jobs: list[tuple[str, Instance, Job]], work: Callable[[list[Job]], Iterator[list[Entry]]]
    ) -> list[Entry]:
        """Return the results of (key, request, job) in order, from the journal where it has them.

        `work` gets every different job once and yields the results that the journal lacks as they come.
        """
        unique = {key: job for key, _, job in jobs}
        done, started = len(unique.keys() & self.journal.entries.keys()), time.monotonic()
        said = started
        for entries in work(list(unique.values())):
            self.journal.add(entries)
            done += len(entries)
            if self._rank == 0 and (now := time.monotonic()) - said >= PLAIN_EVERY:
                said, name = now, jobs[0][1].task_name
                spent = duration(now - started)
                print(f"eval: {name}, {done} of {len(unique)} requests, {spent} elapsed", file=sys.stderr, flush=True)
        for key, task in {key: str(request.task_name) for key, request, _ in jobs}.items():
            self.forwards[task] += self.journal.entries[key].forwards
            self.seconds[task] += self.journal.entries[key].seconds
        for task in {str(request.task_name) for _, request, _ in jobs} & self.cut.keys():
            count = self.cut[task]
            log.warning("%s: %d contexts were cut on the left to fit into %d tokens", task, count, self.max_length)
        return [self.journal.entries[key] for key, _, _ in jobs]

    def _bound(self, jobs: list[tuple[str, list[Pair]]]) -> Iterator[list[Entry]]:
        """Bound one text after the other."""
        for key, pairs in jobs:
            if key not in self.journal.entries:
                start = time.perf_counter()
                scores, passes = self._scores(pairs, (), "path" if self.scoring == "path" else "likelihood")
                forwards = sum(passes)
                yield [Entry(key, [sum(scores)], forwards, time.perf_counter() - start)]

    def _scores(self, pairs: list[Pair], right: Sequence[int], scoring: str) -> tuple[list[float], list[int]]:
        """Return the score of each pair, and how many passes it took part in."""
        if scoring == "confidence":
            return confidence_scores(self.model, pairs, right, self.max_batch_tokens), [len(ids) for _, ids in pairs]
        if scoring == "path":
            refuse_rule(self.rule, self.causal)
            if not self.causal:  # for which both are log p
                paths = walk(self.model, pairs, self.rule, right, self.max_batch_tokens)
                return [path.log_likelihood for path in paths], [len(path.steps) for path in paths]
        scores = likelihood_scores(self.model, pairs, self.samples, self.seed, right, self.max_batch_tokens)
        return scores, [self._samples(ids) for _, ids in pairs]

    def _rolling(self) -> str:
        """Say what rolling requests get."""
        if self.causal:
            return "log p"
        rule = "log p under the decoding rule of the settings"
        return rule if self.scoring == "path" else "lower bound on log p (LLaDA Eq. 6), not a likelihood"

    def _samples(self, candidate: Sequence[int]) -> int:
        """Return how many passes the likelihood of a candidate takes."""
        return self.samples if len(candidate) > 1 else 1

    def _score(self, jobs: list[Scorable]) -> Iterator[list[Entry]]:
        """Score chunk after chunk; candidates of equal length, which finish together, stand together.

        Chunks are made of all jobs, known ones included, so that an interrupted run computes the same batches as one
        that was not interrupted.
        """
        right = () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)

        def positions(job: Scorable) -> int:
            return sum(map(len, job.pair)) * (self._samples(job.pair[1]) if self.scoring == "likelihood" else 1)

        jobs = sorted(jobs, key=lambda job: (len(job.pair[1]), len(job.pair[0]), job.pair))
        most = PASSES_PER_CHUNK * self.max_batch_tokens
        for chunk in constrained_batches(jobs, most, get_len=positions, strict=False):  # a long job is its own chunk
            todo = [job for job in chunk if job.key not in self.journal.entries]
            if not todo:
                continue
            start = time.perf_counter()
            scores, passes = self._scores([job.pair for job in todo], right, self.scoring)
            says = self._says([job for job in todo if job.greedy])
            seconds = (time.perf_counter() - start) / len(todo)
            entries = []
            for job, score, count in zip(todo, scores, passes, strict=True):
                forwards = count + len(job.pair[1]) * job.greedy
                entries.append(Entry(job.key, [score, says.get(job.key, False)], forwards, seconds))
            yield entries

    def _says(self, jobs: list[Scorable]) -> dict[str, bool]:
        """Return by key whether greedy generation of as many tokens, one at a time, gives the candidate."""
        settings = []
        for job in jobs:
            length = len(job.pair[1])
            block = 1 if self.causal else length
            settings.append(GenerationSettings(max_new_tokens=length, block_length=block, eos_token_id=None))
        prompts = [job.pair[0] for job in jobs]
        answers = generate(self.model, prompts, settings, max_batch_tokens=self.generation_batch_tokens)
        return {job.key: answer.ids == list(job.pair[1]) for job, answer in zip(jobs, answers, strict=True)}

    def _generate(self, jobs: list[tuple[str, list[int], GenerationSettings]]) -> Iterator[list[Entry]]:
        """Answer all prompts in one engine, the longest first, so that neighbours are of similar length."""
        limit = self.generation_batch_tokens
        engine = Engine(self.model, self.tokenizer, max_batch_tokens=limit, keep_special_tokens=True)
        todo = sorted((job for job in jobs if job[0] not in self.journal.entries), key=lambda job: -len(job[1]))
        keys = {engine.submit(ids, settings): key for key, ids, settings in todo}
        start = time.perf_counter()
        while engine.busy:
            answers = engine.step()
            if not answers:
                continue
            seconds = (time.perf_counter() - start) / len(answers)
            entries = []
            for index, answer in sorted(answers.items()):
                # The text, not the ids, is cut exactly where a stop string begins.
                text = str(answer.text)
                for token in self.dropped if self.special_tokens == "drop" else ():
                    text = text.replace(token, "")
                entries.append(Entry(keys[index], [text], answer.forwards, seconds))
            yield entries
            start = time.perf_counter()

    def _begins(self, scoring: bool) -> bool:
        """Return whether contexts begin with a BOS beside what a template writes, see `bos`."""
        return self.bos == "always" or (self.bos == "scores" and scoring) or self.tokenizer_begins

    def _encode(self, text: str, begins: bool) -> list[int]:
        """Return the ids of a prompt, BOS first where it `begins` so; a template may already have written it."""
        bos = self.tokenizer.bos_token
        if begins:
            return encode_plain(self.tokenizer, text.removeprefix(bos) if bos else text)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _layout(self, context: str, candidates: list[str]) -> list[Pair]:
        """Return a context and its continuations as ids, in the authors' layout or as a template rendered them."""
        begins = self._begins(scoring=True) or not context  # a causal model goes on from something
        bos = self.tokenizer.bos_token
        body = context.removeprefix(bos) if begins and bos else context  # a template may have written it
        pairs: list[Pair] = [*score_layout(self.tokenizer, body, candidates, begins)[0]]
        if self.markup.isdisjoint(pairs[0][0]):
            return pairs
        left = self._encode(context, begins)
        return [(left, list(self.tokenizer.encode(text, add_special_tokens=False))) for text in candidates]

    def _fit(self, request: Instance, ids: list[int], room: int) -> list[int]:
        """Return a context that fits; a long one loses tokens on the left, after its BOS."""
        if len(ids) <= room:
            return ids
        self.cut[str(request.task_name)] += 1
        first = ids[:1] if ids and ids[0] == self.tokenizer.bos_token_id else []
        return first + ids[len(ids) - max(0, room - len(first)) :]

    # Processes

    def _join(self) -> None:
        """Join torchrun's process group, if there is one."""
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._rank = int(os.environ.get("RANK", "0")) if self._world_size > 1 else 0
        if self._world_size > 1 and not distributed.is_initialized():
            distributed.init_process_group("gloo")

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all processes along a first dimension."""
        if self._world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self._world_size)]
        distributed.all_gather(parts, tensor)
        return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all processes on `dst`, None elsewhere."""
        if self._world_size == 1:
            return [obj]
        parts: list[Any] | None = [None] * self._world_size if self._rank == dst else None
        distributed.gather_object(obj, parts, dst)
        return parts

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self._world_size > 1:
            distributed.barrier()
