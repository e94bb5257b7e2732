"""What the page says about a model: `suggestions.json` beside the weights, which `illada demo` writes.

{"about": "a line on what kind of model this is", "suggestions": [{"label": "Sort digits", "text": "Sort 528391."}]}
"""

from typing import Any

from illada.errors import IlladaError
from illada.files import read_json
from illada.weights.runs import model_folder

FILE = "suggestions.json"
MOST = 12
"""Most suggestions, and the most characters of a label and of a line are 200, of a text 4,000."""


def read_about(model: str) -> dict[str, Any]:
    """Return what stands in a model's `suggestions.json`, checked; nothing where there is none.

    Raises:
        IlladaError: when the file has another form.
    """
    path = model_folder(model) / FILE
    if not path.is_file():
        return {}
    found = read_json(path)
    wrong = IlladaError(f'{path} is not {{"about": TEXT, "suggestions": [{{"label": TEXT, "text": TEXT}}]}}: repair it')
    if not isinstance(found, dict) or not found.keys() <= {"about", "suggestions"}:
        raise wrong
    suggestions = found.get("suggestions", [])
    if not isinstance(suggestions, list) or not _is_text(found.get("about", ""), 200) or len(suggestions) > MOST:
        raise wrong
    for one in suggestions:
        if not isinstance(one, dict) or one.keys() != {"label", "text"}:
            raise wrong
        if not (_is_text(one["label"], 200) and _is_text(one["text"], 4000)):
            raise wrong
    return found


def _is_text(value: Any, most: int) -> bool:
    return isinstance(value, str) and len(value) <= most and not any("\ud800" <= sign <= "\udfff" for sign in value)
