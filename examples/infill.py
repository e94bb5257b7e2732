"""Fill gaps anywhere in a text: all of them are open at once, and the model sees what stands before and behind them.

    python examples/train_tiny.py                         # makes a model, if you have none
    python examples/infill.py [FOLDER] [TEXT] [TOKENS]    # a model folder, a text with gaps ___, tokens in each gap

It prints the text with its gaps filled, then each filled token with its log probability when it was chosen.
"""

import argparse

import illada
from illada.text.prompts import encode_template

parser = argparse.ArgumentParser()
parser.add_argument("folder", nargs="?", default="runs/tiny/run/model")
parser.add_argument("text", nargs="?", default="monday___ wednesday___ friday saturday sunday")
parser.add_argument("tokens", nargs="?", type=int, default=1)
arguments = parser.parse_args()

model, tokenizer = illada.load_model(arguments.folder)

# A template is a list of token ids, with None for every token to fill in.
template = encode_template(tokenizer, arguments.text, arguments.tokens)
filled = illada.infill(model, [template], illada.GenerationSettings(), tokenizer=tokenizer)[0]

print(tokenizer.decode(filled.ids, skip_special_tokens=True))
slots = [position for position, token in enumerate(template) if token is None]
for position, log_prob in zip(slots, filled.log_probs, strict=True):
    print(f"token {position}: {tokenizer.decode([filled.ids[position]])!r}, log probability {log_prob:.2f} nats")
