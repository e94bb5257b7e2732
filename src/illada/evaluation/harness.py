"""The model "illada" of lm-evaluation-harness (spec §6, §7).

Shape letters: L candidate tokens.
"""

import hashlib
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast

import torch
from jinja2.exceptions import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from torch import distributed

from illada.errors import IlladaError, first_line
from illada.evaluation.journal import Found, Journal, fingerprint, request_key
from illada.generation.engine import MAX_BATCH_TOKENS, Engine, generate
from illada.generation.settings import OF_DIFFUSION, GenerationSettings, settings_for
from illada.scoring import confidence_scores, likelihood_scores, score_layout
from illada.scoring.layout import Pair
from illada.text.chat import without_system
from illada.text.prompts import encode_plain
from illada.weights.load import load_model
from illada.weights.options import Dtype, Quantization

Job = TypeVar("Job")
log = logging.getLogger(__name__)
SETTINGS = {field.name for field in fields(GenerationSettings)} - {"eos_token_id", "stop"}
PASSES_PER_CHUNK = 8
"""First passes of the scoring jobs between two writes to the journal: enough to fill all but the last."""


@dataclass(frozen=True)
class Scorable:
    """A request for a score, in ids."""

    key: str
    pair: Pair
    greedy: bool
    """Whether it is also asked if the model would say this."""


