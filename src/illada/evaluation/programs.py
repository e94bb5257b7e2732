"""Find the program in a chat model's answer, and clean it of what is unfinished or does not belong to it.

Which lines survive is the rule of the authors' task files for the instruct model (`eval_instruct/`, after EvalPlus's
`sanitize`); they parse every range of lines, here the parser says early where no later line can help.
"""

import ast
import re
import warnings
from collections.abc import Iterator, Sequence

from illada.evaluation.thinking import after_thinking

MOST_LINES = 100
"""Lines that are looked at, the prompt's included (theirs)."""
FENCE = re.compile(r"```(?:py(?:thon)?)?\s*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
MARKS = re.compile(r"\[BEGIN\]\s*(.*?)(?:\[DONE\]|\Z)", re.DOTALL | re.IGNORECASE)
IMPORT = r"(?:from\s+\S+\s+import|import)\s"
INCOMPLETE = 0x4000
"""The flag of `compile` by which it tells a text that ends too early from one that is wrong (see `codeop`)."""


def block_program(answer: str, prompt: str, name: str) -> str:
    """Return the program in an answer to HumanEval, which defines the function `name`.

    It is the last fenced block after the thinking, which may be unfinished; without one, what begins with the function
    and the imports above it; without that, everything. It is cleaned as a continuation of the prompt. What the prompt
    defines besides the function stands before it, for the tests may need it.
    """
    text = after_thinking(answer)
    if blocks := FENCE.findall(text):
        code = blocks[-1]
    else:
        start = re.search(rf"^(?:\s*{IMPORT}.*\n)*\s*def\s+{re.escape(name)}\s*\(", text, re.MULTILINE)
        code = text[start.start() :] if start else text
    return "\n".join([*_helpers(prompt, name), clean(f"{prompt}\n{code}", name)])


def marks_program(answer: str, tests: Sequence[str]) -> str:
    """Return the program in an answer to MBPP, which defines the function that the first of the tests calls.

    It stands after the last [BEGIN] after the thinking, up to [DONE] or the end, else in the last fenced block, else
    from the first line of code on. When the thinking is unfinished, only what defines the function counts.
    """
    called = (re.search(r"\bassert\s+([A-Za-z_]\w*)\s*\(", test) for test in tests)
    name = next((match[1] for match in called if match), None)
    code = _marked(after_thinking(answer), name)
    cleaned = clean(code, name)
    if _defines(cleaned, name):
        return cleaned
    # The longest part that can be parsed may lie in the prose behind the function.
    lines = _lines(code)
    for end, tree in _parsed(lines, 0):
        if name is None or any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body):
            cut = clean("\n".join(lines[:end]), name)
            return cut if _defines(cut, name) else cleaned
    return cleaned


def _marked(text: str, name: str | None) -> str:
    """Return the part of an answer to MBPP that holds the program."""
    if marked := MARKS.findall(text):
        return str(marked[-1])
    blocks = FENCE.findall(text)
    if "<think>" in text:
        if blocks and (name is None or _defines(blocks[-1], name)):
            return str(blocks[-1])
        start = _definition(text, name) if name else None
        return text[start.start() :] if start else ""
    if blocks:
        return str(blocks[-1])
    start = re.search(rf"^\s*(?:{IMPORT}|class\s+\w|def\s+\w+\s*\()", text, re.MULTILINE)
    return text[start.start() :] if start else text


def _definition(code: str, name: str) -> re.Match[str] | None:
    return re.search(rf"^def\s+{re.escape(name)}\s*\(", code, re.MULTILINE)


def _defines(code: str, name: str | None) -> bool:
    return _definition(code, name) is not None if name else bool(code.strip())


def _helpers(prompt: str, name: str) -> list[str]:
    """Return the imports, assignments, classes and functions of a prompt besides the function `name`."""
    try:
        body = ast.parse(prompt).body
    except SyntaxError:
        return []
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.ClassDef, ast.FunctionDef)
    return [
        ast.unparse(node)
        for node in body
        if isinstance(node, kinds) and not (isinstance(node, ast.FunctionDef) and node.name == name)
    ]


def clean(text: str, name: str | None) -> str:
    """Return the imports and definitions in the longest part of a text that can be parsed.

    Of the definitions only those count on which the function `name` depends (all, when it is None), and of the
    functions only those with a `return`: a prompt's stub has none. Nothing is left of a text nested too deep.
    """
    try:
        return _cleaned(_longest(_lines(text.replace("\t", "    ").strip())[:MOST_LINES]), name)
    except RecursionError:
        return ""


def _cleaned(statements: list[ast.stmt], name: str | None) -> str:
    imports: list[str] = []
    definitions: dict[str, ast.stmt] = {}
    for node in statements:
        match node:
            case ast.Import() | ast.ImportFrom():
                imports.append(ast.unparse(node))
            case ast.ClassDef():
                definitions[node.name] = node
            case ast.FunctionDef() if any(isinstance(inner, ast.Return) for inner in ast.walk(node)):
                definitions[node.name] = node
            case ast.Assign(targets=[ast.Name(id=target), *_]):
                definitions[target] = node
    wanted = set(definitions) if name is None else _reached(name, definitions)
    return "\n".join([*imports, *(ast.unparse(node) for key, node in definitions.items() if key in wanted)])


def _reached(name: str, definitions: dict[str, ast.stmt]) -> set[str]:
    """Return the names on which a definition depends, itself included."""
    reached, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting += _names(definitions[current]) if current in definitions else []
    return reached


def _names(node: ast.AST) -> Iterator[str]:
    """Yield the names within a node; of `a.b` only b, as theirs does, so that `helper(x).strip()` needs no helper."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name):
            yield child.id
        elif isinstance(child, ast.Attribute):
            yield child.attr
        else:
            yield from _names(child)


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").splitlines()


def _longest(lines: list[str]) -> list[ast.stmt]:
    """Return what the longest range of lines that can be parsed consists of: most lines not blank, the first such."""
    best: list[ast.stmt] = []
    most = 0
    filled = [0]
    for line in lines:
        filled.append(filled[-1] + bool(line.strip()))
    for start in range(len(lines)):
        if filled[-1] - filled[start] <= most:
            break
        for end, tree in _parsed(lines, start):
            if filled[end] - filled[start] > most:
                best, most = tree.body, filled[end] - filled[start]
            break
    return best


def _parsed(lines: list[str], start: int) -> Iterator[tuple[int, ast.Module]]:
    """Yield the ends of the ranges from `start` on that can be parsed, the last one first, and their trees."""
    # A text that is wrong before its end stays wrong whatever follows: such ends lie above `wrong`, found by halving.
    low, wrong = start, len(lines) + 1
    while low + 1 < wrong:
        middle = wrong - 1 if wrong > len(lines) else (low + wrong) // 2
        if _parse(lines, start, middle) is False:
            wrong = middle
        else:
            low = middle
    for end in range(wrong - 1, start, -1):
        if isinstance(tree := _parse(lines, start, end), ast.Module):
            yield end, tree


def _parse(lines: list[str], start: int, end: int) -> ast.Module | bool:
    """Return the tree of a range of lines; else whether more lines could mend it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as those about "\d" in a string
            return compile("\n".join(lines[start:end]), "answer.py", "exec", ast.PyCF_ONLY_AST | INCOMPLETE)
    except SyntaxError as error:
        return error.msg == "incomplete input"
    except (ValueError, MemoryError, RecursionError):
        return True
