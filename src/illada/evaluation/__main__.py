"""The harness's own command line with the model "illada": `python -m illada.evaluation --model illada ...`.

For versions of the harness that do not read the entry points of other packages (up to 0.4.13); under torchrun, too.
"""

from lm_eval.__main__ import cli_evaluate

from illada.evaluation import harness  # noqa: F401  (registers the model)

if __name__ == "__main__":
    cli_evaluate()
