# `make help` lists the targets. Each one that needs the virtual environment makes it first.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

# Extra arguments, as in `make test PYTEST_ARGS="-k ranks"` or `make demo DEMO_ARGS="--num_train_epochs 1"`.
PYTEST_ARGS ?= -n 2 --dist loadfile
DEMO_ARGS ?=

# Everything here runs on what ordinary packages carry: no hub is asked.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

INSTALLED := $(VENV)/.installed
INSTALLED_NOTEBOOKS := $(VENV)/.installed-notebooks
INSTALLED_DOCS := $(VENV)/.installed-docs
CHECKED := hf_cuttlefish examples $(wildcard tests benchmarks notebooks)
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.PHONY: help venv demo test lint types format notebooks docs nightly clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(INSTALLED)  ## make .venv with the tested versions, the package (editable) and the bundled model and data

# Made again when what it is made from changes. The data packages come without what they ask for: only their files are
# read. $(PYTHON) is asked for its version first, because the tested versions need a newer one than the package does.
$(INSTALLED): pyproject.toml setup.cfg constraints.txt examples/requirements-data.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "The tested versions need Python 3.11 or \
	newer, and $(PYTHON) is " + sys.version.split()[0] + ". Try: make venv PYTHON=python3.11")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r examples/requirements-data.txt
	touch $@

demo: $(INSTALLED)  ## fine-tune MiniLM on TREC twice, dense and with Cuttlefish, and compare (runs/text_classification)
	$(RUN) examples/text_classification.py --method both $(DEMO_ARGS)

# One thread in each test process: tiny models lose far more to waiting threads than they win. A file is one process's, so that
# what its tests share (a launch of several processes, a whole run) is made once.
test: export OMP_NUM_THREADS := 1
test: $(INSTALLED)  ## run the tests
	$(RUN) -m pytest $(PYTEST_ARGS)

# Without ruff's cache: it keeps the verdict on a file when only the file that the import named has gone.
lint: $(INSTALLED)  ## check style and formatting
	$(RUN) -m ruff check --no-cache $(CHECKED)
	$(RUN) -m ruff format --no-cache --check $(CHECKED)

format: $(INSTALLED)  ## put style and formatting right where that can be done automatically
	$(RUN) -m ruff check --fix $(CHECKED)
	$(RUN) -m ruff format $(CHECKED)

types: $(INSTALLED)  ## check the types
	$(RUN) -m mypy

$(INSTALLED_NOTEBOOKS): $(INSTALLED)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebooks]'
	touch $@

notebooks: $(INSTALLED_NOTEBOOKS)  ## execute the notebooks into runs/notebooks, and check what came of them
	$(RUN) -m nbconvert --log-level WARN --to notebook --execute --output-dir runs/notebooks $(NOTEBOOKS)
	$(RUN) notebooks/check.py runs/notebooks

$(INSTALLED_DOCS): $(INSTALLED)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(INSTALLED_DOCS)  ## build the documentation into runs/site; any warning is an error
	$(RUN) -m mkdocs build --strict

nightly: $(INSTALLED)  ## the long forms: tests in another order, 200 kills, 10,000 spoiled files, every model class, the oldest versions
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_ARGS) --no-loadscope-reorder $$(find tests -name 'test_*.py' | shuf)
	$(RUN) -m benchmarks.robustness.kill --kills 200 --disk 40 --out runs/kill.json
	$(RUN) -m benchmarks.robustness.fuzz --mutations 10000 --out runs/fuzz.json
	$(RUN) -m benchmarks.compatibility --out runs/compatibility.json
	PYTHON=$(PYTHON) .ci/oldest

clean:  ## remove the virtual environment and the caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
