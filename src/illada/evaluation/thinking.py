"""The part of a generated text that is its answer."""


def after_thinking(text: str) -> str:
    """Return what follows the last `</think>`; all of the text when there is none."""
    return text.rpartition("</think>")[2]
