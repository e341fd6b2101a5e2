# `make` alone lists the targets. Each that needs Python makes .venv first, once.

SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON := .venv/bin/python
BATCH := 8

.DEFAULT_GOAL := help
.PHONY: help setup setup-optional demo demo-bars test test-all test-extra test-fast faults bench bench-smoke gpu lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

setup:  ## make .venv with everything in requirements.txt; nothing to do when it is up to date
	@bash tools/setup_env.sh

setup-optional: setup  ## also what some examples, and their tests, need: requirements-optional.txt
	@$(PYTHON) -m pip install -qq --no-input --disable-pip-version-check \
		-r requirements.txt -r requirements-optional.txt

demo: setup  ## real pages: what a wider field gains, drawn and searched (minutes on a CPU)
	@$(PYTHON) -W ignore tools/demo.py

demo-bars: setup  ## the same on drawn bars, of which the search's right answer is known
	@$(PYTHON) -W ignore tools/demo.py bars --output output/demo_bars

test-fast: setup  ## tests/unit: no test that trains or takes over a second (a minute)
	@$(PYTHON) -m pytest tests/unit --numprocesses auto --maxprocesses 4 --dist worksteal

test: setup  ## tests/unit and tests/integration (five minutes on two cores)
	@$(PYTHON) -m pytest tests/unit tests/integration --numprocesses auto --maxprocesses 4 \
		--dist loadfile --no-loadscope-reorder

test-extra: setup  ## tests/extra and tests/faults: wheel, tools, study, optional packages, faults
	@$(PYTHON) -m pytest tests/extra tests/faults --numprocesses auto --maxprocesses 4 \
		--dist loadfile --no-loadscope-reorder

test-all: test test-extra  ## all tests but those of a GPU

faults: setup  ## break small runs in many ways and print what they survived (an hour)
	@$(PYTHON) tests/faults/run_faults.py

bench: setup  ## time plain, frozen and super-networks on the CPU, into output/benchmark.md (hours)
	@mkdir -p output
	@$(PYTHON) -W ignore tools/benchmark.py | tee output/benchmark.md

bench-smoke: setup  ## a small part of it (minutes)
	@$(PYTHON) -W ignore tools/benchmark.py --networks R50 --size 256 320 --rounds 3 \
		--what inference train convs

gpu: setup  ## on a GPU: its own tests, then the benchmark, into output/gpu.md; BATCH=2 for a small one
	@mkdir -p output
	@$(PYTHON) -m pytest tests/gpu -q -rs; tested=$$?; \
	$(PYTHON) -W ignore tools/benchmark.py --device cuda --dtype bfloat16 float32 --batch $(BATCH) \
		--networks R50 --size 800 1200 | tee output/gpu.md && exit $$tested

lint: setup  ## check the formatting and style
	@$(PYTHON) -m black --quiet --check --diff .
	@$(PYTHON) -m isort --quiet --check-only --diff .
	@$(PYTHON) -m flake8 .

format: setup  ## rewrite the code in the project's format
	@$(PYTHON) -m isort --quiet .
	@$(PYTHON) -m black --quiet .

clean:  ## remove .venv and caches; keep output/ and datasets/
	rm -rf .venv build dist .pytest_cache .hypothesis projects/NATS/*.egg-info
	find projects study tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
