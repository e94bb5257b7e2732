"""MATH as lm-evaluation-harness 0.4.10 scores it, which the authors pin, and the authors' reading of `#### answer`.

Version 0.4.13 (task version 3.1) mends two shots and counts more answers as equal; its `minerva_math` is there by name.
What did not change is the harness's own. This file lies beside the task files because the harness then passes on which
library is missing.
"""

import re
from typing import Any

from illada.evaluation.answers import bare, hash_answer
from illada.evaluation.thinking import after_thinking

try:
    from lm_eval.tasks.minerva_math import utils
except AssertionError as error:  # its complaint about the version of antlr4
    raise ModuleNotFoundError(str(error)) from error

Document = dict[str, Any]
doc_to_text = utils.doc_to_text


def shots() -> list[Document]:
    """Return the four shots with 0.4.10's slips: a brace too many in the first, line ends of one backslash."""
    found = [
        {key: text.replace("\\\\\n", "\\\n") for key, text in shot.items()} for shot in utils.list_fewshot_samples()
    ]
    found[0]["problem"] = found[0]["problem"].rstrip("}") + "}"
    return found


def process_docs(documents: Any) -> Any:
    """Give every document the normalised content of the last box in its solution as `answer`."""
    return documents.map(lambda doc: {"answer": normalise(_last_box(doc["solution"]) or "")})


def process_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score `The final answer is ...` by computer algebra, and the whole answer by math-verify."""
    answer = utils.get_unnormalized_answer(results[0])
    return {"exact_match": _equal(normalise(answer), doc["answer"]), "math_verify": _verified(doc, results[0])}


def reasoning_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score the answer of `reasoning_answer`: it equals the truth, math-verify says so, or either (`answer_match`)."""
    answer = reasoning_answer(results[0])
    exact = max(_same_words(answer, doc["answer"]), _equal(normalise(answer), doc["answer"]))
    verified = _verified(doc, answer)
    return {"exact_match": exact, "math_verify": verified, "answer_match": max(exact, verified)}


def reasoning_answer(text: str) -> str:
    """Return the answer after the last `####` that begins a line, else in the last box, after the thinking."""
    text = after_thinking(text)
    if (line := hash_answer(text)) is not None:
        return line
    box = _last_box(text)
    return "[invalidanswer]" if box is None else bare(box)


def _last_box(text: str) -> str | None:
    """Return the content of the last box, or None, also where the harness finds something else, such as a frame."""
    try:
        box = utils.last_boxed_only_string(text)
        return str(utils.remove_boxed(box)) if box else None
    except AssertionError:
        return None


def _equal(one: str, other: str) -> float:
    # Version 0.4.13 counts equal texts as equal even when they cannot be parsed; a space in front, which the parser
    # passes over, makes them unequal texts.
    return float(bool(utils.is_equiv(" " + one, other)))


def _verified(doc: Document, answer: str) -> float:
    try:
        return float(bool(utils.verify(gold=utils.parse(doc["solution"]), target=utils.parse(answer))))
    except Exception:  # the libraries raise all sorts of errors on what is no formula
        return 0.0


SHORTHANDS = (
    (r".*?\$(.*?)\$.*", r"$\1$"),
    (r"\\text\{(.*?)\}", r"\1"),
    (r"\\textbf\{(.*?)\}", r"\1"),
    (r"\\overline\{(.*?)\}", r"\1"),
    (r"\\boxed\{(.*)\}", r"\1"),
    (r"frac([^{])(.)", r"frac{\1}{\2}"),
    (r"sqrt([^{])", r"sqrt{\1}"),
    (r"\$", ""),
)
"""Formula out of its sentence, words and frames off, braces on: in the order of Lewkowycz et al. (2022), appendix D."""


def normalise(answer: str) -> str:
    """Return an answer in the form that is compared, as up to 0.4.12: units go wherever their letters stand."""
    answer = answer.rpartition("=")[2]
    for before, after in [*utils.SUBSTITUTIONS, *((text, "") for text in utils.REMOVED_EXPRESSIONS)]:
        answer = answer.replace(before, after)
    for pattern, replacement in SHORTHANDS:
        answer = re.sub(pattern, replacement, answer)
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer


def _same_words(answer: str, truth: str) -> float:
    """Return whether letters of options, or one or two words, are the same; 0 when the truth is something else."""
    if re.fullmatch(r"\(?[A-E]\)?(,\(?[A-E]\)?)*|[A-F]{2,}", truth.strip().replace(" ", "")):
        kept = r"option|answer|choice|and|[^a-e]"
    elif re.fullmatch(r"[A-Za-z][A-Za-z0-9]*(\s+[A-Za-z0-9]+)?", truth.strip()):
        kept = r"[^a-z0-9]"
    else:
        return 0.0
    answer, truth = (re.sub(r"\\(?:boxed|textbf|mathrm|text)", "", text.lower()) for text in (answer, truth))
    return float(re.sub(kept, "", answer) == re.sub(kept, "", truth))
