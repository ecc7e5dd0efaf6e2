# Two commands matter: `make reproduce` and `make test`. Each creates .venv by itself when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NOTEBOOKS := $(wildcard notebooks/[0-9]*.ipynb)
PARAMS ?= notebooks/params/town.yaml
OUT ?= data/runs/reproduce
TESTS ?=
# numpy stops at the name of a feature that this machine does not have, so only those found are switched off.
AVX512 = $$($(BIN)/python -c 'from numpy._core._multiarray_umath import __cpu_dispatch__ as known, __cpu_features__ as has; \
    print(*(name for name in known if has[name] and (name == "X86_V4" or name.startswith("AVX512"))))')

export MPLBACKEND := Agg
export JUPYTER_PLATFORM_DIRS := 1
export PYTHONWARNINGS ?= ignore::DeprecationWarning
export TOKENIZERS_PARALLELISM := false

.PHONY: help install reproduce test test-unit test-notebooks test-processors test-faults soak test-browser test-versions fuzz lab bench lint docs results notebooks clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# environment.yml is the one list of exact versions; the lines with "==" are what pip installs.
$(STAMP): environment.yml pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sagelib needs Python 3.11 or newer, and $(PYTHON) is older: give another one, as in 'make PYTHON=python3.11 $(MAKECMDGOALS)'"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@sed -n 's/^ *- \([A-Za-z0-9_-]*==.*\)$$/\1/p' environment.yml > $(VENV)/requirements.txt
	@echo "installing $$(wc -l < $(VENV)/requirements.txt) pinned packages (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt --editable .
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (sagelib)" > /dev/null
	@touch $@

install: $(STAMP)  ## create .venv and install the pinned versions

reproduce: $(STAMP)  ## run the ordered notebooks headlessly on the town, from rendering to the recall table
	$(BIN)/python notebooks/reproduce.py --parameters $(PARAMS) --out $(OUT)

test: test-unit test-notebooks  ## every test, then every notebook against its stored outputs

# No test and no page has a network: whoever asks for one, unasked, fails.
test-unit test-notebooks: export PYTHONPATH := $(CURDIR)/tests/offline$(if $(PYTHONPATH),:$(PYTHONPATH))

