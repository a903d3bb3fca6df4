# make run: set everything up and train the digits. make test: set up and pass the tests.
# make chaos: injure a run two hundred times and compare its bits (half an hour).
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test test-slow chaos check clean

run: $(READY)
	$(BIN)/evenstep run digits

test: $(READY) check
	$(BIN)/pytest -q -m "not slow"

# What takes minutes: pods that are killed, evicted, frozen.
test-slow: $(READY)
	$(BIN)/pytest -q -m slow

chaos: $(READY)
	$(BIN)/python -m tests.chaos.campaign --injuries 200

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV)
