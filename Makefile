# make demo   the environment, llama.cpp, and an answer of the miniature, from nothing
# make test   all tests, from nothing
# make lint   ruff and mypy
# make bench  the figures of docs/measured.md

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WHEELS := $(VENV)/wheels
LLAMA  := llama-cpp-python==0.3.36
SDIST  := $(VENV)/sdist

# GCC 12.2 drops the stores of AMX tile configurations, and llama.cpp then crashes on CPUs that
# have AMX. Nothing else needs the instructions, so they stay off.
ifeq ($(shell uname -m),x86_64)
  CMAKE_ARGS ?= -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8
endif
export CMAKE_ARGS

.PHONY: demo test lint format bench clean

demo: $(VENV)/.installed
	$(BIN)/qwq ask --model miniature "How many r's are in the word strawberry?"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/decode.py
	$(BIN)/python bench/batch.py
	$(BIN)/python bench/repl.py
	$(BIN)/python bench/kill.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/prefix.py
	$(BIN)/python bench/long.py
	$(BIN)/python bench/pull.py
	$(BIN)/python bench/convert.py --types Q8_0 --growth Q8_0
	$(BIN)/python bench/convert.py --types Q4_K_M Q6_K --growth Q4_K_M

$(VENV)/.venv-made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "qwq needs Python 3.11 or newer; $$($(PYTHON) --version) is here. Run: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

# Tests take chat templates from the source, so it stays.
$(SDIST)/.downloaded: $(VENV)/.venv-made
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(SDIST) $(LLAMA)
	@touch $@

$(VENV)/.llama-built: $(VENV)/.venv-made | $(SDIST)/.downloaded
	@echo "==> Building llama.cpp ($(LLAMA)) for this machine: about 10 minutes on 2 cores, once."
	@# A wheel in pip's cache may have other flags, so build without it.
	$(BIN)/python -m pip wheel --no-cache-dir --no-deps --wheel-dir $(WHEELS) $(SDIST)/llama_cpp_python-*.tar.gz
	$(BIN)/python -m pip install --quiet $(WHEELS)/llama_cpp_python-*.whl
	@touch $@

$(VENV)/.installed: $(VENV)/.llama-built pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.llama-built pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
