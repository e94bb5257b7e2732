"""Runs in a Python that has llama-cpp-python: logits of all positions of a sequence, and the ids of some texts.

    python llama_cpp_logits.py MODEL.gguf '{"ids": [...], "texts": [...]}' LOGITS.npy

Prints the ids of the texts as JSON. It imports nothing of this package.
"""

import ctypes
import json
import sys

import llama_cpp as llama
import numpy as np


def main(file: str, asked: str, output: str) -> None:
    ids, texts = json.loads(asked)["ids"], json.loads(asked)["texts"]
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
    vocab = llama.llama_model_get_vocab(model)
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(ids)
    # Its flash attention on a CPU rounds keys and values to fp16.
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_threads = params.n_threads_batch = 1
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, number in enumerate(ids):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = number, place, 1, 1
        batch.seq_id[place][0] = 0
    assert llama.llama_decode(context, batch) == 0
    size = llama.llama_vocab_n_tokens(vocab)
    logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids), size))
    np.save(output, logits)
    found = []
    for text in texts:
        raw, room = text.encode(), (llama.llama_token * 4096)()
        count = llama.llama_tokenize(
            vocab, raw, len(raw), ctypes.cast(room, ctypes.POINTER(llama.llama_token)), 4096, False, True
        )
        found.append(room[:count])
    special = {
        "mask": llama.llama_vocab_mask(vocab),
        "bos": llama.llama_vocab_bos(vocab),
        "eos": llama.llama_vocab_eos(vocab),
    }
    print(json.dumps({"texts": found, "diffusion": llama.llama_model_is_diffusion(model), **special}))


main(*sys.argv[1:])
