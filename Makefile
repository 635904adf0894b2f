# Each target sets up what it needs in .venv by itself.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test test-all test-floor bench lint format clean

# make demo                                    texture mosaics
# make demo DATA=camvid ROOT=<folder>          real street scenes in SegNet's CamVid layout
# make demo LOSS="contextrast pixel-contrast"   these losses on equal terms: see `demo --help` for their names
# make demo ARGS="--seed 3 --steps 200"        any flag of `python -m contextrast_kernels demo --help`
demo: $(VENV)/.demo
	$(RUN) -m contextrast_kernels demo $(if $(DATA),--data $(DATA)) $(if $(ROOT),--root "$(ROOT)") $(if $(LOSS),--loss $(LOSS)) $(ARGS)

# Two processes, each with whole files.
test: $(VENV)/.all
	$(RUN) -m pytest -n 2 --dist loadfile $(ARGS)

test-all: $(VENV)/.all
	$(RUN) -m pytest -m "slow or not slow" $(ARGS)

# The oldest supported torch, with the Triton that it pins, whose interpreter needs a NumPy before 2.4.
test-floor: .venv-floor/.all
	.venv-floor/bin/python -m pytest $(ARGS)

bench: $(VENV)/.all
	$(RUN) -m pytest benchmarks --benchmark-enable --benchmark-only $(ARGS)

lint: $(VENV)/.all
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.all
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/bin/python .venv-floor/bin/python:
	$(PYTHON) -m venv $(dir $(@D))

$(VENV)/.demo: $(VENV)/bin/python $(SOURCES)
	$(RUN) -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.all: $(VENV)/bin/python $(SOURCES)
	$(RUN) -m pip install --quiet --editable '.[demo,test,bench,models,study]'
	touch $@ $(VENV)/.demo

.venv-floor/.all: .venv-floor/bin/python $(SOURCES)
	.venv-floor/bin/python -m pip install --quiet 'torch==2.11.0' 'numpy<2.4' --editable '.[demo,test]'
	touch $@

clean:
	rm -rf build dist demo_out *.egg-info contextrast_kernels/*.so
