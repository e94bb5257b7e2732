"""Train a tiny masked diffusion model from raw text, in Python, in half a minute on a laptop.

    python examples/train_tiny.py [FOLDER] [STEPS]      # runs/tiny and 600 unless told otherwise

The text is made here: the days, the months, numbers and letters, each line from some word to the end of its series.
The script prints what the model makes of the first two words of some lines, and how many of all lines it completes
correctly: about nine in ten. The folder gets the text, a tokenizer, token shards and the training run. Run again with
the same number of steps, the script continues where it was.
"""

import argparse
from pathlib import Path

import illada
from illada.preparation.options import PrepareSettings
from illada.preparation.prepare import prepare
from illada.preparation.train_tokenizer import train_tokenizer
from illada.training.recipe import DataRecipe, ModelRecipe, Recipe, TrainingRecipe
from illada.training.trainer import train

parser = argparse.ArgumentParser()
parser.add_argument("folder", nargs="?", type=Path, default="runs/tiny")
parser.add_argument("steps", nargs="?", type=int, default=600)
arguments = parser.parse_args()
folder, steps = arguments.folder, arguments.steps
folder.mkdir(parents=True, exist_ok=True)

# 1. Text: every line is a document.
series = [
    "monday tuesday wednesday thursday friday saturday sunday",
    "january february march april may june july august september october november december",
    "zero one two three four five six seven eight nine ten eleven twelve",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
]
lines = [" ".join(words[start:]) for words in map(str.split, series) for start in range(len(words) - 1)]
text = folder / "text.txt"
if not text.exists():
    text.write_text("\n".join(lines * 50))

# 2. A tokenizer, trained on the text.
train_tokenizer(lines, vocab_size=512).save_pretrained(folder / "tokenizer")

# 3. Token shards, which training reads.
prepare(
    PrepareSettings(
        sources=[str(text)],
        output=str(folder / "data"),
        tokenizer=str(folder / "tokenizer"),
        documents="line",
    )
)

# 4. Training. A recipe in Python has the fields of the recipes in recipes/.
recipe = Recipe(
    output=str(folder / "run"),
    model=ModelRecipe(preset="1m", hidden_size=64, intermediate_size=128, num_hidden_layers=2),
    data=DataRecipe(train=str(folder / "data"), window=64),
    training=TrainingRecipe(
        steps=steps,
        samples_per_step=32,
        samples_per_batch=32,
        learning_rate=3e-3,
        final_learning_rate=1e-4,
        warmup_steps=steps // 20,
        decay_steps=steps // 2,
        dtype="fp32",
    ),
)
run = train(recipe)

# 5. Generation: blocks of masks are appended to each prompt and denoised until the answer ends.
model, tokenizer = illada.load_model(str(run.model))
settings = illada.GenerationSettings(max_new_tokens=32, block_length=8)
prompts = [" ".join(line.split()[:2]) for line in lines]
answers = illada.generate(model, prompts, settings, tokenizer=tokenizer)
completed = [prompt + answer.text for prompt, answer in zip(prompts, answers, strict=True)]
for line in completed[::7]:
    print(line)
correct = sum(a == b for a, b in zip(completed, lines, strict=True))
print(f"{correct} of {len(lines)} lines completed correctly; the model is in {run.model}")
