"""The command line: builds the parser from the functions in `commands`, and turns every error into one line.

A parameter of a command becomes an option of its name with its type, default and docstring. A dataclass gives one
option for each of its fields. A list takes several words; one without a default stands without a flag, and so does a
parameter before `/`. A `Recipe` may also come from a YAML file. Options may be written with hyphens. Exit code 2 is
bad input, 1 a run that failed.
"""

import dataclasses
import difflib
import functools
import inspect
import os
import re
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

# Keeps tokenizers from advising about processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import yaml
from docstring_parser import parse
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, get_loader, set_loader
from wrapt import register_post_import_hook

from illada.commands import bench, data, demo, doctor, evaluation, generation, scoring, serving, training, weights
from illada.commands.recipes import recipe_file
from illada.commands.shown import SHOWN, TAKES_MODEL, TAKES_RECIPE, usage
from illada.errors import DivergedError, IlladaError, first_line, needs
from illada.files import check_yaml
from illada.heap import keep_freed_memory
from illada.post_training.options import DISTILL_DEFAULTS, DPO_DEFAULTS, RL_DEFAULTS
from illada.training.recipe import SFT_DEFAULTS, Recipe

Command = Callable[..., None]


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print what makes a shell complete commands, options and their values.

    Args:
        shell: which shell. For bash or zsh, put this into .bashrc or .zshrc: eval "$(illada completion bash)". For
            fish: illada completion fish > ~/.config/fish/completions/illada.fish.
    """
    with needs("completion", "completion"):
        import shtab

    parser = _build([])
    commands = [*parser._commands().values()]
    for command in [*commands, *commands[-1]._commands().values()]:  # the last is bench
        for action in command._actions:
            hint = getattr(action, "_typehint", None) or action.type
            kinds = (hint, *get_args(hint))
            if choices := [kind for kind in kinds if get_origin(kind) is Literal]:
                action.choices = get_args(choices[0])
            elif bool in kinds:
                action.choices = ("true", "false")
            elif str in kinds:
                action.complete = shtab.FILE
    print(shtab.complete(parser, shell))


COMMANDS: dict[str, Command | dict[str, Command]] = {
    "demo": demo.demo,
    "tokenizer": data.tokenizer,
    "prepare": data.prepare,
    "pretrain": training.pretrain,
    "sft": training.sft,
    "dpo": training.dpo,
    "rl": training.rl,
    "distill": training.distill,
    "estimate": training.estimate,
    "report": training.report,
    "generate": generation.generate,
    "chat": generation.chat,
    "score": scoring.score,
    "serve": serving.serve,
    "batch": serving.batch,
    "eval": evaluation.evaluate,
    "compare": evaluation.compare,
    "export": weights.export,
    "convert": weights.convert,
    "verify": weights.verify,
    "doctor": doctor.doctor,
    "completion": completion,
    "bench": {"generate": bench.generate, "serve": bench.serve},
}
DEFAULTS = {"sft": SFT_DEFAULTS, "dpo": DPO_DEFAULTS, "rl": RL_DEFAULTS, "distill": DISTILL_DEFAULTS}
"""What commands change in TrainingRecipe."""
FROM_THE_MODEL = {"eos_token_id"}
"""Settings that a command takes from the model."""

LONGEST_LINE = 1000
"""Characters of an error; a name that somebody gave may be longer."""


class _Option(NamedTuple):
    """A parameter of a command, or a field of a dataclass among them."""

    name: str
    kind: Any
    default: Any
    """`inspect.Parameter.empty` where a value is required."""
    text: str
    positional: bool
    item: Any
    """The type of one word, where the option takes several; else None."""

    @property
    def flag(self) -> str:
        """The option on the command line; a word that Python keeps for itself has `_` behind it here, as `from_`."""
        return self.name if self.positional else f"--{self.name.rstrip('_')}"


def _is_options(kind: Any) -> bool:
    """Say whether a parameter stands for several options."""
    return dataclasses.is_dataclass(kind)


def _options(source: Callable[..., Any]) -> list[_Option]:
    """Return what a function or dataclass takes, in order."""
    hints = get_type_hints(source)
    documented = parse(source.__doc__ or "").params
    texts = {entry.arg_name: " ".join((entry.description or "").split()) for entry in documented}
    options = []
    for name, parameter in inspect.signature(source).parameters.items():
        lists = [kind for kind in (hints[name], *get_args(hints[name])) if get_origin(kind) in (list, Sequence)]
        item = get_args(lists[0])[0] if lists else None
        required_list = item is not None and parameter.default is parameter.empty
        positional = parameter.kind is parameter.POSITIONAL_ONLY or required_list
        options.append(_Option(name, hints[name], parameter.default, texts.get(name, ""), positional, item))
    return options


def _add_options(parser: ArgumentParser, command: Command, defaults: Mapping[str, Any]) -> None:
    """Give a command's parser its options; `defaults` are those of the recipe."""
    for option in _options(command):
        if isinstance(option.kind, type) and issubclass(option.kind, Recipe):
            text = "recipe: a YAML file, or one of ours by name (tiny-cpu-pretrain); may come first, without the flag"
            parser.add_argument("--config", action=ActionConfigFile, help=text)
            parser.add_class_arguments(option.kind)
            parser.set_defaults(dict(defaults))
        elif _is_options(option.kind):
            several = [field for field in _options(option.kind) if field.item]
            for field in several:
                _add_option(parser, field)
            parser.add_class_arguments(option.kind, skip={field.name for field in several} | FROM_THE_MODEL)
        else:
            _add_option(parser, option)


