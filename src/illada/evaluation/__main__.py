"""The harness's own command line with the model "illada": `python -m illada.evaluation --model illada ...`.

Versions of the harness up to 0.4.13 do not read the entry points of other packages and need this. It works under
torchrun, too.
"""

from illada.errors import needs
from illada.evaluation import harness  # noqa: F401  (registers the model)

with needs("eval", "evaluation"):
    from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
