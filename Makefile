# `make demo` and `make test` need Python 3.11 or newer with venv, and nothing else installed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export AMOEBA_CACHE ?= $(CURDIR)/$(VENV)/cache

.PHONY: demo test test-slow test-device delivery docs lint bench clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,lint]'
	touch $@

demo: $(VENV)/installed
	@sh tools/demo.sh $(BIN)

test: $(VENV)/installed
	@sh tools/install_test_servers
	$(BIN)/python -m pytest -n auto --dist loadfile  # a worker a core, each test file in one of them

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# FLOW=onnx [PRECISION=int4,int8] [MODEL=checkpoint] [DEVICE=orin-nx] [OUT=report.json] [ARGS='--prompt 64']
test-device: $(VENV)/installed
	$(BIN)/python tools/test_device.py --flow '$(FLOW)' -o '$(or $(OUT),report.json)' \
	    $(if $(PRECISION),--precision '$(PRECISION)') $(if $(MODEL),--model '$(MODEL)') \
	    $(if $(DEVICE),--device '$(DEVICE)') $(ARGS)

delivery: $(VENV)/installed
	@sh tools/install_test_servers
	@sh tools/delivery.sh $(CURDIR)/$(BIN)

docs: $(VENV)/installed
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/site
	@echo build/site/index.html

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.engines
	$(BIN)/python -m benchmarks.onnx_memory
	$(BIN)/python -m benchmarks.export
	$(BIN)/python -m benchmarks.extract
	$(BIN)/python -m benchmarks.selection_speed
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.offload
	$(BIN)/python -m benchmarks.tuning_step
	$(BIN)/python -m benchmarks.distillation
	$(BIN)/python -m benchmarks.block_search
	$(BIN)/python -m benchmarks.build
	$(BIN)/python -m benchmarks.transfer
	$(BIN)/python -m benchmarks.install
	$(BIN)/python -m benchmarks.table_query
	$(BIN)/python -m benchmarks.prediction
	$(BIN)/python -m benchmarks.budgets

clean:
	rm -rf $(VENV) build dist