# Two test processes, one thread each: on small tensors, threads that fight for cores cost more than they give.
test-unit: export OMP_NUM_THREADS ?= 1
test-unit: $(STAMP)
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && SAGE_RUNS="$$runs" \
	    $(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

test-notebooks: export OMP_NUM_THREADS ?= 1
test-notebooks: $(STAMP)
	runs=$$(mktemp -d) || exit 1; trap 'rm -rf "$$runs"' EXIT; export SAGE_RUNS="$$runs"; failed=0; \
	    $(BIN)/python -m pytest -p no:cacheprovider --nbval --nbval-cell-timeout=240 --nbval-sanitize-with tests/nbval_sanitize.cfg \
	        -n 2 --dist loadfile $(NOTEBOOKS) || failed=1; \
	    $(BIN)/python notebooks/expected.py compare "$$runs" $(NOTEBOOKS) || failed=1; \
	    exit $$failed

# For a part of it: make test-processors TESTS=tests/test_retrieval.py NOTEBOOKS=notebooks/01_data_exploration.ipynb
test-processors: $(STAMP)  ## every test as on other processors: fewer vector instructions, one thread and two
	@vectors="$(AVX512)"; failed=0; \
	for setting in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 \
	        OMP_NUM_THREADS=1 OMP_NUM_THREADS=2 "NPY_DISABLE_CPU_FEATURES=$$vectors"; do \
	    log=$$(mktemp); \
	    if env "$$setting" $(MAKE) test > "$$log" 2>&1; then echo "passed  $$setting"; rm "$$log"; \
	    else echo "FAILED  $$setting; its whole output is in $$log, which ends:"; tail -n 20 "$$log"; failed=1; fi; \
	done; exit $$failed

test-faults: $(STAMP)  ## kill every command at random moments, a hundred times in all, and fill its disk
	SAGE_KILLS=100 $(BIN)/python -m pytest -s tests/test_faults.py tests/test_strangers.py

soak: $(STAMP)  ## describe, index, search and evaluate for half an hour: memory and open files stay flat
	$(BIN)/python tests/soak.py --minutes 30 --pictures 20000

test-browser: $(STAMP)  ## open every notebook in JupyterLab in a real browser
	SAGE_BROWSER=all $(BIN)/python -m pytest -m browser tests

# For a part of it: make test-versions VERSIONS=lowest PYTHONS=3.12 TESTS=tests/test_places.py
test-versions:  ## the suite at the lowest versions admitted and the newest on the index, on each Python that is here
	$(PYTHON) tests/versions.py $(or $(VERSIONS),lowest newest) $(if $(PYTHONS),--pythons $(PYTHONS)) $(if $(TESTS),--tests $(TESTS))

fuzz: export OMP_NUM_THREADS ?= 1
fuzz: $(STAMP)  ## 10,000 broken files into every reader
	SAGE_FUZZ=$(or $(CASES),10000) $(BIN)/python -m pytest -n 2 tests/test_bad_input.py

# A page that you have worked on stays; delete lab/ to begin with fresh ones.
lab: $(STAMP)  ## JupyterLab on a copy of the notebooks, in lab/
	@cd notebooks && for file in *.ipynb solutions/*.ipynb pictures/*; do \
	    mkdir -p "../lab/$$(dirname "$$file")" && { test -e "../lab/$$file" || cp "$$file" "../lab/$$file"; }; done
	@$(BIN)/jupyter trust lab/*.ipynb lab/solutions/*.ipynb > /dev/null  # their stored tables keep their style
	$(BIN)/python -m jupyterlab lab

bench: $(STAMP)  ## speeds and memory, each as a ratio against a named alternative in the same run
	$(BIN)/python -m pytest tests/benchmarks -o python_files='bench_*.py' --benchmark-only -s --timeout 0

lint: $(STAMP)  ## ruff on the modules, the tests and the notebooks
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

docs: $(STAMP)  ## pages of the API, in build/docs
	$(BIN)/python -m pdoc --docformat numpy --math --output-directory build/docs sagelib workbench townscape

results: $(STAMP)  ## train and evaluate the small runs that come with the workbench (data/results)
	$(BIN)/python notebooks/ship.py

# The pages run three times more as on other processors, the last time on a town that is rendered so too; how far their numbers then
# lie apart says how far they may be off in a test.
notebooks: export OMP_NUM_THREADS = 1
notebooks: $(STAMP)  ## run the notebooks in place, keep their outputs and record their key numbers
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	    execute="$(BIN)/python -m jupyter nbconvert --to notebook --execute --ExecutePreprocessor.record_timing=False" && \
	    SAGE_RUNS="$$runs/here" $$execute --inplace $(NOTEBOOKS) && \
	    ATEN_CPU_CAPABILITY=default SAGE_RUNS="$$runs/torch" $$execute --output-dir "$$runs/pages" $(NOTEBOOKS) && \
	    ONEDNN_MAX_CPU_ISA=SSE41 SAGE_RUNS="$$runs/onednn" $$execute --output-dir "$$runs/pages" $(NOTEBOOKS) && \
	    rm -rf data/town-small && \
	    NPY_DISABLE_CPU_FEATURES="$(AVX512)" SAGE_RUNS="$$runs/numpy" $$execute --output-dir "$$runs/pages" $(NOTEBOOKS) && \
	    rm -rf data/town-small && \
	    $(BIN)/python notebooks/expected.py record "$$runs/here" "$$runs/torch" "$$runs/onednn" "$$runs/numpy" $(NOTEBOOKS)

clean:  ## remove .venv and caches (never data)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
