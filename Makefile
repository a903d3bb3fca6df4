# make run: set everything up and train the digits. make test: set up and pass the tests.
# make test-fast: the tests that start little, for the minutes between two edits.
# make test-services: the tests with object stores, trackers, the API of Kubernetes, and Slurm.
# make test-matrix: the other optimizers, modes and numbers of processes of tests with many cases.
# make test-cluster: build the image, run it and its pods as containers, let checkov look, and run
#   jobs on a Slurm controller.
# make chaos: injure runs three hundred times and compare their bits (an hour).
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Hundreds of interpreters are started, and each would compile all modules again.
export PYTHONDONTWRITEBYTECODE :=

# Half of their time the tests wait for processes; a file stays on one worker, with its fixtures.
WORKERS := 3
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: run test tests test-fast test-services test-matrix test-cluster test-slow chaos check lint types docs clean

run: $(READY)
	$(BIN)/evenstep run digits

# mypy needs one core for a minute, so the tests start beside it.
test: $(READY) lint
	@$(MAKE) --no-print-directory -j2 types tests

# tests/fresh_machine.py chooses those of services too.
CHOSEN := not services and not matrix

tests: $(READY)
	$(BIN)/pytest -q $(SHARED) -m "not slow and not cluster and $(CHOSEN)"

# tests/services.py.
test-services: $(READY)
	$(BIN)/pytest -q $(SHARED) -m "services and not slow and not cluster and not matrix"

# Further cases of tests with many: tests/matrix.py.
test-matrix: $(READY)
	$(BIN)/pytest -q $(SHARED) -m "matrix and not slow and not cluster"

# Without the command line, injuries and trackers: see CONTRIBUTING.md. The longest come first.
FAST := world_size shapes hostile_runs normalization samplers schedules stops kubernetes_manifests \
	averages spec wings documents randomness recursive_doubling tracking plan_due messages \
	optimizer_values device_lines

test-fast: $(READY)
	$(BIN)/pytest -q $(SHARED) -m "not slow and not cluster and not matrix" $(FAST:%=tests/test_%.py)

# Needs root, podman, buildah and debootstrap, and for Slurm slurmctld, slurmd, slurm-client, munge
# and iproute2, all of Debian; what cannot run here says why. A machine's first time makes the base and fetches the wheels; they are kept in ~/.cache/evenstep-containers.
test-cluster: $(READY)
	$(BIN)/pytest -q -rs -m "cluster and not slow" -o faulthandler_timeout=900

# 291 MB, so in a place of its own, and no part of make test.
$(VENV)/checkov/bin/checkov:
	python3 -m venv $(VENV)/checkov
	$(VENV)/checkov/bin/pip install --quiet checkov==3.3.30

# What takes minutes: pods and Slurm's jobs that are killed, evicted, frozen.
test-slow: $(READY)
	$(BIN)/pytest -q -rs -m slow -o faulthandler_timeout=900

chaos: $(READY)
	$(BIN)/python -m tests.chaos.campaign --injuries 200
	$(BIN)/python -m tests.chaos.campaign --injuries 60 --mode sharded
	$(BIN)/python -m tests.chaos.campaign --injuries 40 --mode moved
	$(BIN)/python -m tests.chaos.at_requests
	$(BIN)/python -m tests.chaos.elastic --minutes 10
	$(BIN)/python -m tests.chaos.elastic --minutes 3 --bucket

check: lint types

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# The pages of docs/ as a site in build/site; its links are checked.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV)
