# Every target sets up what it is missing. `make pretrain` is the main job, `make test` the tests.

PYTHON ?= python3.11
# PyTorch's own CPU index has a small build; from PyPI on Linux this one brings gigabytes of CUDA libraries.
# Name another build here, for example TORCH="torch==2.13.0+cpu --extra-index-url URL". On a machine with a GPU add the
# libraries of `pip install -e '.[gpu]'`, or train on the CPU with CUDA_VISIBLE_DEVICES= .
TORCH ?= torch==2.13.0
RECIPE ?= tiny
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready
GPU_READY := .venv/.gpu-ready

.PHONY: setup pretrain test test-full test-gpu check bench bench-gpu clean

setup: $(READY)

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(READY)

pretrain: $(READY)
	$(BIN)/nano-pretrain prepare recipe=$(RECIPE)
	$(BIN)/nano-pretrain launch recipe=$(RECIPE)
	$(BIN)/nano-pretrain export recipe=$(RECIPE)

test: $(READY)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not full and not gpu'

test-full: $(READY)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not gpu'

# Built against this environment's torch, with nvcc; so what they build with comes first.
$(GPU_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check hatchling editables setuptools wheel packaging ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[gpu]'
	touch $(GPU_READY)

test-gpu: $(GPU_READY)
	$(BIN)/pytest -m gpu

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.step --precision fp32
	$(BIN)/python -m benchmarks.step --precision bf16
	$(BIN)/python -m benchmarks.profile_step
	$(BIN)/python -m benchmarks.scan
	$(BIN)/python -m benchmarks.fp8
	$(BIN)/python -m benchmarks.order
	$(BIN)/python -m benchmarks.convert
	$(BIN)/nano-pretrain prepare recipe=tiny
	$(BIN)/python -m benchmarks.loader

bench-gpu: $(GPU_READY)
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
