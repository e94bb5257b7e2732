"""What does a training step cost beside the common practice: one document a row, padded, logits of every position?

    OMP_NUM_THREADS=1 python benchmarks/trainer.py [--preset 15m] [--vocab_size 32000] [--dtype bf16] [--steps 4]
        [--dllm CHECKOUT [--dllm_python PYTHON]]

Documents of mixed length (log-normal, median 150, at most 512 tokens). Both ways see the same documents and train the
same network by the same loss (Eq. 1) with AdamW. Ours: documents one after another in windows of 512, the head on
masked tokens only, in chunks. Common: rows padded to the longest of their batch, an attention mask, all logits at once.
dllm: its own trainer and network (`dllm_trainer.py`) under a Python that has what it pins, on padded rows as in its
fine-tuning and on windows as in its pre-training. A pass holds 16 windows or rows; "its passes": as many passes as the
common way makes. Tokens are those of documents, not of padding, seconds those of the processor (machines are shared).
Every way runs in processes of its own, in turns; peaks are of resident memory above that before the first step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

LONGEST, ROWS = 512, 16


def step_of(way, shape, dtype):
    """Return a function that makes one optimiser step over given documents, and the parameters of the network."""
    import torch
    import torch.nn.functional as F

    from illada.diffusion.loss import masked_loss
    from illada.model.attention import Packing
    from illada.model.config import IlladaConfig
    from illada.model.transformer import IlladaForMaskedLM

    model = IlladaForMaskedLM(IlladaConfig(**shape)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    mask_id = model.config.mask_token_id

    def autocast():
        return torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext()

    def noise(shape, p):
        return torch.rand(shape) < p

    def packed(documents):
        total = sum(map(len, documents))
        windows = torch.cat(documents).split(LONGEST)
        passes = -(-len(documents) // ROWS) if way == "ours, its passes" else -(-len(windows) // ROWS)
        size = -(-len(windows) // passes)
        for group in (windows[i : i + size] for i in range(0, len(windows), size)):
            lengths = sorted(map(len, group), reverse=True)
            clean_T = torch.cat(group)
            p_T = torch.cat([torch.full((n,), float(torch.rand(()) * 0.999 + 0.001)) for n in lengths])
            with autocast():
                loss = masked_loss(model, clean_T, noise(p_T.shape, p_T), 1 / p_T / total, Packing(tuple(lengths)))
            loss.backward()

    def padded(documents):
        total = sum(map(len, documents))
        for i in range(0, len(documents), ROWS):
            rows = documents[i : i + ROWS]
            clean_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
            kept_BL = torch.arange(clean_BL.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
            p_B1 = torch.rand(len(rows), 1) * 0.999 + 0.001
            masked_BL = noise(clean_BL.shape, p_B1) & kept_BL
            with autocast():
                logits_BLV = attend_padded(clean_BL.masked_fill(masked_BL, mask_id), kept_BL)
                loss_BL = F.cross_entropy(logits_BLV.float().transpose(1, 2), clean_BL, reduction="none")
                loss = (loss_BL * masked_BL / p_B1).sum() / total
            loss.backward()

    def attend_padded(ids_BL, kept_BL):
        # The same network with padding computed and masked in attention, as models written for padded batches do.
        from illada.model.transformer import rotary_angles, rotate

        trunk, config = model.model, model.config
        hidden = trunk.embed_tokens(ids_BL)
        rotary = rotary_angles(torch.arange(ids_BL.shape[1]), config.head_dim, config.rope_theta)
        for block in trunk.layers:
            attention = block.self_attn
            normal = block.input_layernorm(hidden)
            q, k, v = (
                getattr(attention, f"{name}_proj")(normal).unflatten(-1, (-1, config.head_dim)) for name in "qkv"
            )
            q, k, v = (x.transpose(1, 2) for x in (rotate(q, *rotary), rotate(k, *rotary), v))
            mask = kept_BL[:, None, None]
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
            hidden = hidden + attention.o_proj(seen.transpose(1, 2).flatten(2))
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return model.lm_head(trunk.norm(hidden))

    def step(documents):
        (padded if way == "common" else packed)(documents)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in model.parameters())


def run(way, shape, dtype, steps, dllm):
    """Time one way and print what it took as JSON."""
    import torch

    if dllm:
        import dllm_trainer

        windows = LONGEST if way == "dllm, windows" else None
        step, parameters = dllm_trainer.step_of(dllm, windows, shape, dtype, ROWS)
    else:
        step, parameters = step_of(way, shape, dtype)
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(steps + 1, 2 * ROWS, generator=generator) * 0.8).exp().mul(150).long().clamp(8, LONGEST)
    documents = [[torch.randint(10, shape["vocab_size"], (int(n),)) for n in row] for row in lengths]
    before = memory("VmRSS")
    step(documents[0][:4])
    started = time.process_time()
    for batch in documents[1:]:
        step(batch)
    seconds = time.process_time() - started
    results = {"tokens": int(lengths[1:].sum()), "seconds": seconds, "peak": memory("VmHWM") - before}
    print(json.dumps(results | {"parameters": parameters}))


def memory(name):
    """Return the resident memory of this process (VmRSS) or its peak (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def shape_of(preset, vocab_size):
    """Return the sizes and ids of a preset, which are all that another Python needs."""
    from illada.model.config import IlladaConfig

    values = IlladaConfig.preset(preset, vocab_size=vocab_size).to_dict()
    endings = ("_size", "_layers", "_heads", "_embeddings", "_theta", "_token_id")
    return {key: value for key, value in values.items() if key.endswith(endings)}


def timed(ways, shape, options):
    """Run every way in a process of its own, in turns; return what each round found, by the name of the way."""
    runs = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way, results in runs.items():
            theirs = way.startswith("dllm")
            job = {"way": way, "shape": shape, "dtype": options.dtype, "steps": options.steps}
            job |= {"dllm": options.dllm if theirs else ""}
            command = [options.dllm_python if theirs else sys.executable, __file__, "--run", json.dumps(job)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(said.splitlines()[-1]))
            print(way, results[-1], file=sys.stderr, flush=True)
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="15m")
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dllm", default="", help="checkout of dllm")
    parser.add_argument("--dllm_python", default=sys.executable, help="has transformers 4.57 and torchmetrics")
    parser.add_argument("--run", help="what one process shall measure, as JSON")
    args = parser.parse_args()
    if args.run:
        run(**json.loads(args.run))
        sys.exit()
    theirs = ("dllm", "dllm, windows") if args.dllm else ()
    runs = timed(("ours", "ours, its passes", "common", *theirs), shape_of(args.preset, args.vocab_size), args)
    print("| way | parameters | tokens/s | peak above start (MB) | ours: times as fast | ours: of the memory |")
    print("|---|---:|---:|---:|---:|---:|")
    for way, results in runs.items():
        pairs = list(zip(runs["ours"], results, strict=True))
        cells = [
            f"{results[0]['parameters']:,}",
            f"{statistics.median(run['tokens'] / run['seconds'] for run in results):,.0f}",
            f"{statistics.median(run['peak'] for run in results) / 1e6:,.0f}",
            f"{statistics.median(b['seconds'] / a['seconds'] for a, b in pairs):.2f}",
            f"{statistics.median(a['peak'] / b['peak'] for a, b in pairs):.2f}",
        ]
        print(f"| {way} | {' | '.join(cells)} |")
    print(f"\n{runs['ours'][0]['tokens']} tokens, {args.repeats} repeats")
