# SPDX-License-Identifier: Apache-2.0
# Sets up what it needs by itself: every target but help and clean makes .venv and installs nearsight into it, again when
# what is installed has changed. Asks for Python 3.10 or newer and no compiler.

VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
GALLERY := runs/gallery
IMAGES := docs/images
SITE := build/docs/html
# Python files are found where they lie; only these call for another installation. The packages are among them because an
# editable installation remembers which there were.
INSTALLED_FROM := pyproject.toml $(wildcard CMakeLists.txt csrc/*.* csrc/*/* src/nearsight/*/__init__.py src/nearsight/*/*/__init__.py)
# Each is touched last, so that a set-up which was interrupted is taken up again.
WITH_TRAIN := $(VENV)/.installed-train
WITH_DEV := $(VENV)/.installed-dev
# One worker per core, each on one thread, but no more than memory carries: every worker loads PyTorch.
WORKERS := --numprocesses auto --maxprocesses 4 --dist worksteal

# Many tests start processes, and each would compile the package and what it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-all quick check format bench pictures weights docs walk french clean distclean sound
.NOTPARALLEL:

help: ## show this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*## /  \1:/p' $(firstword $(MAKEFILE_LIST)) | while IFS=: read -r target text; do \
		printf '  %-10s %s\n' $$target "$$text"; done
	@echo "PYTHON=python3.12 chooses the Python for a new $(VENV), TORCH=cpu PyTorch's build for it: cpu, cu126 ..."
	@echo "PYTEST_ARGS='-k window' goes to pytest."

demo: $(WITH_TRAIN) ## train a network without convolutions on handwritten digits, and show its report
	rm -rf $(DEMO)
	$(BIN)/nearsight train --model sasa_nano --data digits --output $(DEMO)
	@echo "The report: $(CURDIR)/$(DEMO)/report.html"
	@if [ "$$(uname -s)" = Darwin ]; then opener=open; elif [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ]; then opener=xdg-open; fi; \
	if [ -z "$$CI" ] && [ -n "$$opener" ] && command -v $$opener >/dev/null; then \
		$$opener $(DEMO)/report.html >/dev/null 2>&1 || true; fi

test: $(WITH_DEV) ## run the tests: one case of every kind
	$(BIN)/python -m pytest $(WORKERS) -m "not sweep" $(PYTEST_ARGS)

test-all: $(WITH_DEV) ## run them with the long sweeps: every geometry, instruction set, compiler and sanitizer
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

quick: $(WITH_DEV) ## run the tests that take seconds
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not sweep" $(PYTEST_ARGS)

check: $(WITH_DEV) ## look at format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/biome lint --error-on-warnings

format: $(WITH_DEV) ## put the code into the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(WITH_TRAIN) ## measure the speed and memory that the README claims
	$(BIN)/nearsight bench layers
	$(BIN)/python bench/unfold.py

# Every picture of the documentation stands here with the command that draws it; a test holds the folder to it. The networks
# that are looked at are trained where $(GALLERY) does not hold them. The numbers of convert_heads are of a run of 25 minutes:
# examples/convert_fashion_mnist.py leaves them as heads.csv.
pictures: $(WITH_DEV) ## draw the pictures of docs/images anew, with the networks in runs/gallery
	$(BIN)/python examples/gallery.py --runs $(GALLERY) --output $(IMAGES)/gallery
	$(BIN)/python examples/memory_blocks.py $(IMAGES)/memory_blocks.svg
	$(BIN)/python examples/windows.py $(IMAGES)/windows.svg
	$(BIN)/python examples/convert_heads.py $(IMAGES)/convert_heads.csv $(IMAGES)/convert_heads.svg

# On one thread, where the order of sums is one. Their card, src/nearsight/models/weights/sasa_nano.digits.md, holds the accuracy.
weights: $(WITH_TRAIN) ## train the weights that come with the package anew
	rm -rf runs/weights
	OMP_NUM_THREADS=1 $(BIN)/nearsight train --model sasa_nano --data digits --output runs/weights
	cp runs/weights/model.safetensors src/nearsight/models/weights/sasa_nano.digits.safetensors

# A page that is not in the menu, a link or a place that is not there, a cell of a notebook that fails: each is an error.
# French first, since the links of both languages are checked with the English pages; what ran for one serves the other.
docs: $(WITH_DEV) ## build the documentation as a site, and run its notebooks
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --jobs 2 --tag french \
		--doctree-dir build/docs/read-fr docs $(SITE)/fr
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --jobs 2 --doctree-dir build/docs/read docs $(SITE)
	@echo "The site: $(CURDIR)/$(SITE)/index.html"

french: $(WITH_DEV) ## bring the French catalogues up to the English pages, and list what has no French
	$(BIN)/python docs/_site/update_french.py

walk: docs ## look at every page of the site in a browser, wide and narrow
	$(BIN)/python -m pytest $(WORKERS) docs/_site/test_walk.py $(PYTEST_ARGS)

clean: ## remove caches and build output
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis lightning_logs
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv and the demo as well
	rm -rf $(VENV) $(DEMO)

# PyTorch by itself has CUDA on Linux, several gigabytes; its maker keeps the other builds apart.
PYTORCH = $(if $(TORCH),$(BIN)/python -m pip install --index-url https://download.pytorch.org/whl/$(TORCH) torch torchvision)

$(WITH_TRAIN): $(INSTALLED_FROM) | sound $(BIN)/pip
	$(PYTORCH)
	$(BIN)/python -m pip install --editable '.[train]'
	@touch $@

$(WITH_DEV): $(INSTALLED_FROM) | sound $(BIN)/pip
	$(PYTORCH)
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $(WITH_TRAIN) $@

# A .venv holds the paths of its place and its Python: moved or copied with the checkout it runs the code of the other place or
# nothing, and so it does after its Python was removed or replaced by a newer one.
define SOUND
import importlib.util, os, sys
spec = importlib.util.find_spec("nearsight")
if spec is None:
    sys.exit(any(map(os.path.exists, ("$(WITH_TRAIN)", "$(WITH_DEV)"))))
here = os.path.exists(spec.origin) and os.path.samefile(spec.origin, "src/nearsight/__init__.py")
sys.exit(not here and not spec.origin.startswith(sys.prefix + os.sep))
endef
export SOUND

sound:
	@if [ -e $(VENV) ] && ! $(BIN)/python -I -c "$$SOUND" 2>/dev/null; then \
		echo "$(VENV) does not belong to this place or to a Python that is still here:" \
			"make distclean, then the same command sets it up anew"; \
		exit 1; \
	fi

# The first Python that is new enough. An existing .venv that works is kept, however it was made.
$(BIN)/pip:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10 python3.14 python); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
			if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
				echo "$$python cannot make a virtual environment: it lacks ensurepip or venv." \
					"On Debian and Ubuntu: apt install python3-venv"; \
				exit 1; \
			fi; \
			echo "$$python -m venv $(VENV)"; \
			exec "$$python" -m venv $(VENV); \
		fi; \
	done; \
	echo "nearsight needs Python 3.10 or newer and $(or $(PYTHON),no python3 here) is it:" \
		"install one, or name it with PYTHON=/path/to/python"; \
	exit 1
