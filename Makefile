# anyreap, from a fresh clone to a result in one command. `make` alone lists the commands.
#
# Each command makes .venv when it is missing or stale, and installs into it only the dependency groups
# that it needs ([dependency-groups] in pyproject.toml). Another interpreter, beside the usual one:
#     make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV   := .venv
ARGS   :=

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check --quiet
CODE    := $(wildcard src tests examples bench)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pips in one venv would get in each other's way.
.NOTPARALLEL:
.PHONY: help demo test bench bench-full browser soak scenarios check docs format clean examples lowest dist-check FORCE

help: ## list these commands
	@echo 'make <command> [ARGS="..."] [PYTHON=python3]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.group-demo ## run examples/demo.py
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.group-test ## run the tests, in four processes; with ARGS: run pytest with these
	$(BIN)/python tests/run.py $(ARGS)

soak: $(VENV)/.group-test ## mixed work with every status checked, a minute; SOAK_S=900 for a million children
	$(BIN)/python -m tests.soak

scenarios: $(VENV)/.group-test ## print the acceptance scenarios, and the tests that cover each
	$(BIN)/python -m tests.scenarios

bench: $(VENV)/.group-bench ## measure beside the peers, the short form: five minutes at most
	$(BIN)/python -m bench $(ARGS)

bench-full: $(VENV)/.group-bench ## all sizes and peers, an hour or two; writes docs/benchmarks.md
	$(BIN)/python -m bench --full --page docs $(ARGS)

examples: $(VENV)/.group-examples ## run all examples for real: those on FastAPI, Hypercorn and Dask too
	$(BIN)/python -m pytest tests/test_examples.py $(ARGS)

browser: $(VENV)/.group-browser ## look at the documentation in a browser, as a reader would; needs Chromium
	$(BIN)/python -m pytest tests/test_site.py $(ARGS)

check: $(VENV)/.group-check $(VENV)/.group-docs ## everything that a change must pass, fast things first
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy --strict $(CODE)
	PATH='$(CURDIR)/$(BIN)':$$PATH pyright --verifytypes anyreap --ignoreexternal
	$(BIN)/python tests/run.py --cov
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(VENV)/.group-docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lowest: ## run the tests with the oldest trio and anyio that are supported
	$(MAKE) .venv-lowest/.group-lowest VENV=.venv-lowest
	.venv-lowest/bin/python -m pytest $(ARGS)

# The same commit gives the same bytes, whoever builds it, when, where, and with which umask: so it is built a second
# time, out of the first sdist. The wheel is tried in a venv that has nothing else, then with a part of the tests.
# pyroma misses two things of ten, an email address and a home page, until the project has them.
dist-check: export SOURCE_DATE_EPOCH := $(shell git log -1 --format=%ct 2>/dev/null || echo 1580601600)
dist-check: $(VENV)/.group-dist ## build sdist and wheel, check them, and run some of the tests from the wheel
	rm -rf dist build
	$(BIN)/python -m build --outdir dist
	mkdir build && tar -xf dist/*.tar.gz -C build
	cd build/anyreap-* && rm PKG-INFO && find . -type f -exec touch {} + && umask 077 && \
	    '$(CURDIR)/$(BIN)/python' -m build --outdir ../again
	for file in dist/*; do cmp "$$file" "build/again/$${file#dist/}" || exit 1; done
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/pyroma --min=8 dist/*.tar.gz
	$(PYTHON) -m venv --clear build/venv
	build/venv/bin/python -m pip --disable-pip-version-check --quiet install 'pip>=25.1' dist/*.whl
	build/venv/bin/python -W error -c 'import anyreap; assert "site-packages" in anyreap.__file__'
	build/venv/bin/python -m pip --disable-pip-version-check --quiet install --group test
	build/venv/bin/python -m pytest tests/test_smoke.py tests/test_status.py tests/test_pytest_plugin.py $(ARGS)

format: $(VENV)/.group-check ## let ruff rewrite the code
	$(BIN)/ruff check --fix-only $(CODE)
	$(BIN)/ruff format $(CODE)

clean: ## remove the venv, and all that was built or cached
	rm -rf $(VENV) .venv-lowest build dist site htmlcov .coverage .coverage.* .*_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# A venv serves one interpreter version in one directory: after an upgrade or a move, its scripts and
# the editable install point nowhere. .made-for names both. If it does not name what is wanted now, or
# the python in the venv no longer starts, the venv is made anew.
WANTED := $(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag, *sys.version_info)') $(CURDIR)
FOUND  := $(shell { $(BIN)/python -c '' && cat $(VENV)/.made-for; } 2>&1 || echo none)
ifneq ($(WANTED),$(FOUND))
$(VENV)/.made-for: FORCE
endif

$(VENV)/.made-for:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "anyreap needs Python 3.11 or newer; try make PYTHON=python3.x")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --upgrade 'pip>=25.1' # the first that knows --group
	@echo '$(WANTED)' > $@

$(VENV)/.group-%: $(VENV)/.made-for pyproject.toml Makefile
	$(PIP) install --group $* --editable .
	@touch $@
