# make demo    train a small detector on the embedded digits and draw what it finds
# make test    the fast tests          make test-slow   the others      make test-all   both
# make lint    ruff and mypy
# make env     .venv with everything   make cuda        compile the CUDA kernels, or fail
# make fuzz    random calls of the compiled operators under sanitizers (needs GCC), and hostile files
# make clean   remove what the commands wrote
# make gpu-check   build, test and measure the CUDA operators; needs an NVIDIA GPU and PyTorch
#
# Each but the last two creates .venv first, unless it is there and up to date, and builds the
# operators of csrc/ again when they changed. To use another Python: make PYTHON=python3.12 env

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# Python compiles what is imported when it is imported first; pip would compile all of it.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# One test process for each core, each with one thread; `make test PYTEST=".venv/bin/python -m pytest -x"`
# runs them one after the other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

DEMO_CONFIG := configs/digits_dn_deformable_detr.py
DEMO_DATA := datasets/digits
DEMO_OUTPUT := output/demo
# Arguments of tools/make_digits.py and overrides of the config, for instance
# make demo DEMO_OVERRIDES="train.max_iter=100"
DEMO_DIGITS :=
DEMO_OVERRIDES :=

# What `make cuda` compiles for; no GPU is needed.
CUDA_ARCHITECTURES := 8.0;9.0;10.0+PTX

# For how long to fuzz, on every core, after a build of a minute or two; or the one case to repeat,
# for instance make fuzz FUZZ_SEED=7. FUZZ_LIBRARY=emulated takes the CUDA kernels over the tests'
# emulator instead of those of the CPU.
FUZZ_LIBRARY := C
FUZZ_SECONDS := 20
FUZZ_SEED :=

.PHONY: env cuda demo test test-slow test-all lint fuzz fuzz-files fuzz-library gpu-check clean

env: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	@echo "Setting up .venv and building the operators; the first time takes some minutes."
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("dn_detr needs Python 3.10 or newer, but $(PYTHON) is %d.%d: make PYTHON=python3.12 env" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) -c constraints.txt torch setuptools
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[demo,dev]'
	@cat dn_detr/_C*.missing.txt 2>/dev/null || true
	@touch $@

# The compiler comes from pip where the machine has none; torch brings the runtime it belongs to.
cuda: $(INSTALLED)
	@test -n "$$CUDA_HOME" || command -v nvcc >/dev/null || $(PIP) 'cuda-toolkit[nvcc]'
	@DN_DETR_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" \
		$(BIN)/python setup.py --quiet build_ext --inplace
	@$(BIN)/python -c "from dn_detr.ops import build_info; print(build_info()['_C_cuda.so'])"

demo: $(INSTALLED)
	@test ! -e $(DEMO_OUTPUT) || test -e $(DEMO_OUTPUT)/config.yaml || \
		{ echo "$(DEMO_OUTPUT) is no run of the demo; remove it yourself"; exit 1; }
	@rm -rf $(DEMO_OUTPUT)
	@start=$$(date +%s) && \
	$(BIN)/python tools/make_digits.py --root $(DEMO_DATA) $(DEMO_DIGITS) && \
	$(BIN)/python tools/train_net.py --config-file $(DEMO_CONFIG) \
		dataloader.root=$(DEMO_DATA) train.output_dir=$(DEMO_OUTPUT) $(DEMO_OVERRIDES) && \
	$(BIN)/python tools/make_pictures.py --run $(DEMO_OUTPUT) && \
	echo "The demo took $$(( $$(date +%s) - start )) seconds."

test: $(INSTALLED)
	@$(PYTEST)

test-slow: $(INSTALLED)
	@$(PYTEST) -m slow

# One process more than there are cores: many of the slow tests wait for others that they start.
test-all: $(INSTALLED)
	@$(PYTEST) -m "slow or not slow" --numprocesses $$(( $$(nproc 2>/dev/null || echo 2) + 1 ))

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary

fuzz: fuzz-library
	@$(BIN)/python tests/fuzz/fuzz.py --library build/sanitized/$(FUZZ_LIBRARY).so \
		--seconds $(FUZZ_SECONDS) $(FUZZ_SEED:%=--seed=%)
	@$(MAKE) --silent fuzz-files

# Weights files and configs; one case again: python -m tests.fuzz.weights --seed 7
fuzz-files: $(INSTALLED)
	@$(BIN)/python -m tests.fuzz.configs --seconds $(FUZZ_SECONDS) & configs=$$!; \
		$(BIN)/python -m tests.fuzz.weights --seconds $(FUZZ_SECONDS); weights=$$?; \
		wait $$configs && exit $$weights

fuzz-library: $(INSTALLED)
	@$(MAKE) --silent -j 4 -f tests/fuzz/library.mk PYTHON=$(BIN)/python \
		build/sanitized/$(FUZZ_LIBRARY).so

# Builds, tests and measures the CUDA operators where there is an NVIDIA GPU, with a Python that has
# PyTorch; downloads nothing. GPU_WHEELS names a folder of wheels of the packages that it lacks.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_WHEELS ?=

gpu-check:
	@$(GPU_PYTHON) tests/gpu/check.py $(if $(GPU_WHEELS),--wheels $(GPU_WHEELS))

clean:
	rm -rf output datasets/digits build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
