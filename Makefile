# make demo and make test are all that most people need; each makes .venv first, the second with more in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip would compile every module of every package; few are imported, and Python compiles those then and keeps them.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE :=
WORKERS ?= 2
# glibc keeps freed memory for the next tensor: to give it back and to get it anew took a tenth of the tests' time.
KEEP_MEMORY = MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=33554432
PYTEST = $(KEEP_MEMORY) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
CXX_SOURCES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp')

.PHONY: install demo distill test emulation tests newest test-fast attack lint docs format bench bench-report gpu cuda-check clean

install: $(VENV)/built

$(VENV)/installed: requirements.txt
	@$(PYTHON) tools/toolchain.py  # refuses a Python that is too old
	@echo "dparallel-ext: installing the pinned packages of $< into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip==26.3  # installs in half the time of Python 3.11's own
	$(PIP) -r $<
	touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(shell find csrc tools -name '*.py' -o -path 'csrc/*' -type f)
	@echo "dparallel-ext: building the extension (half a minute on two cores)"
	$(PIP) --no-build-isolation --no-deps -e .
	@$(BIN)/python -c "import torch, dparallel_ext._C as c; i = c.build_info(); print('dparallel-ext: built', i['backends'], 'with torch', i['built_with_torch'])"
	touch $@

# Beside the build under `make --jobs`, which takes as long: they write different packages.
$(VENV)/packages: $(VENV)/installed requirements-dev.txt
	@echo "dparallel-ext: installing the pinned packages of requirements-dev.txt into $(VENV)"
	$(PIP) -r requirements-dev.txt
	touch $@

$(VENV)/developed: $(VENV)/built $(VENV)/packages
	touch $@

demo: install
	$(BIN)/dparallel demo

distill: $(VENV)/developed
	$(BIN)/python -m dparallel.toy.study --out out/distill

# cuda-check and newest run beside the rest, and emulation while pip, which takes one core, installs.
test:
	$(MAKE) --jobs 2 cuda-check emulation tests newest

# What executes the CUDA kernels without a GPU: the tests would build it, and need it.
emulation:
	$(PYTHON) tests/cuda_host/build.py

tests: $(VENV)/developed lint docs
	$(PYTEST) --durations 20

# DiffusionGemma with the newest transformers; `tests` has the pinned one.
newest: $(VENV)/developed $(VENV)/newest
	PYTHONPATH=$(VENV)/newest $(BIN)/python -m pytest tests/decoding/test_diffusion_gemma.py

$(VENV)/newest: $(VENV)/developed requirements-newest.txt
	rm -rf $@
	$(PIP) --no-deps --target $@ -r requirements-newest.txt

# For daily work: without what takes more than a few seconds.
test-fast: $(VENV)/developed lint
	$(PYTEST) -m "not slow"

# Random inputs, clients, files and kills, from a new seed; `tests` has a few cases of each.
ATTACK_SECONDS ?= 60 # for each test
ATTACK_SEED ?= $(shell date +%s)
attack: $(VENV)/developed
	$(PYTEST) tests/attack --attack-seconds $(ATTACK_SECONDS) --attack-seed $(ATTACK_SEED)

lint: $(VENV)/developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

# The site; strict: no link and no reference leads nowhere.
docs: $(VENV)/developed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/developed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/developed
	$(BIN)/python -m benchmarks --out out/bench

# The newest results of benchmarks/results and of `make bench`, into the README's figures.
bench-report: $(VENV)/developed
	$(BIN)/python -m benchmarks.report

# Builds for the GPU that is there and measures it, with the PYTHON whose torch is a CUDA build (no .venv).
GPU_OUT ?= out/gpu
GPU_MINUTES ?= 30
gpu:
	since=$$(date +%s) && \
	architecture=$$($(PYTHON) tools/toolchain.py gpu $(GPU_FLAGS)) && \
	DPARALLEL_CUDA="$${DPARALLEL_CUDA:-$$architecture}" $(PYTHON) setup.py build_ext --inplace && \
	$(PYTHON) -m benchmarks.gpu --out $(GPU_OUT) --minutes $(GPU_MINUTES) --since $$since $(GPU_FLAGS)

cuda-check:
	$(PYTHON) tools/cuda_check.py --if-available

clean:
	rm -rf build out dparallel_ext/_C*.so *.egg-info $(VENV)/built
