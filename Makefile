# Everything runs from a fresh clone with Python 3.11 and pip alone.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install demo mind test check bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## the whole loop on a simulated market
	$(BIN)/driftline run configs/demo.yaml

mind: install  ## the same on MIND: make mind DATA=folder with behaviors.tsv and news.tsv
	@test -n "$(DATA)" || { echo "make mind needs DATA=folder with behaviors.tsv and news.tsv"; exit 2; }
	$(BIN)/driftline run configs/mind.yaml --set source.path='$(DATA)'

test: install  ## the whole suite on two cores; prints what failed and why
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## quick forms of all benchmarks, some minutes each; each also runs alone, in full
	failed=; for file in tests/benchmarks/*.py; do echo "== $$file"; \
	  $(BIN)/python $$file --quick || failed="$$failed $$file"; done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
