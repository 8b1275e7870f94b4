# make demo    train a small detector on the embedded digits and draw what it finds
# make test    the fast tests          make test-slow   the others
# make lint    ruff and mypy           make clean       remove what the commands wrote
#
# Each of them creates .venv first, unless it is there and up to date. To use another Python:
# make PYTHON=python3.12 env

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

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

.PHONY: env demo test test-slow lint clean

env: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@echo "Setting up .venv; this takes some minutes the first time."
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("dn_detr needs Python 3.10 or newer, but $(PYTHON) is %d.%d: make PYTHON=python3.12 env" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[demo,dev]'
	@touch $@

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

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary

clean:
	rm -rf output datasets/digits build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
