"""A picture of how an answer forms: a row for each forward pass, its tokens from left to right."""

import math
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from illada.errors import IlladaError, needs
from illada.files import write_bytes
from illada.reporting import INK, figure, picture_path, rendered

with needs("report", "a picture"):
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

END = "<|eos|>"
"""What stands for any end-of-sequence token in a recorded step."""
LONGEST = 16
"""Most characters of a token that are drawn."""


def recorded(tokenizer: Any, event: Any, eos_ids: Collection[int]) -> dict[str, Any]:
    """Return what `draw_steps` takes of one `StepEvent`, ready for JSON."""
    tokens = [END if i in eos_ids else tokenizer.decode([i]) for i in event.ids]
    return {
        "tokens": tokens,
        "committed": event.committed,
        "confidence": event.confidence,
        "forced": event.forced,
    }


class Drawing:
    """The steps of the answer to a single prompt, and the file that will show them."""

    def __init__(self, path: Path, prompts: Sequence[str]) -> None:
        """Check where the picture goes and that it is of one answer.

        Raises:
            IlladaError: when it cannot be written there, or there are several prompts.
        """
        if len(prompts) > 1:
            raise IlladaError(f"picture shows one answer, and there are {len(prompts)} prompts: give one of them")
        self.path, self.title = picture_path(path, "picture"), prompts[0]
        self._events: list[Any] = []

    def keep(self, event: Any) -> None:
        """Remember a `StepEvent`: the `on_step` of `generate` and `infill`."""
        self._events.append(event)

    def write(self, tokenizer: Any, eos_ids: Collection[int]) -> None:
        """Draw what was remembered into the file."""
        steps = [recorded(tokenizer, event, eos_ids) for event in self._events]
        write_bytes(self.path, draw_steps(steps, self.title, self.path.suffix.removeprefix(".")))


def draw_steps(steps: Sequence[dict[str, Any]], title: str = "", form: str = "png") -> bytes:
    """Return the picture as the bytes of a file: png, svg or pdf.

    Committed tokens stand on blue, darker where the model was surer, or on green where the form of the answer left no
    choice; proposals are pale, and so is what stands behind the end.
    """
    last = steps[-1]["tokens"]
    end = last.index(END) if END in last else len(last)
    longest = [0] * len(last)
    for step in steps:
        for x, token in enumerate(step["tokens"]):
            longest[x] = max(longest[x], len(_sign(token)))
    edges = [0.0]
    for count in longest:
        edges.append(edges[-1] + max(0.46, 0.09 * count + 0.08))
    drawing, axes = figure(edges[-1] + 1.2, 0.3 * len(steps) + 0.8 + 0.3 * bool(title))
    blues, greens = colormaps["Blues"], colormaps["Greens"]
    for y, step in enumerate(steps):
        for x, token in enumerate(step["tokens"]):
            confidence, committed = step["confidence"][x], step["committed"][x]
            sure = 0.0 if confidence is None or math.isnan(confidence) else float(confidence)
            colours = greens if step.get("forced") and step["forced"][x] else blues
            face = colours(0.3 + 0.6 * sure) if committed else "#eceff3"
            alpha = 1.0 if x <= end else 0.25
            left, width = edges[x], edges[x + 1] - edges[x]
            axes.add_patch(Rectangle((left, y), width - 0.03, 0.9, facecolor=face, edgecolor="none", alpha=alpha))
            ink = ("white" if sure > 0.6 else INK) if committed else "#a8b2bd"
            middle = left + width / 2
            axes.text(middle, y + 0.47, _sign(token), ha="center", va="center", fontsize=8, color=ink, alpha=alpha)
    axes.set(xlim=(0, edges[-1]), ylim=(len(steps), 0), ylabel="forward pass", xlabel="position in the answer")
    axes.set_title(title.replace("$", "\\$"), loc="left", fontsize=10, color=INK)
    axes.set_xticks([])
    axes.set_yticks([y + 0.45 for y in range(0, len(steps), 4)], [str(y + 1) for y in range(0, len(steps), 4)])
    axes.spines[["left", "bottom"]].set_visible(False)
    with warnings.catch_warnings():  # letters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return rendered(drawing, form)


def _sign(token: str) -> str:
    """Return a token short enough for its cell; a dollar sign would be read as mathematics."""
    short = {"\n": "↵", END: "END"}.get(token, token.strip().strip("<|>") or "␣")
    short = "".join(letter if letter.isprintable() else "·" for letter in short)
    return short[:LONGEST].replace("$", "\\$")
