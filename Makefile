PYTHON ?= python3
BIN := .venv/bin

# Packages are installed without compiled modules: Python writes those that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-docs docs check-gpu

demo: .venv/installed
	$(BIN)/python recipes/demo_digits.py --output_dir outputs/demo

test: .venv/installed
	$(BIN)/python -m pytest tests -n 2

test-docs: .venv/installed
	TYPE_ALL_DOCS=1 $(BIN)/python -m pytest tests/test_docs.py tests/test_packaging.py -n 2

docs: .venv/installed
	$(BIN)/mkdocs build --strict

check-gpu: .venv/installed
	$(BIN)/python benchmarks/gpu.py --output outputs/check_gpu.json

.venv/installed: requirements-dev.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@
