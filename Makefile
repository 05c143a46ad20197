# make demo: make clips, train on them, sample, score, write outputs/demo/report.html
# make test: the test suite
# Both make .venv and install everything first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# ColossalAI pins old versions of torch, transformers, diffusers and peft that it does not need:
# it and what it does need are listed whole in requirements/colossalai.txt and installed without dependencies.
$(INSTALLED): setup.py requirements/base.txt requirements/colossalai.txt requirements/deepspeed.txt requirements/test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements/base.txt -r requirements/test.txt -r requirements/deepspeed.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/colossalai.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) outputs