def _add_option(parser: ArgumentParser, option: _Option) -> None:
    # Not add_function_arguments: it looks for the function among the public names, which would load what they need.
    keywords: dict[str, Any] = {"type": option.item or option.kind, "help": option.text}
    if option.item:
        keywords["nargs"] = "+"
    elif not option.positional:
        required = option.default is inspect.Parameter.empty
        keywords |= {"dest": option.name} | ({"required": True} if required else {"default": option.default})
    parser.add_argument(option.flag, **keywords)


def _commands_for(words: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return the commands, and what an estimate is for; its recipe is that command's."""
    pairs = pairwise(
        part for word in words for part in (word.split("=", 1) if word.startswith("--command") else [word])
    )
    subject = next((name for flag, name in pairs if flag == "--command" and name in TAKES_RECIPE), "pretrain")
    kind = get_type_hints(COMMANDS[subject])["recipe"]
    known: Any = COMMANDS["estimate"]

    @functools.wraps(known)
    def estimate(*words: Any, **named: Any) -> None:
        known(*words, **named)

    estimate.__annotations__ = {**known.__annotations__, "recipe": kind}
    return {**COMMANDS, "estimate": estimate}, subject


def _build(words: Sequence[str]) -> "_Parser":
    """Return the parser for these words; the recipe's defaults depend on the command."""
    choices, subject = _commands_for(words)
    parser = _Parser(
        prog="illada",
        version=version("illada"),
        description="Train, tune, run and score masked diffusion language models.",
    )
    changed = {name: {f"training.{key}": v for key, v in values.items()} for name, values in DEFAULTS.items()}

    def add(parent: ArgumentParser, commands: Mapping[str, Any], metavar: str) -> None:
        subcommands = parent.add_subcommands(required=True, metavar=metavar)
        for name, command in commands.items():
            text = "Measure this package." if isinstance(command, dict) else (command.__doc__ or "").partition("\n")[0]
            child = _Parser(description=text)
            if "--help_all" not in words and parent is parser:
                child.short = name if name in SHOWN else None
            subcommands.add_subcommand(name, child, help=text)
            if isinstance(command, dict):
                add(child, command, "WHAT")
            else:
                _add_options(child, command, changed.get(subject if name == "estimate" else name, {}))

    add(parser, choices, "COMMAND")
    return parser


def _call(command: Command, arguments: Namespace) -> None:
    """Call a command with what was parsed; a list that was not given has the command's own default."""
    words: list[Any] = []
    named: dict[str, Any] = {}
    for option in _options(command):
        if _is_options(option.kind):
            fields = (field for field in _options(option.kind) if _is_given(field, arguments))
            named[option.name] = option.kind(**{field.name: arguments[field.name] for field in fields})
        elif option.positional and not option.item:
            words.append(arguments[option.name])
        elif _is_given(option, arguments):
            named[option.name] = arguments[option.name]
    command(*words, **named)


def _is_given(option: _Option, arguments: Namespace) -> bool:
    return option.name in arguments and not (option.item and arguments[option.name] is None)


class _Parser(ArgumentParser):
    """Turns what jsonargparse says about bad input into one line for people, and shortens the help of long commands."""

    short: str | None = None
    """The name of a command of which the help shows only the options in `SHOWN`."""

    def format_help(self) -> str:
        if self.short is None:
            return super().format_help()
        shown = {*SHOWN[self.short].split(), "help"}
        hidden = [action for action in self._actions if action.dest not in shown]
        texts = [action.help for action in hidden]
        for action in hidden:
            action.help = SUPPRESS
        self.usage, self.epilog = usage(self.short), f"{len(hidden)} more: illada {self.short} --help_all"
        if self.short in TAKES_RECIPE:
            self.epilog += "; --print_config prints the recipe with every key"
        try:
            return super().format_help()
        finally:
            for action, text in zip(hidden, texts, strict=True):
                action.help = text

    def error(self, message: str, ex: Exception | None = None) -> Any:
        line = " ".join(str(message).split())
        raise IlladaError(self._plainly(line)[:400]) from ex

    def _plainly(self, line: str) -> str:
        if match := re.fullmatch(r"the following arguments are required: (.*)", line):
            missing = ", ".join(self._said(name.split(".", 1)[-1]) for name in match[1].split(", "))
            return f"missing: {missing} (--help explains them)"
        if match := re.fullmatch(r'Parser key "config": File does not exist: (.*)', line):
            return f"no recipe at {match[1]}"
        if match := re.fullmatch(r'Parser key "([^"]*)"(?: element \d+)?: (.*?)(?:Got value|Given value): ?(.*)', line):
            return f"{match[1]} is {match[3]!r}: it must be {_wanted(match[2])}"
        if match := re.fullmatch(r"unrecognized arguments: (\S+).*", line):
            return f"unknown option {match[1]}{self._nearest(match[1])}"
        if match := re.fullmatch(r"Subcommand '(\w+)' does not accept option '(\S+)'", line):
            return f"unknown key {match[2]} in the recipe{self._nearest(match[2])}"
        if line.startswith("Unexpected config"):
            return f"the recipe must hold lines of `key: value`; it begins with {line[18:60].strip()!r}"
        if line.startswith("Problems parsing config: "):
            return "the recipe is not YAML: " + line[25:].replace(' in "<unicode string>",', " at")
        if match := re.match(r'Parser key "([^"]*)": Unable to load config', line):
            return f"{match[1]} has keys of its own: give them one by one, as --{match[1]}.KEY VALUE (see --help)"
        if match := re.fullmatch(r'expected "(\w+)\.subcommand" to be one of \{(.*?)\}.*', line):
            return f"what to {match[1]} is missing or unknown: choose {match[2].replace(',', ' or ')}"
        if match := re.fullmatch(r"argument COMMAND: invalid choice: '(.*)' \(choose from (.*)\)", line):
            names = re.findall(r"'(\w+)'", match[2])
            close = difflib.get_close_matches(match[1], names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose {', '.join(names)}"
            return f"no command {match[1]!r}: {hint}"
        if match := re.fullmatch(r"argument (\S+): expected (?:one|at least one) argument", line):
            return f"{match[1]} needs a value"
        return line

    def _said(self, name: str) -> str:
        """Return how a person gives what the parser calls `name`."""
        if name == "sources":
            return "files or folders to read"
        parsers = [self, *self._commands().values()]
        flags = (action.option_strings for parser in parsers for action in parser._actions if action.dest == name)
        return next((flag[0] if flag else name for flag in flags), f"--{name}")

    def _commands(self) -> dict[str, ArgumentParser]:
        return next((action.choices for action in self._actions if isinstance(action.choices, dict)), {})

    def _nearest(self, name: str) -> str:
        """Return a hint at the option, of any command, that `name` was probably meant to be."""
        parsers = [self, *self._commands().values()]
        options = {option for parser in parsers for action in parser._actions for option in action.option_strings}
        close = difflib.get_close_matches(f"--{name.lstrip('-')}", sorted(options), n=1, cutoff=0.7)
        return f": did you mean {close[0][0 if name.startswith('-') else 2 :]}?" if close else " (see --help)"


def _wanted(types: str) -> str:
    """Say what a value must be, given how jsonargparse names its type."""
    if match := re.search(r"Subtypes: \[(.*?)\] Errors", types):
        types = match[1]
    if match := re.search(r"Literal\[(.*?)\]", types):
        words = [match[1].replace("'", "").replace(", ", " or ")]
    else:
        kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
        kinds |= {"list": "a list, as [a, b]", "tuple": "a list, as [a, b]"}
        words = [text for kind, text in kinds.items() if re.search(rf"\b{kind}\b", types)] or [types.strip()]
        if re.search(r"\bdict\b", types):
            words = ["an object, as {key: value}"]
    return " or ".join(words + ["null"] * ("NoneType" in types))


def _with_underscores(word: str) -> str:
    """Let `--max-new-tokens` mean `--max_new_tokens`."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def _normalise(words: list[str], parser: "_Parser") -> list[str]:
    """Let a recipe or a model stand without its flag (`pretrain recipe.yaml`), a switch without its value (`--quick`),
    and a list without brackets (`--lora.targets q_proj v_proj`).
    """
    if len(words) > 1 and not words[1].startswith("-"):
        if words[0] in TAKES_RECIPE:
            words = [words[0], "--config", recipe_file(words[1]), *words[2:]]
        elif words[0] in TAKES_MODEL:
            if any(word.partition("=")[0] == "--model" for word in words):
                raise IlladaError(f"the model is given twice: as {words[1]} and as --model")
            words = [words[0], "--model", *words[1:]]
    command = parser._commands().get(words[0], parser)
    hints = {option: action for action in command._actions for option in action.option_strings}
    switches = {option for option, action in hints.items() if getattr(action, "_typehint", None) is bool}
    lists = {option for option, action in hints.items() if getattr(action, "_typehint", None) == list[str] | None}
    plain: list[str] = []
    for place, word in enumerate(words):
        if len(plain) > 1 and plain[-2] in lists and plain[-1].startswith("[") and not word.startswith("-"):
            plain[-1] = f"{plain[-1][:-1]}, {word}]"
            continue
        bare = place > 0 and words[place - 1] in lists and word != "null" and not word.startswith(("-", "["))
        plain.append(f"[{word}]" if bare else word)
        if word in switches and (place + 1 == len(words) or words[place + 1].startswith("--")):
            plain.append("true")
    return plain


_load_unchecked = get_loader("yaml")


def _load_yaml(text: str) -> Any:
    """Load a recipe or an option's value as jsonargparse does, once it is checked; raises YAMLError."""
    check_yaml(text)
    try:
        return _load_unchecked(text)
    except (ValueError, OverflowError) as error:  # a number of five thousand digits
        raise yaml.YAMLError(first_line(error)) from error


set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))


