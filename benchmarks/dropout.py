"""What do keyed dropout and an average of the weights cost a step? Beside torch's own dropout at the same places.

    OMP_NUM_THREADS=1 python benchmarks/dropout.py

Paired: every round takes a step in each way. Windows have 256 tokens.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from common import machine
from torch import Tensor, nn

from illada.diffusion.loss import masked_loss
from illada.model.attention import Packing
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.training.optional.average import Average
from illada.training.optional.dropout import Dropout

RATE = 0.1
WAYS = ("plain", "keyed", "torch", "average")


def torch_dropout(_: nn.Module, __: Any, branch_TD: Tensor) -> Tensor:
    return nn.functional.dropout(branch_TD, RATE)


def measure(preset: str, windows: int, rounds: int, device: torch.device) -> None:
    torch.manual_seed(0)
    length = windows * 256
    models = {name: IlladaForMaskedLM(IlladaConfig.preset(preset)).to(device).train() for name in WAYS}
    for block in models["torch"].model.layers:
        for module in (block.self_attn.o_proj, block.mlp):
            module.register_forward_hook(torch_dropout)
    averages = {name: Average(dict(models[name].named_parameters()), 0.9999 * (name == "average")) for name in WAYS}
    dropouts = {name: Dropout(models[name], RATE * (name == "keyed"), 0) for name in WAYS}
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    clean_T, places = torch.randint(8, 4096, (length,), device=device), [torch.arange(length)] * 4
    masked_T, weight_T = torch.rand(length, device=device) < 0.5, torch.full((length,), 1 / length, device=device)
    packing = Packing((256,) * windows)

    def step(name: str) -> float:
        begun = time.perf_counter()
        dropouts[name].begin(places, device)
        masked_loss(models[name], clean_T, masked_T, weight_T, packing).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        averages[name].update(10)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    taken = [{name: step(name) for name in WAYS} for _ in range(rounds + 1)][1:]
    plain = statistics.median(seconds["plain"] for seconds in taken)
    ratios = {n: statistics.median(s[n] / s["plain"] for s in taken) - 1 for n in WAYS if n != "plain"}
    print(f"{preset}: plain {plain:.3f} s; " + ", ".join(f"{name} {ratio:+.1%}" for name, ratio in ratios.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["1m", "15m"])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(machine())
    for preset in args.presets:
        measure(preset, args.windows, args.rounds, torch.device(args.device))


if __name__ == "__main__":
    main()
