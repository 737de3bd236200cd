# Every target does its own set-up: `make demo` or `make test` is all a fresh clone needs. There is one .venv; the demo
# installs into it what it needs itself, and the first target that needs more adds the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCAL := $(VENV)/.installed-local
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
WORKERS ?= 4
PYTEST_ARGS ?=
EMULATOR := .venv-localstack
FLOOR := .venv-floor
NEWEST := .venv-newest
MOST := tests/unit tests/acceptance/cancel tests/acceptance/installation/test_postgres.py
SEEDS ?= 1 2 3 4
SECONDS ?= 40

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP) ## Create .venv and install the package with everything for local work
$(STAMP): $(LOCAL)
	@echo 'installing the tools for tests and checks into $(VENV), about a minute'
	@$(BIN)/python $(PIP_INSTALL) --editable '.[local,test]' --constraint constraints.txt
	@touch $@

$(LOCAL): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; say which: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing dagster-taskiq and what it needs locally into $(VENV), about a minute'
	@$(BIN)/python $(PIP_INSTALL) --editable '.[local]' --constraint constraints.txt
	@touch $@

.PHONY: demo
demo: $(LOCAL) ## Launch two real runs over an embedded SQS, terminate them, show what happened and when
	$(BIN)/dagster-taskiq demo

.PHONY: dev
dev: $(LOCAL) ## Dagster's UI, a worker and an embedded SQS, with the example jobs; one Ctrl-C stops it all
	$(BIN)/dagster-taskiq dev

.PHONY: test
test: $(STAMP) ## Run every test once (PYTEST_ARGS='-k demo' narrows it down)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

.PHONY: nightly
nightly: $(STAMP) ## Run all tests and their repetitions: every combination, hundreds of moments, both emulators, a bad day
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "" $(PYTEST_ARGS)

.PHONY: emulator
emulator: $(EMULATOR)/.installed ## Install LocalStack, the second SQS emulator of tests/contract, next to .venv (a minute)
$(EMULATOR)/.installed: tests/localstack-requirements.txt tests/localstack-constraints.txt
	test -x $(EMULATOR)/bin/python || $(PYTHON) -m venv $(EMULATOR)
	$(EMULATOR)/bin/python $(PIP_INSTALL) --requirement $< --constraint tests/localstack-constraints.txt
	@touch $@

.PHONY: contract
contract: $(STAMP) ## Check what we assume of SQS (DAGSTER_TASKIQ_TEST_ENDPOINT=https://... checks that one, AWS too)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "" tests/contract $(PYTEST_ARGS)

.PHONY: floor
floor: $(FLOOR)/.installed ## Run the unit tests and those of cancellation with the oldest versions that we admit
	$(FLOOR)/bin/python -m pytest -n $(WORKERS) --dist loadgroup $(MOST) $(PYTEST_ARGS)
