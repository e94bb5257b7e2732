"""What does quantising cost and give? Memory of loading, seconds of a forward pass and agreement with the unquantised
model, each way in a process of its own, in markdown. (benchmarks/int4_products.py compares kernels.)

    OMP_NUM_THREADS=1 python benchmarks/quantize.py --shape illada-8b --layers 4 [--saved]
    OMP_NUM_THREADS=1 python benchmarks/quantize.py --model FOLDER --text FILE

Random weights (--shape) tell nothing about agreement. Linux only: memory is read from /proc.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import machine, status
from torch import Tensor

from illada import IlladaConfig, IlladaForMaskedLM, rng
from illada.devices import choose_device
from illada.preparation.train_tokenizer import train_tokenizer
from illada.text.tokenizer import load_tokenizer
from illada.weights.export import export_model
from illada.weights.load import complete_ids, load_config, load_model

PLAIN = "unquantised"
WAYS = (PLAIN, "int8", "int4", "int8-bnb", "nf4")
BLOCK = 32  # rows that the head sees in a step of generation, where nothing else is said


@contextmanager
def anonymous_peak(peak: dict[str, float], name: str) -> Iterator[None]:
    """Note the most anonymous memory in GB added in the block; unlike mapped files it cannot be dropped."""
    before = status("RssAnon") / 1e9
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[name] = max(peak[name], status("RssAnon") / 1e9 - before)

    peak[name] = 0.0
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        peak[name] = max(peak[name], status("RssAnon") / 1e9 - before)


def stored_gigabytes(model: IlladaForMaskedLM) -> float:
    """Return the size of the weights as stored, scales included; a tied tensor counts once."""
    parts: dict[int, int] = {}

    def count(tensor: Any) -> None:
        names = getattr(tensor, "tensor_data_names", None)  # torchao's tensors hold others
        if names is not None:
            for name in (*names, *getattr(tensor, "optional_tensor_data_names", ())):
                if getattr(tensor, name) is not None:
                    count(getattr(tensor, name))
            return
        parts[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            count(state.absmax)

    for tensor in (*model.parameters(), *model.buffers()):
        count(tensor)
    for module in model.modules():
        if hasattr(module, "state") and module.state.SCB is not None:  # LLM.int8()
            count(module.state.SCB)
    return sum(parts.values()) / 1e9


def sample(config: IlladaConfig, folder: str, text: str | None, length: int) -> tuple[Tensor, Tensor]:
    """Return ids [L] of a text or random ones, each masked with probability one half, and where they are masked."""
    if text is None:
        ids = torch.tensor([int(rng.uniform_int(0, i) * (config.vocab_size - 10)) + 9 for i in range(length)])
    else:
        tokenizer = load_tokenizer(Path(folder))
        complete_ids(config, Path(folder), tokenizer)
        ids = torch.tensor(tokenizer.encode(Path(text).read_text(encoding="utf-8"))[:length])
        if len(ids) < length:
            raise SystemExit(f"{text} has {len(ids)} tokens, fewer than {length}")
    masked = torch.tensor([rng.uniform_int(1, i) < 0.5 for i in range(length)])
    return torch.where(masked, config.mask_token_id, ids), masked


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Load one way here, time forward passes, compare with the log-probabilities of the unquantised model."""
    device = choose_device(args.device)
    config = load_config(args.model)
    ids, masked = sample(config, args.model, args.text, max(args.lengths))
    results: dict[str, Any] = {}
    clock = time.process_time if device.type == "cpu" else time.perf_counter  # others may use the machine's processor
    start = time.process_time()
    with anonymous_peak(results, "load_peak"):
        way = None if args.way == PLAIN or args.saved else args.way
        model, _ = load_model(args.saved or args.model, "auto", args.device, way)
    results["load_seconds"] = time.process_time() - start
    with anonymous_peak(results, "run_peak"):
        for length in args.lengths:
            times = []
            for _ in range(args.repeats + 1):
                start = clock()
                hidden = model.model(ids[None, :length].to(device)).last_hidden_state[0]
                model.lm_head(hidden[-args.head :]).cpu()
                times.append(clock() - start)
            results["first_seconds"] = results.get("first_seconds", times[0])
            results[f"seconds_{length}"] = times[1:]
    logits = model.lm_head(model.model(ids[None].to(device)).last_hidden_state[0, masked.to(device)])
    log_p = logits.float().log_softmax(-1).cpu()
    if args.way == PLAIN:
        torch.save(log_p, args.reference)
    plain = torch.load(args.reference, mmap=True)
    results["top1"] = float((plain.argmax(-1) == log_p.argmax(-1)).float().mean())
    results["kl"] = float((plain.exp() * (plain - log_p)).sum(-1).mean())
    results["weights"], results["peak"] = stored_gigabytes(model), status("VmHWM") / 1e9
    results["gpu_peak"] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return results


