# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
ENVIRONMENT := .venv/.installed

.PHONY: env demo test test-full test-sweep gpu lint reproduce clean

env: $(ENVIRONMENT)

$(ENVIRONMENT): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	touch $@

# Train on scikit-learn's bundled digits with exact and with sampled statistics, ship both, compare them on one page.
DEMO := --epochs 20 --seed 0 --overwrite
demo: env
	$(BIN)/leannorm train resnet8 digits --statistics full $(DEMO) --out runs/demo/full
	$(BIN)/leannorm train resnet8 digits --statistics grid:1/4 $(DEMO) --out runs/demo/grid
	$(BIN)/leannorm deploy runs/demo/full/best.ckpt --data digits --out runs/demo/full/deployed --overwrite
	$(BIN)/leannorm deploy runs/demo/grid/best.ckpt --data digits --out runs/demo/grid/deployed --overwrite
	$(BIN)/leannorm report runs/demo/full/deployed runs/demo/grid/deployed --out runs/demo/report.html --overwrite

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Each of two processes computes with one thread.
test test-full test-sweep: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/pytest -n 2 -m 'not slow and not sweep'

# The checks of minutes each.
test-full: env
	$(BIN)/pytest -n 2 -m 'slow and not sweep'

# Every model and every combination: longer than all the others together.
test-sweep: env
	$(BIN)/pytest -n 2 -m sweep

# One of the paper's tables beside ours: EXPERIMENT=convergence, micro-batch, family, speed or placement; SCALE=cpu or full.
SCALE ?= cpu
reproduce: env
	$(BIN)/python experiments/reproduce.py $(EXPERIMENT) --scale $(SCALE)

# Kernel tests and benchmarks on the GPU that is there, with what PYTHON has installed: no environment, nothing built.
# STAGES=layers,launches runs these alone. Where the sources were copied without their repository, COMMIT tells the
# results which they are.
gpu:
	LEANNORM_COMMIT=$(or $(COMMIT),unknown) PYTHONPATH=src:$$PYTHONPATH $(PYTHON) -m leannorm.bench.gpu $(STAGES)

clean:
	rm -rf .venv build runs
