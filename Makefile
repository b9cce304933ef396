# make demo   the main job and a short benchmark, from nothing but python3, g++ and make
# make test   the tests                    make test-slow   those that install the package
# make bench  every operation against torch as it is, with huge pages and compiled; writes benchmarks/results
# make gpu    builds the CUDA kernels and proves them on this machine's GPU; goes on where it was cut short
# make fuzz   random calls of every operation against torch in float64, FUZZ_SECONDS of them (300)
# make sanitize  the same and the operations' tests on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer
# make lint   what CI checks               make format      repairs what can be repaired
# make docs   the documentation site, in build/site; a warning is an error
# make dev    builds the extension in place (incremental)
# make integrations  installs the libraries that tests/test_integrations.py drops dlkernels into
# make stub   writes dlkernels/_C.pyi again, after a function of the extension was added or changed
#
# PYTHON=path uses a Python that has everything already; TORCH=... and PIP_INSTALL=... change what .venv is made of;
# MAX_JOBS limits the compilers, WORKERS the test processes that run at once.

VENV := .venv
PYTHON ?= $(VENV)/bin/python
TORCH ?= torch==2.13.0
PIP_INSTALL ?= $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet
WORKERS ?= 2

# An environment is made only where none was named. Each stamp stands for one finished installation step.
ifeq ($(PYTHON),$(VENV)/bin/python)
  DEMO_STAMP := $(VENV)/.demo-installed
  TEST_STAMP := $(VENV)/.test-installed
  LINT_STAMP := $(VENV)/.lint-installed
  INTEGRATIONS_STAMP := $(VENV)/.integrations-installed
  DOCS_STAMP := $(VENV)/.docs-installed
endif
# The pinned versions of the `lint` extra, installed without building the package.
LINT_TOOLS := $(shell sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
INTEGRATIONS := $(shell sed -n '/^integrations = \[/,/^]/s/^ *"\(.*\)",/\1/p' pyproject.toml)
CXX_FILES = $(shell find csrc tests/simt tests/emulated -name '*.cpp' -o -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Those of the `docs` extra: the site is made from sources alone, without torch and the extension.
DOCS_TOOLS := $(shell sed -n '/^docs = \[/,/^\]/s/^ *"\(.*\)".*/\1/p' pyproject.toml)
PYTHON_FILES = setup.py $(wildcard tools dlkernels tests benchmarks examples)

.PHONY: demo dev integrations docs stub test test-slow fuzz sanitize bench gpu lint format clean

demo: $(DEMO_STAMP)
	$(PYTHON) -m dlkernels train lenet --data digits
	$(PYTHON) -m dlkernels bench --quick --plot docs/bench.png

dev: $(TEST_STAMP)
	$(PYTHON) setup.py build_ext --inplace

integrations: $(INTEGRATIONS_STAMP)

stub: dev $(LINT_STAMP)
	$(PYTHON) tools/make_stub.py

# Test processes share the cores, so threads that wait for work sleep rather than spin.
test: dev
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n $(WORKERS) -m "not slow" $(PYTEST_ARGS)

test-slow: dev
	$(PYTHON) -m pytest -m slow $(PYTEST_ARGS)

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

bench: $(DEMO_STAMP) dev
	$(PYTHON) benchmarks/harness.py --providers thp,compile

# A machine with a GPU has an environment of its own: PYTHON=python3 makes none.
gpu: $(TEST_STAMP)
	$(PYTHON) tools/gpu.py $(GPU_ARGS)

# Command-line options of tests/fuzz: FUZZ_ARGS="--only conv2d --isa avx2 --seed 7".
FUZZ_SECONDS ?= 300
fuzz: dev
	$(PYTHON) -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

sanitize: $(TEST_STAMP)
	$(PYTHON) tools/sanitize.py $(SANITIZE_ARGS)

lint: $(LINT_STAMP)
	$(PYTHON) -m ruff check $(PYTHON_FILES)
	$(PYTHON) -m ruff format --check $(PYTHON_FILES)
	$(dir $(PYTHON))clang-format --dry-run -Werror $(CXX_FILES)
	$(PYTHON) -m mypy

format: $(LINT_STAMP)
	$(PYTHON) -m ruff check --fix $(PYTHON_FILES)
	$(PYTHON) -m ruff format $(PYTHON_FILES)
	$(dir $(PYTHON))clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f dlkernels/_C*.so dlkernels/_build_info.py

# torch comes first and alone: what follows finds it installed, so that no resolver exchanges it for another.
$(VENV)/.torch-installed:
	python3 -m venv $(VENV)
	$(PIP_INSTALL) "$(TORCH)" numpy
	touch $@

$(VENV)/.demo-installed: pyproject.toml | $(VENV)/.torch-installed
	@echo "Compiling dlkernels into $(VENV): a few minutes."
	$(PIP_INSTALL) --editable ".[cli,plot]"
	touch $@

$(VENV)/.test-installed: pyproject.toml | $(VENV)/.torch-installed
	@echo "Compiling dlkernels into $(VENV): a few minutes."
	$(PIP_INSTALL) --editable ".[test]"
	touch $@

$(VENV)/.docs-installed: pyproject.toml | $(VENV)/.torch-installed
	$(PIP_INSTALL) $(DOCS_TOOLS)
	touch $@

$(VENV)/.lint-installed: pyproject.toml | $(VENV)/.torch-installed
	$(PIP_INSTALL) $(LINT_TOOLS)
	touch $@

$(VENV)/.integrations-installed: pyproject.toml | $(VENV)/.torch-installed
	$(PIP_INSTALL) --no-deps torchvision==0.28.0 timm==1.0.31
	$(PIP_INSTALL) $(INTEGRATIONS)
	touch $@
