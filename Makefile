# Needs make and Python 3.10 or newer; everything else goes into .venv.
#   make demo     distils a small model on this machine and shows the comparison
#   make test     the tests          make lint, make types    ruff, mypy
#   make slow     the crash matrix in full: 20,000 schedules
#   make bench    the measured budgets, against peers in the same run
#   make clean    build products and caches; make distclean also removes .venv

.POSIX:
.SUFFIXES:
.PHONY: help demo install test slow lint types format bench clean distclean

PYTHON = python3
VENV = .venv
RECIPE = recipes/quickstart.yaml
WORKERS = auto
TESTS = tests

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --no-input
SOURCES = launcher trainer infra tests benchmarks

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.train
	$(BIN)/launch up $(RECIPE) --yes

install: $(VENV)/.dev

# The test workers share the cores: with one thread each they do not fight over them.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal -rs $(TESTS)

slow: $(VENV)/.dev
	LAUNCH_SLOW=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal -rs tests/launcher/test_crash_matrix.py tests/test_killed_driver.py

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(VENV)/.dev
	$(BIN)/mypy

bench: $(VENV)/.dev
	@for file in benchmarks/*.py; do \
		echo "== $$file"; \
		$(BIN)/python "$$file" --check || failed="$$failed $$file"; \
	done; \
	test -z "$$failed" || { echo "over budget:$$failed"; exit 1; }

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: there is no '$(PYTHON)' here; install Python 3.10 or newer, or name it: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: '$(PYTHON)' is $$($(PYTHON) --version 2>&1); this needs Python 3.10 or newer: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: '$(PYTHON) -m venv $(VENV)' failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@touch $@

$(VENV)/.train: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing launch and torch into $(VENV): about a minute, or as long as a gigabyte takes to arrive"
	@$(PIP) install -qq -c constraints.txt -e ".[train]"
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing launch, torch, the clouds' clients and the test tools into $(VENV): two minutes, or as long as two gigabytes take to arrive"
	@$(PIP) install -qq -c constraints.txt -e ".[train,google,rehearse,s3,infra,dev]"
	@touch $@ $(VENV)/.train
