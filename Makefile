# The two commands of the README. TORCH is the CPU build that both use; the package itself does not pin it.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin

.PHONY: demo test test-slow test-soak test-browser test-low coverage mutation check docs notebooks benchmarks hostile fuzz lock \
    audit-packages licences sbom clean

# CI sets LOCK=.ci/requirements.lock: then everything but torch comes in the versions and with the hashes of that file.
# torch is left out of it, since its CPU build lies in another place on every machine; TORCH names its version.
LOCK   ?=

$(VENV)/.installed: pyproject.toml Makefile $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(if $(LOCK),$(BIN)/pip install --quiet --require-hashes --no-deps -r $(LOCK))
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

# The lowest versions that pyproject.toml admits, in an environment of their own.
$(VENV)-low/.installed: pyproject.toml Makefile .ci/lowest.txt
	$(PYTHON) -m venv $(VENV)-low
	$(VENV)-low/bin/pip install --quiet --upgrade pip
	$(VENV)-low/bin/pip install --quiet $(TORCH)
	$(VENV)-low/bin/pip install --quiet -e '.[dev]' -c .ci/lowest.txt
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

# Two thousand steps of every tuner and of the heads behind it: nothing may grow, drift or become NaN.
test-soak: $(VENV)/.installed
	$(BIN)/python -m pytest -m soak -s

# Needs Chromium (apt-get install chromium).
test-browser: $(VENV)/.installed
	$(BIN)/python -m pytest -m browser

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict --quiet

# Runs the notebooks' sources again and keeps their pictures.
notebooks: $(VENV)/.installed
	$(BIN)/python -m examples.notebooks.build

test-low: $(VENV)-low/.installed
	$(VENV)-low/bin/python -m pytest -W 'ignore:The `device` argument is deprecated:FutureWarning'  # of FLAVA, in transformers 4.57

# 12,000 hostile files for every loader; another seed draws others: make hostile SEED=7.
SEED ?= 2
hostile: $(VENV)/.installed
	FVG_HOSTILE_CASES=12000 FVG_HOSTILE_SEED=$(SEED) $(BIN)/python -m pytest -s --timeout 3600 tests/test_hostile.py

# Guided by coverage, for ten minutes; what it finds beside the committed corpus stays in output/.
fuzz: $(VENV)/.installed
	$(BIN)/pip install --quiet 'atheris>=3'
	mkdir -p output/corpus
	$(BIN)/python tests/fuzz/loaders.py output/corpus tests/fuzz/corpus -max_total_time=600 -artifact_prefix=output/

# The supply chain. WHEELS is where a CPU build of torch lies, so that the lock file holds nothing of CUDA.
WHEELS ?= https://download.pytorch.org/whl/cpu/torch/
lock: $(VENV)-tools/.installed
	$(VENV)-tools/bin/uv pip compile pyproject.toml --extra dev --python-version 3.11 --generate-hashes \
	    --no-emit-package torch --find-links $(WHEELS) -c .ci/torch.txt --no-header --no-annotate --upgrade \
	    --quiet -o .ci/requirements.lock

audit-packages: $(VENV)-tools/.installed
	$(VENV)-tools/bin/pip-audit --disable-pip --no-deps -r .ci/requirements.lock

licences: $(VENV)/.installed
	$(BIN)/python .ci/licences.py

sbom: $(VENV)/.installed $(VENV)-tools/.installed
	mkdir -p output
	$(VENV)-tools/bin/cyclonedx-py environment $(BIN)/python --output-reproducible -o output/sbom.json

$(VENV)-tools/.installed:
	$(PYTHON) -m venv $(VENV)-tools
	$(VENV)-tools/bin/pip install --quiet uv pip-audit cyclonedx-bom
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-low $(VENV)-tools mutants output build dist site
