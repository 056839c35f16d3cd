# Every target sets up what it needs in $(VENV); a second run only does what changed.
PYTHON ?= python3
VENV ?= .venv
BENCH_OUT ?= bench-out
BENCH_ARGS ?=
PYTEST_ARGS ?=
# LD_PRELOAD of the sanitizer's runtime is written for g++.
SANITIZE_CXX ?= g++

PY := $(VENV)/bin/python
SANITIZE := address;undefined
SANITIZE_SITE := build/sanitize/site
CXX_FILES = $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
NVCC := $(or $(CUDACXX),$(and $(CUDA_HOME),$(wildcard $(CUDA_HOME)/bin/nvcc)),$(shell command -v nvcc))
BUILD_INPUTS := CMakeLists.txt setup.py pyproject.toml rnnlm_kernels/_version.py $(shell find csrc -type f)

export PIP_DISABLE_PIP_VERSION_CHECK = 1
unexport PYTHONPATH PYTHONHOME
ifeq ($(NVCC),)
# What `make cuda-toolkit` installed, if it did.
export CUDA_HOME = $(wildcard $(abspath $(VENV))/cuda/nvidia/cu*)
endif

.DEFAULT_GOAL := help
.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) PYTEST_ARGS= BENCH_OUT=$(BENCH_OUT) BENCH_ARGS="
	@echo "           RNNLM_BUILD_CUDA=auto|0|1 RNNLM_CUDA_ARCHS= RNNLM_WERROR=0|1 (see CMakeLists.txt)"

.PHONY: test
test: $(VENV)/.built ## build and run the whole test suite
	@$(PY) -m pytest $(PYTEST_ARGS)

.PHONY: bench
bench: $(VENV)/.built ## measure against torch.nn; prints the table and where plot and data are
	@$(VENV)/bin/rnnlm-kernels bench --out $(BENCH_OUT) $(BENCH_ARGS)

.PHONY: lint
lint: $(VENV)/.required ## ruff, mypy and clang-format, changing nothing
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

.PHONY: format
format: $(VENV)/.required ## let ruff and clang-format rewrite the sources
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CXX_FILES)

# The sanitized module lives in a package folder of its own. The tests start in that folder, so that it comes before
# the source tree on sys.path. libstdc++ is preloaded because the sanitizer must find __cxa_throw when Python starts, and
# --capture=sys leaves file descriptor 2, where it reports before it ends the process, to the terminal.
.PHONY: sanitize
sanitize: $(VENV)/.required ## ASan and UBSan build of the native module, tests marked `sanitize`
	@command -v $(SANITIZE_CXX) >/dev/null || { echo "make sanitize needs g++ (or SANITIZE_CXX=...)" >&2; exit 1; }
	@echo "building rnnlm_kernels._C with $(SANITIZE)"
	@log=$$(mktemp); CXX=$(SANITIZE_CXX) RNNLM_SANITIZE="$(SANITIZE)" RNNLM_BUILD_CUDA=0 $(PY) setup.py -q build \
	    --build-base build/sanitize --build-lib $(SANITIZE_SITE) >$$log 2>&1 \
	  && rm $$log || { cat $$log; rm $$log; exit 1; }
	@cd $(SANITIZE_SITE) && \
	  LD_PRELOAD="$$($(SANITIZE_CXX) -print-file-name=libasan.so) $$($(SANITIZE_CXX) -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(abspath $(PY)) -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -p no:cacheprovider \
	  --capture=sys -m sanitize $(CURDIR)/tests

.PHONY: cuda-toolkit
cuda-toolkit: $(if $(NVCC),,$(VENV)/cuda/.installed) ## nvcc from PyPI (102 MB), where the machine has none
	@echo "nvcc: $(or $(NVCC),$$(echo $(VENV)/cuda/nvidia/cu*/bin/nvcc))"

.PHONY: compile-check
compile-check: cuda-toolkit $(VENV)/.required ## compile the CUDA kernels for every GPU, check what came out
	@$(PY) scripts/cuda_resources.py

.PHONY: wheel
wheel: $(VENV)/.required ## sdist and wheel in dist/
	@$(PY) -m build --no-isolation
	@ls -l dist

.PHONY: clean
clean: ## remove what was built; the virtual environment stays
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)/.built
	@find rnnlm_kernels \( -name '_C*.so' -o -name '_emulated*.so' \) -delete
	@find $(wildcard rnnlm_kernels tests benchmarks scripts) -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: FORCE
FORCE:

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: set PYTHON=/path/to/python (3.10+)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else \
	  "rnnlm-kernels needs Python 3.10 or newer; $(PYTHON) is %d.%d. Set PYTHON=/path/to/another" % v[:2])'
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) -m venv failed. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.required: requirements/dev.txt | $(VENV)/.created
	@echo "installing requirements/dev.txt into $(VENV)"
	@$(PY) -m pip install --quiet -r $<
	@touch $@

# Beside the other packages, not among them: a torch for GPUs asks for its own versions of some of these.
$(VENV)/cuda/.installed: requirements/cuda.txt | $(VENV)/.created
	@echo "installing requirements/cuda.txt into $(VENV)/cuda"
	@rm -rf $(VENV)/cuda
	@$(PY) -m pip install --quiet --no-deps --target $(VENV)/cuda -r $<
	@touch $@

# A build for development holds CUDA kernels for the GPUs of this machine, without one none: for all architectures it
# would take many minutes. `make compile-check` compiles them all, tests run them in an emulator, wheels contain them, and
# RNNLM_BUILD_CUDA=1 or RNNLM_CUDA_ARCHS decide otherwise. (90a is what nvcc calls 9.0 with all its instructions.)
ifeq ($(RNNLM_BUILD_CUDA)$(RNNLM_CUDA_ARCHS),)
gpu_archs = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n 's/^\([0-9]*\)\.\([0-9]\)$$/\1\2-real/p' | sed s/^90-/90a-/ | sort -u)
$(VENV)/.settings $(VENV)/.built: export RNNLM_CUDA_ARCHS = $(gpu_archs)
$(VENV)/.settings $(VENV)/.built: export RNNLM_BUILD_CUDA = $(if $(gpu_archs),auto,0)
endif

# What decides how the module is built but is no file. Rewritten only when it changes; the folder is here because an
# editable install and the scripts of a virtual environment hold absolute paths.
$(VENV)/.settings: FORCE | $(VENV)/.created
	@printf '%s\n' "$(CURDIR)" "$$RNNLM_BUILD_CUDA" "$$RNNLM_CUDA_ARCHS" "$$RNNLM_WERROR" "$$CC" "$$CXX" "$$CXXFLAGS" \
	  "$$CUDACXX" "$$CUDA_HOME" "$$(command -v nvcc)" > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# Built again, too, when somebody removed a module from the source tree.
$(VENV)/.built: $(BUILD_INPUTS) $(VENV)/.required $(VENV)/.settings \
    $(if $(and $(wildcard rnnlm_kernels/_C*.so),$(wildcard rnnlm_kernels/_emulated*.so)),,FORCE)
	@echo "building rnnlm_kernels._C and, for the tests, rnnlm_kernels._emulated"
	@RNNLM_BUILD_EMULATOR=1 $(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@$(PY) -c "from rnnlm_kernels import _C; info = _C.build_info(); print('built with', info['compiler'], \
	  'and CUDA ' + info['cuda_version'] if info['cuda'] else 'for the CPU only')"
	@touch $@
