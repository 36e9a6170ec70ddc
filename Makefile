# All set-up happens here: an environment, torch, the compiled kernels. The targets and variables: `make help`.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
ifeq ($(VENV),)
  PY := $(PYTHON)
  STAMPS := build/stamps
  TORCH ?= torch>=2.8
  EXTRAS := test
  ADD_TRITON := :
else
  PY := $(VENV)/bin/python
  STAMPS := $(VENV)/stamps
  TORCH ?= torch==2.13.0
  # torchvision, which timm needs, would exchange a torch that it was not made for: only into an environment of ours
  EXTRAS := test,timm,imagefolder,vit-pytorch
  # A CUDA build of torch has brought its own Triton; a CPU build brings none.
  ADD_TRITON := $(PY) -c 'import triton' 2>/dev/null || extras="$$extras,triton"
endif

# A process a core, which tests/conftest.py gives one thread; a test that hangs fails after so many seconds.
WORKERS ?= --numprocesses=2 --dist=worksteal --timeout=900 --timeout-method=thread
# errors alone: with one q pip warns, for each package, of every folder of its configuration that is not there
PIP_INSTALL := $(PY) -m pip --disable-pip-version-check install -qq
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f)
CPP := $(filter %.cpp %.h %.cu %.cuh %.def,$(BUILD_INPUTS)) $(shell find tests/cuda/emulation -name '*.cpp' -o -name '*.h')
CLANG_FORMAT = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/clang-format

.PHONY: help demo test pytest lint format docs bench gpu-check matrix build clean

help:
	@echo 'make demo     train small vision transformers on handwritten digits and show what diversity did'
	@echo 'make test     lint, then the whole test suite; make pytest and make lint are its halves'
	@echo 'make format   let ruff and clang-format rewrite what make lint complains about'
	@echo 'make docs     build the documentation: build/docs/index.html'
	@echo 'make bench    measure speed and memory of the operations; build/bench.csv and build/bench.png'
	@echo 'make gpu-check  on a machine with an NVIDIA GPU: build in place, test and measure there, in twelve minutes, with'
	@echo '              the packages that PYTHON has; installs nothing. GPU_CHECK= takes its options: --tests or --benchmarks'
	@echo '              alone, --results DIR, --seconds N; benchmarks/results/README.md says what it leaves'
	@echo 'make matrix   build and test beside other releases of torch and Triton, for hours; MATRIX=--help tells how to'
	@echo '              do less'
	@echo 'make build    environment and kernels only; compiles what changed'
	@echo 'make clean    remove the environment and everything that was built'
	@echo
	@echo 'PYTHON=python3.12      the interpreter, 3.10 or newer (default: python3)'
	@echo 'VENV=folder            the environment, made if it is not there (default: .venv)'
	@echo 'VENV=                  no environment: install into that of PYTHON, beside the torch it has'
	@echo 'TORCH=torch==2.11.0    the torch to install (default: torch==2.13.0)'
	@echo 'Without a GPU, set PIP_EXTRA_INDEX_URL to the CPU index that the "Get started" page of pytorch.org names:'
	@echo 'the CUDA build of torch, which pip may choose otherwise, is gigabytes larger.'

demo: build
	$(PY) -m vitdiv_kernels.demo

test: lint pytest

pytest: build
	$(PY) -m pytest $(WORKERS)

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CPP)

format: build
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

docs: $(STAMPS)/docs
	$(PY) -m sphinx -W --keep-going -q -b html docs build/docs

bench: build
	rm -f build/bench.csv
	set -e; for bench in benchmarks/bench_*.py; do $(PY) $$bench --out build/bench.csv; done
	$(PY) benchmarks/plot.py build/bench.csv

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

matrix: build
	$(PY) tests/matrix.py $(MATRIX)

build: $(STAMPS)/package

$(STAMPS)/package: $(STAMPS)/environment $(BUILD_INPUTS)
	@echo 'Compiling the kernels and installing vitdiv_kernels with its tools ...'
	@extras='$(EXTRAS)'; $(ADD_TRITON); \
	  $(PIP_INSTALL) --no-build-isolation --editable ".[$$extras]" '$(TORCH)'
	@$(PY) -c 'import vitdiv_kernels._native' # says so when there are no kernels
	@touch $@

$(STAMPS)/docs: $(STAMPS)/package
	@$(PY) -c 'from importlib.metadata import requires; parts = (line.partition(";") for line in \
	  requires("vitdiv-kernels")); print(*(part[0] for part in parts if "docs" in part[2]))' | xargs $(PIP_INSTALL)
	@touch $@

$(STAMPS)/environment:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'Python 3.10 or newer is needed: name one with PYTHON=, as in make test PYTHON=python3.12'; exit 1; }
ifneq ($(VENV),)
	@$(PYTHON) -m venv $(VENV) || { echo 'No virtual environment could be made. On Debian and Ubuntu' \
	  'install the package python3-venv; or install into the environment of PYTHON: make test VENV='; exit 1; }
endif
	@echo 'Installing $(TORCH) and the build tools; this may take minutes ...'
	@$(PIP_INSTALL) '$(TORCH)' 'setuptools>=77' ninja 'cmake>=3.24'
	@mkdir -p $(STAMPS) && touch $@

clean:
	rm -rf .venv build *.egg-info vitdiv_kernels/_build.json vitdiv_kernels/_C.* vitdiv_kernels/libvitdiv.*
