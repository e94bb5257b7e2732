# Two commands do everything: `make demo` and `make test`. Both build .venv from the pinned constraints first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
QUICK  ?= 0
RUN    ?= runs/$(if $(filter-out 0,$(QUICK)),quick,demo)

# A process for each core, each with one thread: on 2 cores a little over half the time of one process.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: setup demo dictionary test quick lint types unit package docs lowest clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "illada needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,report,tune,quantize,cluster,serve,track,eval,completion,gguf,dev,docs]'
	@touch $@

demo: setup
	$(BIN)/illada demo --output $(RUN) $(if $(filter-out 0,$(QUICK)),--quick)

dictionary: setup  # a model that explains words: hours on 2 cores; texts from Debian packages, so apt-get is needed
	$(BIN)/python examples/dictionary/make.py

test: lint types unit package

quick: lint types  # the same without what takes more than a second: a minute and a half on 2 cores
	$(PYTEST) -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

unit: setup
	$(PYTEST)

docs: setup  # into site/; tests/test_docs.py builds it too, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lowest:  # the suite on the lowest versions that pyproject.toml allows; -c and not -r, which would also take CUDA's packages
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	rm -f .venv-lowest/pins.txt
	UV_PYTHON_DOWNLOADS=never .venv-lowest/bin/uv pip compile --quiet --resolution lowest-direct --all-extras --no-header --no-annotate pyproject.toml -o .venv-lowest/pins.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/pins.txt -e '.[data,report,tune,quantize,cluster,serve,track,eval,completion,gguf,fused,dev,docs]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal

package: setup
	$(BIN)/python tests/check_wheel.py

clean:
	rm -rf $(VENV) .venv-lowest dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
