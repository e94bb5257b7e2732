"""Runs in a Python that has llama-cpp-python, for `benchmarks/peers.py`: loads a file and passes ids through it.

    python llama_cpp_pass.py pass MODEL.gguf '{"ids": [...], "lengths": [64, 256], "repeats": 3, "logits": "FILE.npy"}'
    python llama_cpp_pass.py quantise MODEL.gguf Q4_K_M.gguf

A pass is one whole sequence on one thread, in which every position sees every other, with the logits of all positions;
those of the longest go into the file. Prints processor seconds, and what llama.cpp was built with, as JSON. It imports
nothing of this package.
"""

import ctypes
import json
import sys
import time

import llama_cpp as llama
import numpy as np


def batch_of(ids):
    """Return a batch of one sequence that asks for the logits of every position."""
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, number in enumerate(ids):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = number, place, 1, 1
        batch.seq_id[place][0] = 0
    return batch


def logits_of(context, batch, vocab):
    """Return logits [L, V] of a pass, which are computed when they are asked for."""
    assert llama.llama_decode(context, batch) == 0
    return np.ctypeslib.as_array(llama.llama_get_logits(context), (batch.n_tokens, vocab))


def passes(file, ids, lengths, repeats, logits=None):
    """Return the seconds of loading, of the first pass, and of the later ones by length."""
    started = time.process_time()
    model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(lengths)
    # Its flash attention on a CPU rounds keys and values to fp16.
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_threads = params.n_threads_batch = 1
    context = llama.llama_init_from_model(model, params)
    results = {"load_seconds": time.process_time() - started, "built": built()}
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    for length in lengths:
        batch, times = batch_of(ids[:length]), []
        for _ in range(repeats + 1):
            started = time.process_time()
            found = logits_of(context, batch, vocab)
            times.append(time.process_time() - started)
        results.setdefault("first_seconds", times[0])
        results[f"seconds_{length}"] = times[1:]
    if logits:
        np.save(logits, found)
    return results


def built():
    """Return the names of what this build uses of the processor; without LLAMAFILE its products take far longer."""
    parts = llama.llama_print_system_info().decode().replace("CPU : ", "").split(" | ")
    return [name for name, _, value in (part.partition(" = ") for part in parts) if value == "1"]


def quantise(file, output):
    """Write the model again in llama.cpp's Q4_K_M."""
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    assert llama.llama_model_quantize(file.encode(), output.encode(), ctypes.byref(params)) == 0


if __name__ == "__main__":
    do, file, asked = sys.argv[1:]
    llama.llama_backend_init()
    if do == "quantise":
        quantise(file, asked)
    else:
        print(json.dumps(passes(file, **json.loads(asked))))
