"""Check the outcome of a quick demo: `python tests/check_demo.py runs/quick`."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

# Lowest accuracy that counts as learned, and how many must be; docs/log.md has the runs this was chosen from.
LEARNED = {"shift": 0.6, "capitals": 0.6, "library, 4 choices": 0.34}
ENOUGH = 2


def main(run: Path) -> int:
    results = json.loads((run / "results.json").read_text())
    bits = results["text"]["bits_per_byte"]
    most = max(row["steps_per_block"] for row in results["frontier"])
    accuracy = {row["task"]: row["accuracy"] for row in results["frontier"] if row["steps_per_block"] == most}
    accuracy["library, 4 choices"] = results["choice"]["confidence"]["accuracy"]
    missed = [f"{task} {accuracy[task]:.0%} < {least:.0%}" for task, least in LEARNED.items() if accuracy[task] < least]
    wrong = missed if len(LEARNED) - len(missed) < ENOUGH else []
    if bits["model"] >= bits["unigram"]:
        wrong.append(f"text {bits['model']} bits per byte, not below the unigram model's {bits['unigram']}")
    for row in results["harness"] or []:  # the same problems, so the same figures
        own = accuracy["library, 4 choices" if row["metric"] == "acc" else row["task"]]
        if abs(row["value"] - own) > 0.021:  # one of fifty, by rounding
            wrong.append(f"{row['task']}: {row['value']:.0%} in the harness, {own:.0%} without")
    if results["harness"] is None and find_spec("lm_eval"):
        wrong.append("the harness was left out")
    for name in ("report.md", "report.html", "model/model.safetensors", "images/denoising.png", "images/frontier.png"):
        if not (run / name).is_file():
            wrong.append(f"{name} is missing")
    print(f"demo check: {', '.join(wrong) or 'passed'}  text {bits}  accuracy {accuracy}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