@register_model("illada")
class IlladaLM(LM):
    """Scores and generates for the harness; results do not depend on the batch or the number of processes.

    Scores are of the authors' layout (spec §6): BOS before the context, one visible EOS after the candidate. A context
    that holds special tokens was rendered by a chat template: its white space stays where the template put it.

    Under torchrun every process has the whole model and its share of the documents.

    Args:
        pretrained: model, adapter or run folder, or hub name.
        scoring: "confidence" (paper Eq. 2) or "likelihood" (LLaDA Eq. 6); null for confidence, or for the likelihood
            where the model is causal: it is exact there and takes one pass.
        samples: of the likelihood (LLaDA: 128); one-token answers take one, where both scores coincide, and so do
            causal models.
        seed: of the likelihood's masks, and of generation.
        max_batch_tokens: most positions of one forward pass when scoring.
        max_gen_tokens: answer budget of tasks that name none (the harness's own default).
        generation_batch_tokens: most positions of one forward pass when generating.
        results: folder for the journal, with which a killed evaluation continues; null for none.
        dtype: of the weights; auto is the checkpoint's own.
        device: to run on; auto takes a GPU where there is one, under torchrun the one of the process. So does cuda:0,
            which the harness's command line passes unless told otherwise.
        quantize: weights in 8 or 4 bits, as `illada score` has it.
        batch_size: not used: passes are filled up to max_batch_tokens. The harness always passes it.
        max_batch_size: not used, likewise.
        settings: fields of `GenerationSettings` (block_length, steps_per_block, threshold, cache, ...), for all tasks;
            a task's own generation_kwargs, where those names serve too, come before them.

    Raises:
        IlladaError: when the model cannot be loaded or a setting is unknown, out of range, or about masks where the
            model is causal.
    """

    def __init__(
        self,
        pretrained: str,
        scoring: Literal["confidence", "likelihood"] | None = None,
        samples: int = 128,
        seed: int = 0,
        max_batch_tokens: int = 16_384,
        generation_batch_tokens: int = MAX_BATCH_TOKENS,
        max_gen_tokens: int = 256,
        results: str | None = None,
        dtype: Dtype = "auto",
        device: str = "auto",
        quantize: Quantization | None = None,
        batch_size: object = None,  # noqa: ARG002
        max_batch_size: object = None,  # noqa: ARG002
        **settings: Any,
    ):
        super().__init__()
        unknown = sorted(set(settings) - SETTINGS)
        if unknown:
            raise IlladaError(f"unknown model_args {', '.join(unknown)}: choose from {', '.join(sorted(SETTINGS))}")
        if scoring not in ("confidence", "likelihood", None):
            raise IlladaError(f"scoring must be confidence or likelihood, got {scoring}")
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
        self.fingerprint = fingerprint(pretrained)
        self.precision = f"{self.model.dtype} {quantize or ''}".removeprefix("torch.").strip()
        self.journal = Journal(results, self._rank)
        self.forwards: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cut: Counter[str] = Counter()
        """Per task: forward passes of rows, seconds, and requests whose context was cut to fit."""
        special = {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.special, self.markup = list(special.values()), special.keys() - {self.tokenizer.bos_token_id}

    # What the harness asks for

    def loglikelihood(self, requests: list[Instance], **_: object) -> list[tuple[float, bool]]:
        """Return (score in nats, whether the model would say it) of each continuation.

        The second is computed, by greedy generation of exactly so many tokens, for documents with one continuation
        only; with several the question is which, and it is False.
        """
        settings: dict[str, Any] = {"scoring": self.scoring}
        if self.scoring == "likelihood":
            settings |= {"samples": self.samples, "seed": self.seed}
        once = {id(request): request for request in requests}.values()  # the harness repeats some, to fill up a process
        company = Counter((request.task_name, request.doc_id) for request in once)
        of_context = defaultdict(list)
        for request in once:
            of_context[request.args[0]].append(request.args[1])
        pairs = {
            (context, text): pair
            for context, texts in of_context.items()
            for text, pair in zip(texts, self._layout(context, texts), strict=True)
        }
        asked = []
        for request in requests:
            alone = company[request.task_name, request.doc_id] == 1
            left, answer = pairs[request.args]
            left = self._fit(request, list(left), self.max_length - len(answer) - 1)
            key = self._key(request, {**settings, "greedy": alone}, request.args)
            asked.append((key, request, Scorable(key, (left, answer), alone)))
        return [(float(one.value[0]), bool(one.value[1])) for one in self._found(asked, self._score)]

    def loglikelihood_rolling(self, requests: list[Instance], **_: object) -> list[float]:
        """Return an estimate of a lower bound on log p(text) in nats, not a likelihood: LLaDA Eq. 6 of whole texts.

        It is the bound of the training loss (paper Eq. 1); of a causal model it is log p(text) itself. Texts longer
        than the context are cut into windows, each after a BOS and blind to the others.
        """
        begin = encode_plain(self.tokenizer, "")
        size = self.max_length - len(begin)
        asked = []
        for request in requests:
            ids = list(self.tokenizer.encode(request.args[0], add_special_tokens=False))
            pairs: list[Pair] = [(begin, ids[start : start + size]) for start in range(0, len(ids), size)]
            key = self._key(request, {"samples": self.samples, "seed": self.seed}, request.args)
            asked.append((key, request, (key, pairs)))
        return [float(one.value[0]) for one in self._found(asked, self._bound)]

    def generate_until(self, requests: list[Instance], **_: object) -> list[str]:
        """Return each answer, special tokens left out, cut before the first of its `until` strings.

        A sampled answer that is asked for several times is drawn several times, with seeds that follow each other.
        """
        asked = []
        drawn: Counter[int] = Counter()
        for request in requests:
            settings = self.settings_of(request.args[1])
            if settings.temperature:
                settings = replace(settings, seed=settings.seed + drawn[id(request)])
                drawn[id(request)] += 1
            key = self._key(request, asdict(settings), request.args[:1])
            ids = self._fit(request, self._encode(request.args[0]), self.max_length - settings.block_length)
            asked.append((key, request, (key, ids, settings)))
        return [str(one.value[0]) for one in self._found(asked, self._generate)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation in the tokenizer's template; without a generation prompt the last message goes on.

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
        """A name for the harness's cache of requests: changes with the tokenizer's vocabulary and template."""
        text = repr(sorted(self.tokenizer.get_vocab().items())) + str(self.tokenizer.chat_template)
        return f"illada-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def max_length(self) -> int:
        """The model's context."""
        return int(self.model.config.max_position_embeddings)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside its results."""
        return {
            "model_fingerprint": self.fingerprint,
            "model_dtype": self.precision,
            "model_device": str(self.model.device),
            "scoring": self.scoring,
            "likelihood_samples": self.samples,
            "loglikelihood_rolling": "log p" if self.causal else "lower bound on log p (LLaDA Eq. 6), not a likelihood",
            "generation": asdict(self.settings),
            "row_forwards": dict(self.forwards),
            "contexts_cut": dict(self.cut),
        }

    # Work

    def settings_of(self, generation_kwargs: dict[str, Any]) -> GenerationSettings:
        """Return the settings of a task's generation_kwargs: the harness's names and ours.

        A block longer than the answer becomes as long as it. Without sampling top_k and top_p, which tasks like to
        name anyway, have no meaning and are dropped, as is what tasks say about masks where the model is causal.

        Raises:
            IlladaError: when a name is unknown or a value out of range.
        """
        given = dict(generation_kwargs)
        until = given.pop("until", None) or []
        stop = [until] if isinstance(until, str) else list(until)
        changes = {name: given.pop(name) for name in SETTINGS & set(given)}
        if self.causal:
            changes = {name: value for name, value in changes.items() if name not in OF_DIFFUSION}
        for name in ("max_gen_toks", "max_tokens"):
            if given.get(name) is not None:
                changes.setdefault("max_new_tokens", int(given[name]))
            given.pop(name, None)
        sample = given.pop("do_sample", None)
        if sample is False:
            changes["temperature"] = 0.0
        elif sample and not changes.get("temperature"):
            changes["temperature"] = self.settings.temperature or 1.0
        if given:
            names = ", ".join(sorted(given))
            raise IlladaError(f"unknown generation_kwargs {names}: choose from {', '.join(sorted(SETTINGS))}")
        if not changes.get("temperature", self.settings.temperature):
            changes |= {"top_k": None, "top_p": 1.0}
        budget = changes.get("max_new_tokens", self.settings.max_new_tokens)
        changes["block_length"] = min(changes.get("block_length", self.settings.block_length), budget)
        return replace(self.settings, **changes, stop=tuple(filter(None, stop)))

    def _key(self, request: Instance, settings: dict[str, Any], arguments: Sequence[Any]) -> str:
        what = (request.request_type, request.task_name, settings, list(arguments))
        return request_key(self.fingerprint, self.precision, *what)

    def _found(
        self, asked: list[tuple[str, Instance, Job]], work: Callable[[list[Job]], Iterator[list[Found]]]
    ) -> list[Found]:
        """Return the results of (key, request, job) in order, from the journal where they are there.

        `work` gets all jobs, each once, and yields the results of those that the journal lacks, as they come.
        """
        for found in work(list({key: job for key, _, job in asked}.values())):
            self.journal.add(found)
        for key, task in {key: str(request.task_name) for key, request, _ in asked}.items():
            self.forwards[task] += self.journal.found[key].forwards
            self.seconds[task] += self.journal.found[key].seconds
        for task, count in self.cut.items():
            log.warning("%s: %d contexts were cut on the left to fit into %d tokens", task, count, self.max_length)
        return [self.journal.found[key] for key, _, _ in asked]

    def _bound(self, job: list[tuple[str, list[Pair]]]) -> Iterator[list[Found]]:
        """Bound a text at a time."""
        for key, pairs in job:
            if key not in self.journal.found:
                start = time.perf_counter()
                scores = likelihood_scores(
                    self.model, pairs, self.samples, self.seed, max_batch_tokens=self.max_batch_tokens
                )
                forwards = sum(self._samples(candidate) for _, candidate in pairs)
                yield [Found(key, [sum(scores)], forwards, time.perf_counter() - start)]

    def _samples(self, candidate: Sequence[int]) -> int:
        """How many passes the likelihood of a candidate takes."""
        return self.samples if len(candidate) > 1 else 1

    def _score(self, job: list[Scorable]) -> Iterator[list[Found]]:
        """Score a chunk at a time: candidates of equal length together, which end together.

        The chunks are those of the whole job, whatever of it is already known, so that a run that was interrupted does
        the same computations as one that was not.
        """
        right = () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)
        confidence = self.scoring == "confidence"

        def positions(one: Scorable) -> int:
            return sum(map(len, one.pair)) * (1 if confidence else self._samples(one.pair[1]))

        job = sorted(job, key=lambda one: (len(one.pair[1]), len(one.pair[0]), one.pair))
        for chunk in _chunks(job, positions, PASSES_PER_CHUNK * self.max_batch_tokens):
            todo = [one for one in chunk if one.key not in self.journal.found]
            if not todo:
                continue
            start = time.perf_counter()
            pairs = [one.pair for one in todo]
            if confidence:
                scores = confidence_scores(self.model, pairs, right, self.max_batch_tokens)
            else:
                scores = likelihood_scores(self.model, pairs, self.samples, self.seed, right, self.max_batch_tokens)
            says = self._says([one for one in todo if one.greedy])
            seconds = (time.perf_counter() - start) / len(todo)
            found = []
            for one, score in zip(todo, scores, strict=True):
                length = len(one.pair[1])
                forwards = (length if confidence else self._samples(one.pair[1])) + length * one.greedy
                found.append(Found(one.key, [score, says.get(one.key, False)], forwards, seconds))
            yield found

    def _says(self, job: list[Scorable]) -> dict[str, bool]:
        """Return by key whether greedy generation of as many tokens, one at a time, gives the candidate."""
        settings = []
        for one in job:
            length = len(one.pair[1])
            block = 1 if self.causal else length
            settings.append(GenerationSettings(max_new_tokens=length, block_length=block, eos_token_id=None))
        prompts = [one.pair[0] for one in job]
        said = generate(self.model, prompts, settings, max_batch_tokens=self.generation_batch_tokens)
        return {one.key: answer.ids == list(one.pair[1]) for one, answer in zip(job, said, strict=True)}

    def _generate(self, job: list[tuple[str, list[int], GenerationSettings]]) -> Iterator[list[Found]]:
        """Answer all prompts in one engine, long ones first: neighbours are of similar length and end together."""
        engine = Engine(self.model, self.tokenizer, max_batch_tokens=self.generation_batch_tokens)
        todo = sorted((one for one in job if one[0] not in self.journal.found), key=lambda one: -len(one[1]))
        keys = {engine.submit(ids, settings): key for key, ids, settings in todo}
        start = time.perf_counter()
        while engine.busy:
            ended = engine.step()
            if not ended:
                continue
            seconds = (time.perf_counter() - start) / len(ended)
            found = []
            for index, answer in sorted(ended.items()):
                key = keys[index]
                # The text, not the ids, is cut exactly where a stop string begins.
                text = str(answer.text)
                for token in self.special:
                    text = text.replace(token, "")
                found.append(Found(key, [text], answer.forwards, seconds))
            yield found
            start = time.perf_counter()

    def _encode(self, text: str) -> list[int]:
        """Return the ids of a prompt: BOS first, unless a template has written it."""
        bos = self.tokenizer.bos_token
        return encode_plain(self.tokenizer, text.removeprefix(bos) if bos else text)

    def _layout(self, context: str, candidates: list[str]) -> list[Pair]:
        """Lay out a context and its continuations: as the authors do, or as a template rendered it."""
        pairs: list[Pair] = [*score_layout(self.tokenizer, context, candidates)[0]]
        if self.markup.isdisjoint(pairs[0][0]):
            return pairs
        left = self._encode(context)
        return [(left, list(self.tokenizer.encode(text, add_special_tokens=False))) for text in candidates]

    def _fit(self, request: Instance, ids: list[int], room: int) -> list[int]:
        """Cut a context on the left, behind its BOS."""
        if len(ids) <= room:
            return ids
        self.cut[str(request.task_name)] += 1
        first = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return first + ids[len(ids) - max(0, room - len(first)) :]

    # Processes

    def _join(self) -> None:
        """Take part in torchrun's group, if there is one."""
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


def _chunks(items: Sequence[Job], size: Callable[[Job], int], most: int) -> Iterator[list[Job]]:
    """Cut a list into runs of at most `most`, at least one item each."""
    chunk: list[Job] = []
    held = 0
    for item in items:
        if chunk and held + size(item) > most:
            yield chunk
            chunk, held = [], 0
        chunk.append(item)
        held += size(item)
    if chunk:
        yield chunk
