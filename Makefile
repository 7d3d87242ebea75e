# Two commands matter: `make book` and `make test`. `make help` lists the rest.

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

# smoke, cpu or gpu. Left empty, book/build.py takes cpu when CIFAR-10 is at hand, else smoke.
PRESET ?=
# The Python to make .venv with, if the one found by itself is not the one you want.
PYTHON ?=
# More words for pytest or for the workflow: make test ARGS="-k records -x", make reproduce ARGS=--dry-run
ARGS ?=
# Tests side by side, one file of tests at a time each: a number, or logical for one a core. 0: all in one process.
WORKERS ?= logical
# Runs side by side in `make reproduce`, each with one thread.
JOBS ?= 1

.DEFAULT_GOAL := help
.PHONY: help book test reproduce install lock clean

help:
	@echo "make book            build the book into _build/html (installs into .venv the first time)"
	@echo "make book PRESET=P   the same with the preset P: smoke, cpu or gpu"
	@echo "make test            run all tests"
	@echo "make reproduce PRESET=P JOBS=N   run what has no record yet, N runs side by side, and build the book; ARGS=--dry-run: only say what"
	@echo "make install         only make .venv"
	@echo "make lock            renew constraints.txt and environment.yml (needs uv)"
	@echo "make clean           delete what was built; .venv, data and runs stay"

book: $(READY)
	@$(PY) book/build.py $(if $(PRESET),--preset $(PRESET))

test: $(READY)
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# The lock would stay after a kill, and what is written is written in one step.
reproduce: $(READY)
	@$(PY) -m advbn_lib plan --preset $(or $(PRESET),cpu)
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m snakemake -s workflow/Snakefile --directory . --cores $(JOBS) --nolock \
	  --rerun-incomplete --quiet rules --resources gpu=1 --keep-going $(ARGS) --config preset=$(or $(PRESET),cpu)

install: $(READY)

# The stamp is written last: an interrupted installation is taken up again by the next `make`.
$(READY): pyproject.toml setup.py constraints.txt tests/attack_libraries.txt
	@python=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python); do \
	  if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	  then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.11, 3.12 or 3.13 found ($(if $(PYTHON),PYTHON=$(PYTHON) is not one,python3 is: $$(python3 --version 2>&1)))." >&2; \
	  echo "Install one, or say where it is: make $(or $(MAKECMDGOALS),book) PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	echo "Installing into $(VENV) with $$("$$python" --version). The first time this takes some minutes."; \
	"$$python" -m venv $(VENV) || { \
	  echo "Could not make $(VENV). On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[book,test]'
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r tests/attack_libraries.txt
	@touch $@

# uv (https://docs.astral.sh/uv) resolves for every Python and platform at once. Versions that
# stand in constraints.txt are kept while they fit.
lock:
	uv pip compile pyproject.toml --extra book --extra test --universal --python-version 3.11 \
	  --strip-extras --no-annotate --no-header --output-file constraints.txt
	@{ printf '%s\n' \
	  '# The exact versions that `make book` and `make test` install, for Python 3.11, 3.12 and 3.13.' \
	  '# Everything is resolved in one go; where it can be, the version is the one Colab has.' \
	  '# To renew: edit pyproject.toml, delete the lines to be renewed, run `make lock`.'; \
	  cat constraints.txt; } > constraints.new && mv constraints.new constraints.txt
	@{ sed '/^      # exact versions/q' environment.yml; \
	  sed -e '/^#/d' -e 's/.*/      - "&"/' constraints.txt; } > environment.new && mv environment.new environment.yml

clean:
	rm -rf _build
