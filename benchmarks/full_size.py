"""Does a folder in the released iLLaDA layout load at full size, how fast, and with how much memory?

    python benchmarks/full_size.py make FOLDER                # 8B shape, random bf16, sharded: 16.5 GB of disk
    python benchmarks/full_size.py run FOLDER [--tokens 32] [--quantize int8]
    python benchmarks/full_size.py compare FOLDER [--prompt 128] [--block 4] [--repeats 2]

`run` loads the folder as `illada generate` does and generates. It prints bytes of weights, seconds, and the peaks of
resident memory: in all, and without the pages of the weight files (bf16 weights on a CPU are mapped from the files, not
copied; such pages can be taken back by the system at any time). `compare` times one block of our exact decoding and of
the paper's loop written plainly (all logits of all positions), in turns.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

GB = 1e9


def make(folder: Path, layers: int) -> None:
    import torch

    from released import write_released

    kept = {}

    def tensor(name, shape):
        if name == "lm_head.weight":
            return kept["embedding"]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        drawn = torch.empty(shape, dtype=torch.bfloat16)
        for rows in drawn.split(8192):  # fp32 noise for all of a matrix would be twice its size
            rows.copy_(torch.randn(rows.shape).mul_(0.02))
        if name == "model.embed_tokens.weight":
            kept["embedding"] = drawn
        return drawn.clone() if name == "model.embed_tokens.weight" else drawn

    shape = {"vocab": 155_136, "width": 4096, "inner": 14_336, "heads": 32, "kv_heads": 8, "context": 8192}
    started = time.monotonic()
    write_released(folder, "illada", tensor, **shape, layers=layers, per_shard=4_900_000_000, tokenizer_vocab=300)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{size / GB:.2f} GB of tensors in {folder}, {time.monotonic() - started:.0f} s")


def run(folder: Path, tokens: int, quantize: str | None, block: int, steps: int | None) -> None:
    from common import status
    from quantize import anonymous_peak, stored_gigabytes

    from illada import GenerationSettings, generate
    from illada.text.prompts import encode_plain
    from illada.weights.load import load_model

    peak: dict[str, float] = {}
    with anonymous_peak(peak, "all"):
        started = time.monotonic()
        with anonymous_peak(peak, "load"):
            model, tokenizer = load_model(str(folder), **({"quantize": quantize} if quantize else {}))
        loaded, high = time.monotonic() - started, status("VmHWM") / GB
        print(f"parameters         {sum(p.numel() for p in model.parameters()):,}")
        print(f"weights            {stored_gigabytes(model):6.2f} GB as stored in memory ({quantize or model.dtype})")
        print(f"load               {loaded:6.1f} s   peak resident {high:.2f} GB, not file {peak['load']:.2f} GB")
        settings = GenerationSettings(
            max_new_tokens=tokens, block_length=block, steps_per_block=steps, eos_token_id=None
        )
        started = time.monotonic()
        answer = generate(model, [encode_plain(tokenizer, "one two three four")], settings)[0]
        seconds = time.monotonic() - started
        mean = seconds / answer.forwards
        print(f"answer             {seconds:6.1f} s   {tokens} tokens, {answer.forwards} forwards, {mean:.2f} s each")
    print(f"peak resident      {status('VmHWM') / GB:6.2f} GB, not file {peak['all']:.2f} GB")


def compare(folder: Path, prompt: int, block: int, repeats: int) -> None:
    import torch

    from illada import GenerationSettings
    from illada.bench.measure import measure
    from illada.bench.samplers import engine_samplers, plain_sampler
    from illada.weights.load import load_model

    model, _ = load_model(str(folder))
    exact = GenerationSettings(max_new_tokens=block, block_length=block, eos_token_id=None)
    ids = torch.randint(10, 300, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    samplers = [plain_sampler(model, exact), engine_samplers(model, exact, 1)[0][0]]
    plain, ours = measure(model, samplers, [ids], repeats)
    for name, row in (("plain loop", plain), ("ours", ours)):
        work = row.work
        seconds = " ".join(f"{x:.1f}" for x in row.seconds)
        print(
            f"{name:<10} {seconds} s, {work.forwards} forwards, {work.positions} positions, "
            f"{work.head_positions} in the head"
        )
    ratios = " ".join(f"{a / b:.3f}" for a, b in zip(plain.seconds, ours.seconds, strict=True))
    print(f"plain / ours {ratios}; the same tokens: {plain.answers[0].ids == ours.answers[0].ids}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--steps", type=int, help="forwards of a block; one a token without it")
    parser.add_argument("--quantize")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.layers)
    elif args.what == "compare":
        compare(args.folder, args.prompt, args.block, args.repeats)
    else:
        run(args.folder, args.tokens, args.quantize, args.block, args.steps)