def _check_text(value: Any) -> None:
    """Raise an error where a text among these values is none that a file, a tokenizer or the terminal could hold."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for part in value:
            _check_text(part)
    elif isinstance(value, str):
        odd = next((letter for letter in value if letter == "\0" or "\ud800" <= letter <= "\udfff"), None)
        if odd is not None:
            what = "a null character" if odd == "\0" else "a byte that is not UTF-8, or half of a surrogate pair"
            raise IlladaError(f"{value[:60]!r} holds {what}: write it as UTF-8 text without it")


def _parse(words: Sequence[str]) -> tuple[Command, Namespace]:
    """Return the command that words call, and its arguments.

    Raises:
        IlladaError: when the words or the recipe that they name cannot be used.
    """
    _check_text(list(words))
    words = [_with_underscores(word) for word in words]
    parser = _build(words)
    words = ["--help" if word == "--help_all" else word for word in words]
    try:
        arguments = parser.parse_args(_normalise(words or ["--help"], parser))
    except UnicodeDecodeError as error:
        raise IlladaError(f"the recipe is not UTF-8 text: {error}") from error
    _check_text(arguments.as_dict())
    try:
        arguments = parser.instantiate(arguments)
    except TypeError as error:
        what = "model, lora, data, training, parallel and log must each hold lines of `key: value` in the recipe"
        raise IlladaError(what) from error
    command: Any = _commands_for(words)[0]
    while isinstance(command, dict):
        command, arguments = command[arguments.subcommand], arguments[arguments.subcommand]
    return command, arguments


def main(words: list[str] | None = None) -> None:
    """Run the command line; exits with 2 on bad input and 1 on a failed run."""
    warnings.filterwarnings("ignore")
    try:
        command, arguments = _parse(sys.argv[1:] if words is None else words)
        register_post_import_hook(_restrain_libraries, "illada.hub")  # which all that is heavy imports
        if command is not serving.serve:  # it trims its heap itself (serving/worker.py)
            keep_freed_memory()
        _call(command, arguments)
    except IlladaError as error:
        sys.exit(_fail(error, 2))
    except DivergedError as error:
        sys.exit(_fail(error, 1))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # a disk that is full, a folder one may not write to, a file in place of a folder
        place = "" if error.filename is None else f"{error.filename}: "
        sys.exit(_fail(IlladaError(f"{place}{error.strerror}" if error.strerror else error), 2))
    except BaseException as error:
        if (reason := _of_below(error)) is None:
            raise
        sys.exit(_fail(IlladaError(reason), 2))


def _of_below(error: BaseException) -> str | None:
    """Say what is wrong where a library ran out of memory or gave up; None for an error of ours."""
    said = first_line(error)
    if type(error).__name__ == "PanicException":  # Rust's, of tokenizers and safetensors; it is no Exception
        return f"a library below gave up ({said}): the tokenizer or the model is damaged, fetch or make it again"
    is_torch = isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)
    if isinstance(error, MemoryError) or is_torch:
        return f"not enough memory ({said}): take smaller sizes or batches, or a larger machine"
    return None


def _restrain_libraries(hub: ModuleType) -> None:
    hub.ban_network()
    hub.quiet_libraries()


def _fail(error: Exception, code: int) -> int:
    line = " ".join(str(error).splitlines())
    if len(line) > LONGEST_LINE:  # the reason mostly stands at the end
        line = f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"
    print(f"illada: error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
