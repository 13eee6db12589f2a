# The two commands of the README. TORCH is the CPU build that both use; the package itself does not pin it.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin

.PHONY: demo test test-slow test-browser test-low coverage mutation check docs notebooks benchmarks clean

$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

# The lowest versions that pyproject.toml admits, in an environment of their own.
$(VENV)-low/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)-low
	$(VENV)-low/bin/pip install --quiet --upgrade pip
	$(VENV)-low/bin/pip install --quiet $(TORCH)
	$(VENV)-low/bin/pip install --quiet -e '.[dev]' 'transformers==4.57.*' 'huggingface_hub<1' 'peft==0.17.*'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/fvg-adapter train examples/pocket/data --model examples/pocket/model --tuner coop \
	    --tuner-options '{"ctx_init": "a photo of a"}' --tune-lr 0.05 --tune-epochs 20 --tune-batch 32 \
	    --min-crop 0.5 --shots 16 --seeds 1,2,3 --views 4 --output output/demo

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check fvg_adapter tests
	$(BIN)/mypy
	$(BIN)/lint-imports

# Some ten minutes on two idle cores; one group again: make benchmarks ONLY="--only inference".
benchmarks: $(VENV)/.installed
	$(BIN)/python -m benchmarks $(ONLY)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# Every line and branch of the package that the default tests run; below 95 % it fails.
coverage: $(VENV)/.installed
	$(BIN)/python -m pytest --cov --cov-report=term-missing

# Small changes to the code, one at a time: do the tests notice? Half an hour on two idle cores.
mutation: $(VENV)/.installed
	$(BIN)/python tests/mutation.py

# Needs Chromium (apt-get install chromium).
test-browser: $(VENV)/.installed
	$(BIN)/python -m pytest -m browser

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict --quiet

# Runs the notebooks' sources again and keeps their pictures.
notebooks: $(VENV)/.installed
	$(BIN)/python -m examples.notebooks.build

test-low: $(VENV)-low/.installed
	$(VENV)-low/bin/python -m pytest

clean:
	rm -rf $(VENV) $(VENV)-low mutants output build dist site
