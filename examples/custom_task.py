"""Evaluate a model on a task of your own: questions in JSON Lines, and a description for lm-evaluation-harness.

    python examples/train_tiny.py              # makes a model, if you have none
    python examples/custom_task.py [FOLDER]    # a model folder

The task asks in which of four orders the months go on, and scores the four by confidence (paper Eq. 2). The script
prints the accuracy with its standard error. It needs pip install 'illada[eval]'. On the command line the same is
`illada eval --model FOLDER --task_files TASKS --output OUT`, where TASKS is the folder with the two files.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from illada.evaluation.harness import IlladaLM

TASK = """
task: order
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/order.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""

parser = argparse.ArgumentParser()
parser.add_argument("folder", nargs="?", default="runs/tiny/run/model")
arguments = parser.parse_args()

with tempfile.TemporaryDirectory() as tasks:
    # The questions: one JSON object a line, whose names the description uses in {{ }}.
    months = "january february march april may june july august september october november december"
    words = months.split()
    draw = random.Random(0)
    with open(Path(tasks, "order.jsonl"), "w") as file:
        for start in range(1, len(words) - 3):
            right = words[start:]
            choices = [" ".join(right[first:] + right[:first]) for first in range(4)]
            draw.shuffle(choices)
            record = {"question": words[start - 1], "choices": choices, "answer": choices.index(" ".join(right))}
            file.write(json.dumps(record) + "\n")
    Path(tasks, "order.yaml").write_text(TASK.replace("FOLDER", tasks))

    # The harness finds the task in its folder and asks the model.
    model = IlladaLM(arguments.folder)
    found = TaskManager(include_path=tasks, include_defaults=False)
    results = simple_evaluate(model, tasks=["order"], task_manager=found)

scores = results["results"]["order"]
print(f"accuracy {scores['acc,none']:.2f} ± {scores['acc_stderr,none']:.2f}; by chance 0.25")
