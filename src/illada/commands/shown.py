"""What `--help` shows of the commands with many options, and which commands take the model without its flag."""

_RECIPE = (
    "config output data.train data.validation data.window training.epochs training.steps training.samples_per_step "
    "training.learning_rate training.warmup_steps training.device"
)
_DECODING = "model max_new_tokens block_length steps_per_block threshold temperature seed device"
SHOWN = {
    "pretrain": f"model.preset model.start {_RECIPE}",
    "sft": f"model.start lora.rank {_RECIPE}",
    "dpo": f"model.start lora.rank dpo.beta dpo.samples {_RECIPE}",
    "rl": (
        "config output model.start lora.rank data.train data.window training.steps training.samples_per_step "
        "training.learning_rate training.device rl.method rl.tasks rl.reward rl.answers rl.settings"
    ),
    "distill": (
        "config output model.start lora.rank data.train data.validation data.window training.epochs "
        "training.samples_per_step training.learning_rate training.device distill.tasks distill.problems "
        "distill.reward distill.settings distill.masks distill.thresholds"
    ),
    "estimate": f"model.preset {_RECIPE} gpus gpu price command json",
    "generate": f"{_DECODING} prompt file chat slot_tokens json picture cache quantize",
    "chat": f"{_DECODING} system cache quantize",
    "serve": f"{_DECODING} host port replicas quantize",
    "eval": "model output paper task_files tasks limit chat shots settings run download device",
    "prepare": "sources output tokenizer kind text_field documents workers dedup filters",
}
"""The options that matter first, of commands that have many; `--help_all` shows all."""

TAKES_MODEL = ("generate", "chat", "score", "serve", "eval", "export")
"""Commands whose first word may be the model, without `--model`."""

TAKES_RECIPE = ("pretrain", "sft", "dpo", "rl", "distill", "estimate")
"""Commands whose first word may be the recipe, without `--config`."""


def usage(command: str) -> str:
    """Return the line of usage of a command in `SHOWN`."""
    first = "MODEL" if command in TAKES_MODEL else "[RECIPE]" if command in TAKES_RECIPE else "FILE_OR_FOLDER ..."
    return f"illada {command} {first} [--OPTION VALUE ...]"
