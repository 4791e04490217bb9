# `make demo` and `make test` set up all they need in .venv; `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test ablation notebooks clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

demo: $(VENV)/installed ## train the tiny model on synthetic clips: minutes on two CPU cores
	$(BIN)/torchrun --standalone --nproc-per-node 1 train.py

test: $(VENV)/installed ## all tests, in two processes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

ablation: $(VENV)/installed ## the ablations of docs/results.md: hours on two CPU cores; goes on where it was stopped
	$(BIN)/python -m grpo.ablate
	$(BIN)/python -m tests.benchmarks.released_faults

notebooks: $(VENV)/installed ## the tutorial's pages as notebooks beside them, docs/tutorial/*.ipynb
	$(BIN)/pip install --quiet --editable '.[notebooks]'
	$(BIN)/jupytext --to ipynb --update-metadata '{"kernelspec": {"name": "python3", "display_name": "Python 3"}}' \
	    docs/tutorial/*.md

clean: ## remove the environment; clips and runs stay
	rm -rf $(VENV) *.egg-info
