PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup run test test-all docs tutorial

setup: .venv/.installed

# The stamp is as old as the last installation: a second call starts at once.
.venv/.installed: pyproject.toml constraints.txt setup.py $(wildcard quant/integer/core/*)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	.venv/bin/python -m quant.integer
	touch $@

run: setup
	.venv/bin/efficientdm run --config configs/quick.yaml

test: SELECTION = -m "not slow"
test test-all: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist worksteal $(SELECTION)

# The theme tells of its successor in red; that is no warning about these pages.
docs: setup
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# The notebook runs from top to bottom, in place. tqdm warns of a package that draws its bars in notebooks; none is drawn.
tutorial: setup
	PYTHONWARNINGS='ignore:IProgress not found' .venv/bin/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False docs/tutorial.ipynb
	.venv/bin/jupyter nbconvert --coalesce-streams docs/tutorial.ipynb
