# make run     the main job: a Perceiver on a photograph, checked, timed and measured     (sets up .venv)
# make test    every test that this machine can run                                       (sets up .venv)
# make lint    style, types of the public API, direction of the imports                   (sets up .venv)
# make docs    the documentation as a site, in build/site, without a network               (sets up .venv)
# make gpu-test, make gpu-bench   the tests and the benchmarks on a GPU machine, with its own python; installs nothing
# make gpu-sanitize   compute-sanitizer's four tools over small calls of every CUDA C++ kernel, on a GPU machine
# make clean   removes .venv and everything that was built
#
# PYTHON=python3.12  another interpreter (3.10 or newer)     ARGS="..."  arguments for the command or for pytest
# PERCEIVER_KERNELS_BUILD_CUDA=auto|1|0, PERCEIVER_KERNELS_CUDA_ARCHS, MAX_JOBS  are read by setup.py
PYTHON ?= python3
ARGS   ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check
# What an installation is made of; when none of it changed, the stamps in .venv stand and setting up takes no time.
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

GPU := nvidia-smi -L >/dev/null 2>&1
NEW_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
# Originals that tests compare with and whose own dependencies, or Pythons, are of years ago, or fit one torch alone
# (timm's torchvision): only files of them are loaded.
BY_PATH := open_flamingo==2.0.1 perceiver-io==0.11.0 timm==1.0.31
TRITON := triton==3.6.0; sys_platform == "linux" and platform_machine == "x86_64"

.PHONY: help run test lint docs gpu-build gpu-test gpu-bench gpu-sanitize clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST)) | sed '/^What an installation/,$$d'

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=..." >&2; exit 1; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# On a GPU machine the torch that is there serves, through a .pth file; without a GPU torch and triton are pinned.
$(VENV)/.torch: $(VENV)/.created
	@if $(GPU) && $(PYTHON) -c '$(NEW_TORCH)' 2>/dev/null; then \
	  echo "== a GPU is here: using the torch of $(PYTHON)"; \
	  $(PYTHON) -c '$(SITE)' > "$$($(BIN)/python -c '$(SITE)')/outer-python.pth"; \
	elif $(GPU); then \
	  echo "== a GPU is here: installing torch with CUDA (gigabytes)"; \
	  $(PIP) install 'torch>=2.10'; \
	else \
	  echo "== no GPU is here: installing torch 2.13.0, and triton 3.6.0 for its interpreter"; \
	  $(PIP) install torch==2.13.0 && $(PIP) install '$(TRITON)' 'numpy<2.4'; \
	fi
	@touch $@

$(VENV)/.cli $(VENV)/.docs $(VENV)/.test: $(VENV)/.%: $(VENV)/.torch $(SOURCES)
	@echo "== installing perceiver-kernels[$*] into $(VENV); where nvcc is, compiling CUDA takes a minute"
	@$(PIP) install --quiet --editable '.[$*]'
	@$(if $(filter test,$*),$(PIP) install --quiet --no-deps --ignore-requires-python $(BY_PATH),:)
	@$(BIN)/python -c 'from perceiver_kernels import build_info as b; print("== CUDA library:", b.read()["reason"] or "built")'
	@touch $@

run: $(VENV)/.cli
	$(BIN)/perceiver-kernels run --output runs/latest $(ARGS)

# Triton's interpreter is chosen when kernels are imported: its tests are a process of their own.
test: $(VENV)/.test
	$(BIN)/python -m pytest tests --ignore tests/interpreter --numprocesses auto --dist worksteal --timeout 1200 $(ARGS)
	@if $(GPU); then echo "== a GPU ran the Triton kernels: not running them in the interpreter"; \
	else set -x; TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreter --numprocesses auto --dist worksteal --timeout 1200 $(ARGS); fi

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The variable leaves out mkdocs-material's notice about its successor.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

gpu-build:
	$(PYTHON) setup.py build_ext --inplace

gpu-test: gpu-build
	$(PYTHON) -m pytest tests --ignore tests/interpreter $(ARGS)

gpu-bench: gpu-build
	$(PYTHON) benchmarks/gpu_bench.py $(ARGS)

# The four tools at once, each of which has its say when it is done.
gpu-sanitize: gpu-build
	@$(MAKE) --no-print-directory --jobs 4 --output-sync $(addprefix sanitize-,memcheck racecheck initcheck synccheck)

# initcheck has to see every kernel, the others ours alone: torch's, of the expected results, take minutes.
sanitize-%:
	@echo "== $*"
	@PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $* --error-exitcode 1 \
	  $(if $(filter initcheck,$*),,--kernel-name kns=perceiver) $(PYTHON) tests/backends/cuda/sanitized.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks
	rm -f perceiver_kernels/*.so perceiver_kernels/_build_info.json
	find perceiver_kernels tests benchmarks examples docs -name __pycache__ -type d -prune -exec rm -rf {} +
