# Two commands do everything on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON    ?= python3
# More arguments of pip, for example an index with CPU-only wheels of torch.
PIP_FLAGS ?=
# Worker processes of the tests.
JOBS      ?= 2

VENV  := .venv
STAMP := $(VENV)/.stamp
BIN   := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check test-long format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@echo "creating the environment in $(VENV): torch and its tools, about 2 GB with torch for CPUs, several times"
	@echo "that with CUDA (PIP_FLAGS chooses, see README.md); pip is silent for some minutes, by the network ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## compile the bundled model and generate text
	@$(BIN)/penstock demo

test: $(STAMP)  ## every test that needs neither a GPU nor hours
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not gpu and not long"

check: $(STAMP)  ## lint, format, types, floors, size
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/null/test_floors.py
	@$(BIN)/python tools/size_report.py

test-long: $(STAMP)  ## full counts and foreign tools
	@$(BIN)/python -m pytest -q -m long --timeout 7200; status=$$?; echo "results are in out/long/:"; \
		ls out/long/*.json; exit $$status

format: $(STAMP)  ## rewrite the sources in the one format
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

clean:  ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build out *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
