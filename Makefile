PYTHON ?= .venv/bin/python

.PHONY: dev

# Builds the extension in place (incremental; MAX_JOBS limits the compilers run at once).
dev:
	$(PYTHON) setup.py build_ext --inplace
