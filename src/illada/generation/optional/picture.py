"""A picture of how an answer forms: a row for each step, its tokens from left to right."""

import itertools
import math
import re
import textwrap
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
MOST = 64
"""Most positions and most rows of a picture: a cell takes matplotlib a millisecond."""


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
        self.events: list[Any] = []
        """Every `StepEvent`: `events.append` is the `on_step` of `generate` and `infill`."""

    def write(self, tokenizer: Any, eos_ids: Collection[int]) -> None:
        """Draw the steps into the file.

        Raises:
            IlladaError: when nothing was decided.
        """
        if not self.events:
            raise IlladaError(f"picture {self.path} was not drawn: the answer took no step")
        steps = [recorded(tokenizer, event, eos_ids) for event in self.events]
        write_bytes(self.path, draw_steps(steps, self.title, self.path.suffix.removeprefix(".")))


def draw_steps(steps: Sequence[dict[str, Any]], title: str = "", form: str = "png") -> bytes:
    """Return the picture as the bytes of a file: png, svg or pdf.

    Committed tokens stand on blue, darker where the model was surer, on green where the form of the answer left no
    choice, and on white where they were given; proposals are grey, and what stands behind the end is pale. Of a long
    answer the first `MOST` positions are drawn, and the first `MOST` steps that change them.
    """
    whole = len(steps[-1]["tokens"])
    cut = [{name: values[:MOST] for name, values in step.items()} for step in steps]
    # As text, because an unknown confidence is no number, and so equals nothing.
    rows = [next(alike) for _, alike in itertools.groupby(cut, str)][:MOST]
    last = rows[-1]["tokens"]
    end = last.index(END) if END in last else len(last)
    edges = [0.0]
    for x in range(len(last)):
        longest = max(len(_sign(row["tokens"][x])) for row in rows if x < len(row["tokens"]))
        edges.append(edges[-1] + max(0.46, 0.09 * longest + 0.08))
    lines = textwrap.wrap(" / ".join(title.split("\n")), max(24, int(10 * edges[-1])), max_lines=3, placeholder=" …")
    drawing, axes = figure(edges[-1] + 1.2, 0.3 * len(rows) + 0.8 + 0.2 * len(lines))
    for y, row in enumerate(rows):
        for x in range(len(row["tokens"])):
            _draw_cell(axes, (edges[x], y, edges[x + 1] - edges[x]), row, x, behind=x > end)
    axes.set(xlim=(0, edges[-1]), ylim=(len(rows), 0), ylabel="step")
    axes.set_xlabel("position in the answer" + f", the first {MOST} of {whole}" * (whole > MOST))
    axes.set_title("\n".join(lines), loc="left", fontsize=10, color=INK, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([y + 0.45 for y in range(0, len(rows), 4)], [str(y + 1) for y in range(0, len(rows), 4)])
    axes.spines[["left", "bottom"]].set_visible(False)
    with warnings.catch_warnings():  # letters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return rendered(drawing, form)


def _draw_cell(axes: Any, place: tuple[float, float, float], row: dict[str, Any], x: int, behind: bool) -> None:
    """Draw a token at its place: left edge, top, width."""
    left, top, width = place
    confidence, committed = row["confidence"][x], row["committed"][x]
    given = confidence is None or math.isnan(confidence)
    sure = 0.0 if given else float(confidence)
    colours = colormaps["Greens" if row.get("forced") and row["forced"][x] else "Blues"]
    face = "#eceff3" if not committed else "white" if given else colours(0.3 + 0.6 * sure)
    ink = "#a8b2bd" if not committed else "white" if sure > 0.6 and not behind else INK
    alpha = 0.25 if behind else 1.0
    axes.add_patch(Rectangle((left, top), width - 0.03, 0.9, facecolor=face, edgecolor="none", alpha=alpha))
    style = {"ha": "center", "va": "center", "fontsize": 8, "color": ink, "alpha": alpha, "parse_math": False}
    axes.text(left + width / 2, top + 0.47, _sign(row["tokens"][x]), **style)


def _sign(token: str) -> str:
    """Return a token short enough for its cell."""
    if token == END:
        return "END"
    short = re.sub(r"^<\|(.+)\|>$", r"\1", token.strip(" ")) or "␣"
    return "".join(letter if letter.isprintable() else "↵" if letter == "\n" else "·" for letter in short)[:LONGEST]
