"""Passes over static buffers against the eager ones, with a recorder in the place of CUDA graphs.

The recorder is as blind as a graph: a replay repeats the recorded operations on the recorded tensors, and whatever the
host decided at the capture stays as it was.
"""

import copy
import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def graphed(model, graph=Recorded, **limits):
    """A copy of a model that runs its passes by graphs."""
    model = copy.deepcopy(model)
    model.model.packed = GraphedPasses(model.model, graph, **limits)
    return model


if __name__ == "__main__":
    pass
