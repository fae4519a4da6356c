# make demo: compress the demo model and say a sentence with it.    make test: lint, types, tests.
# make test-eval: tasks, against the harness's own model; installs lm-eval and what it needs, some 500 MB.
# make bench: the benchmark NAME, or the list of all; its table and its rows in build/benchmarks.
# make real: brings a real model (SmolLM2-135M-Instruct, 93 MB) and measures it: the README's first table, and peers.
# make test-thorough: the tests that take minutes each.
# make test-benchmarks: a quick run of every benchmark; takes minutes.
# make test-clients: every artifact in every client of docs/clients.md, each in an environment of its own; needs Node.
# make test-arm: artifacts and a bundle on an emulated board of arm64; needs root, and Debian's qemu-user-static, debootstrap.
# On a machine whose index offers torch with CUDA only, save gigabytes with
#   make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt
ARM_ROOT := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvslim/arm64
PROMPT ?= Here is a story of Mira and Oren. Mira's lamp is red. Oren's lamp is blue. Question: what colour is Mira's lamp? Answer:

.DEFAULT_GOAL := help
.PHONY: help demo test lint test-only test-eval test-thorough test-arm test-benchmarks test-clients bench real

help:
	@echo "make demo | test | lint | test-only | test-eval | test-thorough | test-arm | test-benchmarks | test-clients | bench NAME=codecs | real"

demo: $(VENV)/.installed
	$(BIN)/kvslim compress demo --out artifacts/demo --force
	$(BIN)/kvslim generate artifacts/demo --prompt "$(PROMPT)" --max-new-tokens 12

test: lint test-only

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-only: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest

test-eval: $(VENV)/.installed-eval
	KVSLIM_REQUIRE_EVAL=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n0 tests/test_eval.py

test-thorough: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m thorough

test-benchmarks: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n0 tests/test_benchmarks.py -m ""

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks $(or $(NAME),--list)

real: $(VENV)/.installed-dev build/real/smollm2.gguf
	$(BIN)/python tools/write_tables.py --match "benchmarks real" README.md
	$(BIN)/python tools/write_tables.py --match "benchmarks peers" docs/methods.md

build/real/smollm2.gguf: | $(VENV)/.installed
	$(BIN)/python tools/fetch_smollm2.py $@

test-clients: $(VENV)/.installed-dev .venv-optimum/.installed build/clients/.installed
	KVSLIM_REQUIRE_CLIENTS=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/clients -m "" \
		--junitxml=build/clients/outcomes.xml --override-ini=junit_family=xunit1
	$(BIN)/python tools/write_tables.py docs/clients.md

test-arm: $(VENV)/.installed-dev $(ARM_ROOT)/etc/cpuinfo
	KVSLIM_REQUIRE_ARM=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n0 tests/arm -m arm \
		--junitxml=build/arm/outcomes.xml --override-ini=junit_family=xunit1
	$(BIN)/python tools/arm_table.py

$(ARM_ROOT)/etc/cpuinfo: tests/arm/make_root.sh
	tests/arm/make_root.sh $(ARM_ROOT)

.venv-optimum/.installed: tests/clients/requirements-optimum.txt
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --requirement $<
	@touch $@

build/clients/.installed: tests/clients/package.json tests/clients/package-lock.json
	mkdir -p $(@D)
	cp $^ $(@D)
	ONNXRUNTIME_NODE_INSTALL=skip npm ci --prefix $(@D) --no-audit --no-fund
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-eval: pyproject.toml constraints.txt $(VENV)/.installed-dev
	$(INSTALL) --editable '.[dev,genai,eval]' accelerate
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev,genai,lora,ray,serve]'
	@touch $@ $(VENV)/.installed