$(FLOOR)/.installed: pyproject.toml constraints-floor.txt
	test -x $(FLOOR)/bin/python || $(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python $(PIP_INSTALL) --editable '.[local,test]' --constraint constraints-floor.txt
	@touch $@

# Each package of Dagster pins the others exactly, and some come out later: the newest of each has to go with the others.
.PHONY: newest
newest: ## Run the same with the newest release of Dagster
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(PIP_INSTALL) --editable '.[local,test]' --constraint constraints.txt
	$(NEWEST)/bin/python $(PIP_INSTALL) --upgrade --no-deps 'dagster<1.14' 'dagster-graphql<1.14' 'dagster-mysql<0.30' 'dagster-pipes<1.14' 'dagster-postgres<0.30' 'dagster-shared<1.14' 'dagster-webserver<1.14'
	$(NEWEST)/bin/python -c 'import dagster; print("Dagster", dagster.__version__)'
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist loadgroup -W 'ignore:Found version mismatch:UserWarning' $(MOST) $(PYTEST_ARGS)

.PHONY: chaos
chaos: $(STAMP) ## Put a fleet through bad days (SEEDS="1 2 3 4" SECONDS=40; needs PostgreSQL; ten minutes at most)
	DAGSTER_TASKIQ_TEST_REQUIRE_ALL=1 DAGSTER_TASKIQ_TEST_CHAOS_SEEDS="$(SEEDS)" DAGSTER_TASKIQ_TEST_CHAOS_SECONDS="$(SECONDS)" \
		timeout --foreground 600 $(BIN)/python -m pytest -q -p no:randomly -m "" tests/acceptance/outages/test_chaos.py $(PYTEST_ARGS)

.PHONY: check
check: lint types unit ## What to run before every commit: linters, types, unit tests

.PHONY: lint
lint: $(STAMP) ## Run ruff, its formatter in check mode, and cfn-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/cfn-lint --regions us-east-1 -- infra/*.yaml

.PHONY: format
format: $(STAMP) ## Let ruff format the code and fix what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

.PHONY: types
types: $(STAMP) ## Run mypy, strict, over src and tests
	$(BIN)/mypy

.PHONY: unit
unit: $(STAMP) ## Run the tests without I/O
	$(BIN)/python -m pytest -q tests/unit $(PYTEST_ARGS)

.PHONY: acceptance
acceptance: $(STAMP) ## Run the tests with real processes, signals, queues, databases and a browser
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup tests/acceptance $(PYTEST_ARGS)

# Every warning is an error: a link or an anchor that leads nowhere, a page that the menu does not have.
# (`--quiet` would hide warnings from the strictness as well.)
.PHONY: docs
docs: $(STAMP) ## Build the site into build/site, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.PHONY: docs-serve
docs-serve: $(STAMP) ## Show the site on http://127.0.0.1:8000, and again after each change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --no-strict --dev-addr 127.0.0.1:8000

.PHONY: screenshot
screenshot: $(STAMP) ## Make the picture of the README again: a cancelled run in Dagster's UI (needs Chromium)
	$(BIN)/python -m tests.support.screenshot

.PHONY: precommit
precommit: $(STAMP) ## Run what git runs before a commit (to let git do it: .venv/bin/pre-commit install)
	$(BIN)/pre-commit run --all-files

.PHONY: dist
dist: $(STAMP) ## Build the sdist and, from it, the wheel; check both as the package index does (needs the network)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

.PHONY: clean
clean: ## Remove the virtual environment and everything that was built
	rm -rf $(VENV) $(EMULATOR) $(FLOOR) $(NEWEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: audit
audit: $(STAMP) ## Compare the tested versions with PyPI's advisories (needs the network)
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

.PHONY: benchmark
benchmark: $(STAMP) ## Measure launch and Terminate against Dagster's own launcher and a bare SQS message (a minute or two)
	$(BIN)/python -m benchmarks.terminate 2>benchmark.log || { tail -n 20 benchmark.log; exit 1; }

.PHONY: benchmark-steps
benchmark-steps: $(STAMP) ## Measure steps under taskiq_executor against Dagster's own executors (some ten minutes)
	$(BIN)/python -m benchmarks.steps 2>benchmark.log || { tail -n 20 benchmark.log; exit 1; }

.PHONY: benchmark-start
benchmark-start: $(STAMP) ## Measure how long a worker takes to start, and its CPU, against `import dagster` (four minutes)
	$(BIN)/python -m benchmarks.worker_start 2>benchmark.log || { tail -n 20 benchmark.log; exit 1; }

.PHONY: benchmark-cancel-runs
benchmark-cancel-runs: $(STAMP) ## Measure how long `run cancel` takes for 5,000 runs that wait (some minutes)
	$(BIN)/python -m benchmarks.cancel_runs 2>benchmark.log || { tail -n 20 benchmark.log; exit 1; }

.PHONY: benchmark-lanes
benchmark-lanes: $(STAMP) ## Measure how long a step waits behind 300 others, with a preferred route and without (some minutes)
	$(BIN)/python -m benchmarks.lanes 2>benchmark.log || { tail -n 20 benchmark.log; exit 1; }

.PHONY: benchmark-token
benchmark-token: $(STAMP) ## Measure what a look at the cancellation token costs (half a minute)
	$(BIN)/python -m benchmarks.token

.PHONY: soak
soak: $(STAMP) ## Two thousand short runs on one worker: does it hold more at the end than at the beginning? (an hour)
	$(BIN)/python -m benchmarks.soak 2>benchmark.log || { tail -n 20 benchmark.log; exit 1; }
