"""Groups of processes as torchrun would start them, forked from one process that has imported everything already.

Run as a script it trains one recipe in many ways and prints one JSON object; used by test_parallel.py. Arguments: a
recipe file, a folder for runs, and what to do. Nothing may be computed before the forks: threads do not survive them.
"""

import hashlib
import json
import os
import signal
import socket
import sys
from collections import defaultdict
from pathlib import Path

from illada import cli
from illada.training import trainer


def group(world, words, patch=lambda rank: None, said=None):
    """Run the command in `world` processes; returns their exit codes. `said` gets what all of them print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(world):
        if pid := os.fork():
            pids.append(pid)
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
        os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
        if said is not None:
            with open(said, "w" if rank == 0 else "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
        code = 0
        try:
            patch(rank)
            cli.main(words)
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    codes, waiting = {}, set(pids)
    while waiting:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        waiting.discard(pid)
        if codes[pid] < 0:  # as torchrun: one is killed, and the others with it
            for other in waiting:
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def record_noise(folder):
    """Write a hash of every segment that a process sees: step, ids, mask and weights."""

    def patch(rank):
        noisy_batches, seen = trainer.noisy_batches, defaultdict(list)

        def look(plan, size, shards, seed, step, *rest, **words):
            for batch in noisy_batches(plan, size, shards, seed, step, *rest, **words):
                if batch.weight_T.any():
                    columns = (batch.clean_T, batch.masked_T, batch.weight_T)
                    for parts in zip(*(x.split(batch.packing.lengths) for x in columns), strict=True):
                        whole = b"".join(x.numpy().tobytes() for x in parts)
                        seen[step].append(hashlib.sha256(whole).hexdigest())
                yield batch
            (folder / f"noise-{rank}.json").write_text(json.dumps(seen))

        trainer.noisy_batches = look

    return patch


def main():
    recipe, folder, runs = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    ends = {}
    for name, (world, command, *words) in runs.items():
        seen = folder / f"{name}-seen"
        seen.mkdir()
        said = seen / "said.txt"
        words = [command, recipe, "--output", f"{folder}/{name}", *words]
        codes = group(world, words, record_noise(seen), said)
        noise = defaultdict(list)
        for file in seen.glob("noise-*.json"):
            for step, hashes in json.loads(file.read_text()).items():
                noise[step] += hashes
        noise = {step: sorted(hashes) for step, hashes in noise.items()}
        ends[name] = {"codes": codes, "said": said.read_text(), "noise": noise}
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
