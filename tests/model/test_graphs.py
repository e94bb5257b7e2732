"""Passes over static buffers against the eager ones, with a recorder in the place of CUDA graphs.

The recorder is as blind as a graph: a replay repeats the recorded operations on the recorded tensors, and whatever the
host decided at the capture stays as it was.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from illada.errors import IlladaError
from illada.generation.engine import Engine, generate, infill
from illada.generation.settings import GenerationSettings
from illada.model.attention import Packing
from illada.model.kv_cache import KVCache, PagePool
from illada.model.optional.graphs import CudaGraph, GraphedPasses, use_cuda_graphs
from illada.model.transformer import IlladaModel
from illada.scoring.confidence import confidence_scores


class Recorded(TorchDispatchMode):
    """A function recorded as a CUDA graph would record it."""

    def __init__(self, run, others):
        super().__init__()
        self.others, self.calls, self.made, self.outside = others, [], set(), {}
        self.replays = 0
        run()  # as a capture: what is kept is made before
        with self:
            self.result = run()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given_tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for tensor in given_tensors:
            if tensor.untyped_storage().data_ptr() not in self.made:
                self.outside[tensor.untyped_storage().data_ptr()] = tensor
        # By address: a tensor that is given other memory later is still read where it was.
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        result = function(*args, **kwargs)
        fresh = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.numel()]
        old = {x.untyped_storage().data_ptr() for x in given_tensors}
        fresh = [x for x in fresh if x.untyped_storage().data_ptr() not in old]
        self.made |= {x.untyped_storage().data_ptr() for x in fresh}
        self.calls.append((function, args, kwargs, fresh))
        return result

    def __call__(self):
        self.replays += 1
        # Graphs share memory: nothing may be left over from an earlier replay, of this graph or of another.
        for graph in (self, *self.others):
            for *_, fresh in graph.calls:
                for tensor in fresh:
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        for function, args, kwargs, fresh in self.calls:
            if function._schema.is_mutable or fresh:
                again = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, torch.Tensor) and x.numel()]
                for tensor, value in zip(fresh, again if fresh else [], strict=True):
                    tensor.copy_(value)
        return self.result


def again(run, others):
    """The simplest stand-in: no capture at all."""
    return run


def graphed(model, graph=Recorded, **limits):
    """A copy of a model that runs its passes by graphs."""
    model = copy.deepcopy(model)
    model.model.packed = GraphedPasses(model.model, graph, **limits)
    return model


def captured(model):
    return [step.replay for step in model.model.packed.steps.values()]


PROMPTS = [[9, *range(n)] for n in (3, 1, 7, 2, 30, 4, 5)]
MODES = [
    GenerationSettings(12, 4, eos_token_id=(7, 63), **change)
    for change in (
        {},
        {"speculate": 3},
        {"cache": "frozen", "speculate": 3},
        {"cache": "prefix", "guidance_scale": 1.0, "speculate": 3},
        {"cache": "dual", "later_masks": True, "threshold": 0.1},
        {"cache": "adaptive", "refresh_below": 0.2, "threshold": 0.1},
        {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3, "later_masks": True, "top_k": 40},
    )
]


def test_tokens_are_the_eager_ones_in_a_pass_of_all_modes(tied):
    wanted = generate(tied, PROMPTS, MODES)
    fast = graphed(tied)
    assert generate(fast, PROMPTS, MODES) == wanted
    graphs = captured(fast)
    assert 3 <= len(graphs) <= 8
    assert max(graph.replays for graph in graphs) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", MODES, ids=range(len(MODES)))
def test_tokens_are_the_eager_ones_in_every_mode(build_model, settings, kernel):
    model = build_model(tie=True, seed=3)
    model.set_attn_implementation(kernel)
    fast = graphed(model)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[::-1]):
        assert generate(fast, prompts, settings) == generate(model, prompts, settings)
    assert captured(fast)


@pytest.mark.parametrize("cache", ["none", "frozen"])
def test_a_causal_model_too(build_model, cache):
    model = build_model(tie=True, seed=3, causal=True)
    settings = GenerationSettings(max_new_tokens=5, eos_token_id=None, cache=cache)
    fast = graphed(model)
    assert generate(fast, PROMPTS, settings) == generate(model, PROMPTS, settings)
    assert captured(fast)


@pytest.mark.parametrize("cache", ["none", "prefix", "frozen"])
def test_slots_and_forms_too(tied, cache):
    templates = [[8, None, None, 9], [None, 10, None, 11, None, 12]]
    fast = graphed(tied)
    settings = GenerationSettings(cache=cache)
    assert infill(fast, templates, settings) == infill(tied, templates, settings)
    assert captured(fast)


def test_forms_too(build_model, tiny_tokenizer):
    model = build_model(tie=True, seed=1, vocab_size=len(tiny_tokenizer))
    settings = GenerationSettings(16, 8, regex="(one|two) [a-z]{3}", cache="frozen")
    fast = graphed(model)
    assert generate(fast, PROMPTS[:2], settings, tiny_tokenizer) == generate(
        model, PROMPTS[:2], settings, tiny_tokenizer
    )
    assert captured(fast)


def test_scores_too(tied):
    pairs = [([8, 9], [10, 11, 12]), ([8, 9], [13]), ([], [14, 15, 16, 17])]
    fast = graphed(tied)
    assert confidence_scores(fast, pairs) == pytest.approx(confidence_scores(tied, pairs), abs=1e-4)
    assert captured(fast)


ROWS = st.lists(st.tuples(st.none() | st.integers(0, 50), st.integers(1, 40)), min_size=1, max_size=5)
"""Of each row what lies in its cache, if it has one, and how many positions the pass computes."""


def pass_over(model, rows, seed, split=False):
    """The wanted states of each row, whose cache holds what an earlier pass computed; each row alone if split."""
    draw = np.random.default_rng(seed)
    pool, packed = PagePool(), model.model.packed
    caches = [None if start is None else KVCache(pool) for start, _ in rows]
    ids = [draw.integers(0, 60, (start or 0) + length) for start, length in rows]
    wanted = [np.sort(draw.permutation(length)[: draw.integers(1, length + 1)]) for _, length in rows]
    for cache, row, (start, length) in zip(caches, ids, rows, strict=True):
        if cache is not None:
            cache.begin(0, start)
            if start:
                packed(torch.from_numpy(row[:start]), Packing((start,), (cache,)), wanted=[np.arange(start)])
            cache.begin(start, start + length)
    new = [row[-length:] for row, (_, length) in zip(ids, rows, strict=True)]
    groups = [[i] for i in range(len(rows))] if split else [range(len(rows))]
    return torch.cat(
        [
            packed(
                torch.from_numpy(np.concatenate([new[i] for i in group])),
                Packing(tuple(len(new[i]) for i in group), tuple(caches[i] for i in group)),
                wanted=[wanted[i] for i in group],
            )
            for group in groups
        ]
    )


@pytest.fixture(scope="module", params=[False, True], ids=["bidirectional", "causal"])
def both(request, build_model):
    model = build_model(tie=True, seed=5, causal=request.param)
    return model, graphed(model)


@hypothesis_settings(deadline=None, max_examples=10, derandomize=True)
@given(ROWS, st.integers(0, 9))
@torch.inference_mode()
def test_padding_and_company_change_no_row(both, rows, seed):
    model, fast = both
    states = pass_over(fast, rows, seed)
    assert captured(fast)
    torch.testing.assert_close(states, pass_over(model, rows, seed, split=True), atol=2e-5, rtol=1e-4)


def test_a_replay_reads_buffers_weights_and_storage_only(tied):
    fast = graphed(tied)
    generate(fast, PROMPTS, MODES)
    passes = fast.model.packed
    known = [*passes.weights, *passes.storage.layers]
    assert len(passes.storage.layers) == 2
    for step in passes.steps.values():
        allowed = {x.untyped_storage().data_ptr() for x in (*known, step.buffer, step.ids)}
        assert step.replay.outside.keys() <= allowed
        assert len(step.replay.outside) > 10
    before = {bucket: (step.buffer.data_ptr(), step.ids.data_ptr()) for bucket, step in passes.steps.items()}
    generate(fast, PROMPTS, MODES)
    assert before.items() <= {b: (s.buffer.data_ptr(), s.ids.data_ptr()) for b, s in passes.steps.items()}.items()


FROZEN = GenerationSettings(12, 4, eos_token_id=None, cache="frozen")


def test_graphs_serve_later_engines(tied):
    fast = graphed(tied)
    wanted = generate(tied, PROMPTS[:3], FROZEN)
    assert generate(fast, PROMPTS[:3], FROZEN) == wanted
    graphs = captured(fast)
    replays = [graph.replays for graph in graphs]
    assert generate(fast, PROMPTS[:3], FROZEN) == wanted
    assert captured(fast) == graphs  # the same objects
    assert [graph.replays for graph in graphs] == [2 * count for count in replays]


def test_two_engines_do_not_share_pages(tied):
    fast = graphed(tied, again)
    engines = [Engine(model) for model in (fast, fast, tied, tied)]
    for engine, prompt in zip(engines, PROMPTS[:2] * 2, strict=True):
        engine.submit(prompt, FROZEN)
    found = [{}, {}, {}, {}]
    while any(engine.busy for engine in engines):
        found = [answers | engine.step() for answers, engine in zip(found, engines, strict=True)]
    assert found[:2] == found[2:]
    assert fast.model.packed.owner() is engines[0].pool
    assert engines[1].pool.layers is not engines[0].pool.layers
    engines[1].submit(PROMPTS[4], FROZEN)  # it has begun elsewhere, so there it stays
    assert engines[1].run() == generate(tied, PROMPTS[4:5], FROZEN)
    late = Engine(fast)
    late.submit(PROMPTS[4], FROZEN)
    assert late.run() == generate(tied, PROMPTS[4:5], FROZEN)
    assert fast.model.packed.owner() is late.pool
    engines[0].submit(PROMPTS[5], FROZEN)  # its pages were free, so it lost the storage; it comes back to it
    assert engines[0].run() == generate(tied, PROMPTS[5:6], FROZEN)
    assert fast.model.packed.owner() is engines[0].pool


def test_an_engine_that_was_given_up_blocks_nobody(tied):
    fast = graphed(tied, again)
    engine = Engine(fast)
    engine.submit(PROMPTS[0], FROZEN)
    engine.step()
    del engine
    assert fast.model.packed.owner() is None
    late = Engine(fast)
    late.submit(PROMPTS[1], FROZEN)
    assert late.run() == generate(tied, PROMPTS[1:2], FROZEN)
    assert fast.model.packed.owner() is late.pool


def test_a_pool_that_grows_drops_the_graphs(tied):
    fast = graphed(tied)
    generate(fast, PROMPTS[:1], FROZEN)
    small = captured(fast)
    many = [[9, *range(i)] for i in range(6)]
    assert generate(fast, many, FROZEN) == generate(tied, many, FROZEN)
    assert not {*small} & {*captured(fast)}
    assert generate(fast, PROMPTS[:1], FROZEN) == generate(tied, PROMPTS[:1], FROZEN)


@torch.inference_mode()
def test_weights_may_change_in_place_and_move(tied):
    fast, rows = graphed(tied), [(3, 5), (None, 2)]
    states = pass_over(fast, rows, 1)
    graphs = captured(fast)
    weight = fast.model.layers[0].mlp.down_proj.weight
    for moved in (False, True):
        if moved:
            weight.data = -2 * weight
        else:
            weight.mul_(-1)
        eager = copy.deepcopy(fast)
        del eager.model.packed
        new_states = pass_over(fast, rows, 1)
        assert not torch.allclose(new_states, states, atol=0.1)
        torch.testing.assert_close(new_states, pass_over(eager, rows, 1), atol=2e-5, rtol=1e-4)
        assert bool({*graphs} & {*captured(fast)}) != moved
        states = new_states


def test_guests_leave_the_pool(tied):
    fast = graphed(tied, again)
    engine = Engine(fast)
    for prompt in PROMPTS:
        engine.submit(prompt, FROZEN)
        engine.submit(prompt, MODES[0])
    engine.run()
    assert sorted(engine.pool.free) == [*range(engine.pool.pages)]
    del engine
    storage = [layer.data_ptr() for layer in fast.model.packed.storage.layers]
    generate(fast, PROMPTS, MODES[0])  # no row has a cache, so that nobody's pool takes them in
    assert [layer.data_ptr() for layer in fast.model.packed.storage.layers] == storage


@torch.inference_mode()
def test_another_kernel_is_another_graph(tied):
    fast = graphed(tied)
    for kernel in ("sdpa", "eager"):
        fast.set_attn_implementation(kernel)
        pass_over(fast, [(None, 5)], 1)
    assert len(captured(fast)) == 2


@torch.inference_mode()
def test_results_outlive_the_next_replay(tied):
    fast = graphed(tied)
    first, second = ([(None, 1)], 1), ([(None, 1)], 2)
    states = pass_over(fast, *first)
    kept = states.clone()
    assert not torch.equal(pass_over(fast, *second)[0], kept[0])
    assert len(captured(fast)) == 1
    torch.testing.assert_close(states, kept, rtol=0, atol=0)


def test_what_suits_no_bucket_goes_the_eager_way(tied):
    fast = graphed(tied, again, most_positions=64, most_graphs=1)
    passes, wanted = fast.model.packed, [np.array([0, 2])]
    ids = torch.arange(6, 11)
    with torch.no_grad():  # not in inference mode, so training and validation never come here
        passes(ids, Packing((5,)), wanted=wanted)
    with torch.inference_mode():
        for rows in ([(None, 65)], [(None, 1)] * 3):
            torch.testing.assert_close(pass_over(fast, rows, 1), pass_over(tied, rows, 1))
        torch.testing.assert_close(passes(ids, Packing((5,))), tied.model.packed(ids, Packing((5,))))
        moved = {"position_ids_T": torch.arange(3, 8), "wanted": wanted}
        torch.testing.assert_close(passes(ids, Packing((5,)), **moved), tied.model.packed(ids, Packing((5,)), **moved))
        with torch.autocast("cpu", torch.bfloat16):
            passes(ids, Packing((5,)), wanted=wanted)
        with pytest.raises(ValueError, match="the segments hold 4 tokens but 5 were given"):
            passes(ids, Packing((4,)), wanted=wanted)
        fast.model.train()
        passes(ids, Packing((5,)), wanted=wanted)
        assert not passes.steps
        fast.model.eval()
        pass_over(fast, [(None, 40)], 1)
        (bucket,) = passes.steps
        rows = [(None, 3)]  # one graph is all that it may have
        torch.testing.assert_close(pass_over(fast, rows, 1), pass_over(tied, rows, 1))
        assert [*passes.steps] == [bucket]


def test_a_copy_begins_without_graphs(tied):
    fast = graphed(tied)
    generate(fast, PROMPTS[:1], FROZEN)
    other = copy.deepcopy(fast)
    assert other.model.packed.model is other.model
    assert not other.model.packed.steps
    del other.model.packed
    assert other.model.packed.__func__ is IlladaModel.packed


def test_cuda_graphs_are_refused_where_there_is_no_cuda(tied):
    with pytest.raises(IlladaError, match="CUDA graphs need a model on one CUDA device, this one is on cpu"):
        use_cuda_graphs(tied)
    assert "packed" not in vars(tied.model)


def test_a_capture_warms_up_elsewhere_and_shares_memory(monkeypatch):
    """The calls to torch.cuda in their order: what they do is not tested here."""
    said = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    class Context:
        def __init__(self, *words):
            self.words = words

        def __enter__(self):
            said.append(f"begin {self.words[0]}")

        def __exit__(self, *_):
            said.append(f"end {self.words[0]}")

    class Graph:
        def pool(self):
            return "memory"

        def replay(self):
            said.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Context(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: Context(f"graph in {pool}"))
    first = CudaGraph(lambda: said.append("run") or "states", [])
    assert first() == "states"
    warm_up = ["run", "side waits for main", "begin side", "run", "run", "end side", "main waits for side"]
    assert said == [*warm_up, "begin graph in None", "run", "end graph in None", "replay"]
    said.clear()
    CudaGraph(lambda: said.append("run"), [first])
    assert said == [*warm_up, "begin graph in memory", "run", "end graph in memory"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_give_the_eager_tokens(build_model):
    model = build_model(tie=True, seed=3).cuda()
    wanted = generate(model, PROMPTS, MODES)
    use_cuda_graphs(model)
    for _ in range(2):
        assert generate(model, PROMPTS, MODES) == wanted
