# make demo | test | check | lab | site | export | diff | house | gpu | help: each sets up .venv on first use.
VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN    := $(VENV)/bin
TWO    := -n 2 --dist loadgroup --no-loadscope-reorder  # two tests at a time, the longest first (tests/conftest.py)

.PHONY: help demo test check lab site export diff house gpu
help:  ## list these commands
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/'

demo: $(VENV)/.installed  ## make the synthetic set, train the baseline through papermill, build the site
	$(BIN)/reidbook data make synthetic-small
	$(BIN)/reidbook run --dataset synthetic-small --method baseline --seed 0
	$(BIN)/reidbook ls
	$(BIN)/reidbook site

test: $(VENV)/.installed  ## everything CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(TWO) --durations=20 tests

check: $(VENV)/.installed  ## under three minutes: lint, exports, style, words, and the tests of what changed since main
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(TWO) $$($(BIN)/python tests/changed.py)

lab: $(VENV)/.installed  ## open JupyterLab at the tour
	$(BIN)/jupyter lab nbs/00_tour.ipynb

site: $(VENV)/.installed  ## render the book and its runs into _docs/
	$(BIN)/reidbook site

export: $(VENV)/.installed  ## after editing notebooks: modules, clean notebooks, README
	$(BIN)/nbdev_export && rm -f pyproject.toml  # setup.py and settings.ini say it all
	$(BIN)/nbdev_clean
	$(BIN)/python -c 'from reidbook.site import make_readme; make_readme()'

gpu: $(VENV)/.installed  ## measure on this machine's GPU what nbs/19d_gpu.ipynb shows
	$(BIN)/python tests/gpu/day.py --out gpu.json

# notebooks as text: prose and code, no outputs, no metadata; make diff SINCE=main..branch
SINCE ?= HEAD
diff: $(VENV)/.installed  ## what changed in the notebooks, as text
	@git -c diff.ipynb.textconv="$(abspath $(BIN))/jupytext --quiet --to md:markdown --opt notebook_metadata_filter=-all --output -" -c diff.ipynb.cachetextconv=false --no-pager diff $(SINCE) -- '*.ipynb'

house: $(VENV)/.installed  ## every notebook with its job, cells and exported lines; every module with its imports
	@$(BIN)/python tests/house.py

# torch and faiss are their CUDA builds: about 7 GB, a minute or two
$(VENV)/.installed: settings.ini setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "reidbook needs Python 3.11 or newer; found " + sys.version.split()[0] + ". Try: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,site]'
	touch $@