def random_model(shape: str, layers: int | None, folder: str, **changes: int) -> None:
    """Write a bf16 model of that shape, with these changes of the configuration, with random weights."""
    changes |= {} if layers is None else {"num_hidden_layers": layers}
    config = IlladaConfig.preset(shape, **changes, dtype="bfloat16")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    IlladaForMaskedLM(config).save_pretrained(folder)
    train_tokenizer(["no text"], 280).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder with config.json and safetensors")
    parser.add_argument("--shape", default="illada-8b", help="preset to fill with random weights, without --model")
    parser.add_argument("--layers", type=int, help="fewer layers of that preset")
    parser.add_argument("--text", help="file whose beginning is the input; random ids without it")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 64, 256])
    parser.add_argument("--head", type=int, default=BLOCK, help="rows that the head sees")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="times that all ways are run, one after another")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--way", choices=WAYS, help="measure one way here, print JSON")
    parser.add_argument(
        "--saved",
        nargs="?",
        const="all",
        help="load what `illada export --quantize` wrote",
    )
    parser.add_argument("--reference", help="file of the unquantised log-probabilities, with --way")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as work:
        name = args.model
        if name is None:
            args.model, name = f"{work}/model", f"random {args.shape}"
            random_model(args.shape, args.layers, args.model)
        ways = [PLAIN, *(way for way in args.ways if way != PLAIN)]
        words = ["--model", args.model, "--repeats", str(args.repeats), "--device", args.device]
        words += ["--head", str(args.head), "--lengths", *map(str, args.lengths), "--reference", f"{work}/reference.pt"]
        words += ["--text", args.text] if args.text else []
        rows: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        failed: dict[str, str] = {}
        for _ in range(args.rounds):
            for way in (way for way in ways if way not in failed):
                print(way, file=sys.stderr)
                command = [sys.executable, __file__, "--way", way, *words]
                if args.saved and way != PLAIN:
                    if not os.path.exists(f"{work}/{way}"):
                        export_model(args.model, f"{work}/{way}", quantize=way)
                    command += ["--saved", f"{work}/{way}"]
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                if done.returncode:
                    failed[way] = done.stderr.strip().splitlines()[-1].partition(": ")[2]
                else:
                    rows[way].append(json.loads(done.stdout.splitlines()[-1]))
    config = load_config(args.model) if os.path.isdir(args.model) else None
    layers = args.layers if config is None else config.num_hidden_layers
    print(f"{machine()}, {args.device}; {name}", end="")
    print(f"{'' if layers is None else f', {layers} layers'}, ", end="")
    print(f"median of {args.repeats}, the best of {args.rounds} rounds\n")
    print("| weights | GB | load (s) | anonymous peak of loading (GB) | of running | VmHWM | first pass (s) |", end="")
    print("".join(f" s at {length} |" for length in args.lengths), "top-1 | KL (nats) |")
    print("|---" * (9 + len(args.lengths)) + "|")
    for way, runs in rows.items():
        if way in failed:
            print(f"| {way} | {failed[way]} |")
            continue
        cells = [
            f"{statistics.median(run[key] for run in runs):.2f}" for key in ("weights", "load_seconds", "load_peak")
        ]
        cells += [f"{max(run['run_peak'] for run in runs):.2f}", f"{max(run['peak'] for run in runs):.1f}"]
        cells.append(f"{min(run['first_seconds'] for run in runs):.2f}")
        for length in args.lengths:
            # The quieter round: others may use the machine.
            cells.append(f"{min(statistics.median(run[f'seconds_{length}']) for run in runs):.3f}")
        print("|", " | ".join([way, *cells, f"{runs[0]['top1']:.3f}", f"{runs[0]['kl']:.2g}"]), "|", flush=True)


if __name__ == "__main__":
    main()
