# scalemlo: the two commands to know are `make demo` and `make test`.
#
# Needs Python 3.11 or newer with pip, nothing else: each target makes .venv when it is missing. Without make, copy the
# recipe lines into a shell. Variables:
#   PYTHON       the interpreter that makes .venv                    make test PYTHON=python3.12
#   PIP_FLAGS    more options for pip. On Linux plain PyPI serves the CUDA build of torch (gigabytes); for the CPU build:
#                make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   PYTEST_FLAGS more options for pytest                             make test PYTEST_FLAGS="-k fsdp -x"
#   MINUTES, DEVICE, OUT   of `make gpu`; without a GPU              make gpu DEVICE=cpu
#   DEMO_FLAGS   key=value changes to the demo's configuration       make demo DEMO_FLAGS="train.steps=20"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
MINUTES ?= 9
DEVICE ?= auto
OUT ?= runs/gpu
# A machine without a network has its own interpreter with torch:  make gpu GPU_PYTHON=python3
GPU_PYTHON ?=

.PHONY: demo test test-full test-oldest bench gpu lint format clean

# The stamps make a second call quick; a change of pyproject.toml or constraints.txt installs again.
.venv/bin/python:
	"$(PYTHON)" -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "scalemlo needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	"$(PYTHON)" -m venv .venv

.venv/.demo.stamp: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -e ".[demo]" -c constraints.txt
	touch .venv/.demo.stamp

.venv/.test.stamp: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -e ".[demo,dev]" -c constraints.txt
	touch .venv/.demo.stamp .venv/.test.stamp

# Trains the demo recipe end to end on this machine's CPU or GPU.
demo: .venv/.demo.stamp
	.venv/bin/scalemlo train configs/reweight_smollm2.yaml $(DEMO_FLAGS)

# Two workers, whole files at a time: fixtures that launch a run are made once.
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/.test.stamp
	.venv/bin/ruff check .
	.venv/bin/ty check
	$(PYTEST) $(PYTEST_FLAGS)

# The slow checks too.
test-full: .venv/.test.stamp
	.venv/bin/ruff check .
	.venv/bin/ty check
	$(PYTEST) --full $(PYTEST_FLAGS)

# The fast checks on the oldest versions that pyproject.toml allows; PYTHON=python3.12 picks the interpreter.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -q -e ".[demo,test]" -c constraints-oldest.txt
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

# Runs every benchmark; each says on its first lines what it measures.
bench: .venv/.test.stamp
	for file in benchmarks/[a-z]*.py; do echo "== $$file"; .venv/bin/python "$$file" || exit 1; done

# Checks, speed, memory and plans on this machine's GPU; see the first lines of benchmarks/gpu/run.py.
ifeq ($(GPU_PYTHON),)
gpu: .venv/.test.stamp
	.venv/bin/python benchmarks/gpu/run.py --out $(OUT) --minutes $(MINUTES) --device $(DEVICE)
else
gpu:
	$(GPU_PYTHON) benchmarks/gpu/run.py --out $(OUT) --minutes $(MINUTES) --device $(DEVICE)
endif

lint: .venv/.test.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/ty check

format: .venv/.test.stamp
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
