# Each target is what you could type yourself; `make demo` is the place to start.
#   PYTHON=python3.12       another interpreter (3.11 or newer)
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu    PyTorch without CUDA: 200 MB instead of gigabytes on Linux
#   VLLM=…/bin/python LLAMA_CPP=…/bin/python            environments of peers, for bench-cpu
#   JOBS=8                  so many processes for the tests (each takes up to 4 GB), or submissions graded at a time
#   CELL_SECONDS=10         a cell of a submission that runs longer is stopped when it is graded (60)
PYTHON ?= python3
JOBS ?= 2
TORCH_INDEX ?=
export TORCH_INDEX
BIN := .venv/bin
PIP_INSTALL := $(BIN)/pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Two processes with a thread each: tiny models have nothing to share among threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

SPHINX := $(BIN)/python -m sphinx -c docs -d docs/_build/doctrees -j $(JOBS) -q -W --keep-going

.PHONY: demo test test-browser test-course test-ranks test-scale lab notebooks assignments grade docs linkcheck lint types bench-kernels bench-cpu bench-gpu clean

demo: .venv/notebooks
	$(BIN)/minillm chat --quick "Tell me a story about Mia and a red kite." --stats

test: .venv/test
	$(BIN)/minillm pull smollm2-135m
	$(PYTEST) --dist loadscope --no-loadscope-reorder
	$(PYTEST) -o addopts= --dist loadfile --nbval --nbval-current-env notebooks

# Every mistake that is planted in the assignments; `make test` grades some of each.
test-course: .venv/test
	$(PYTEST) --dist loadscope --all-mistakes tests/course

# All notebooks in a real JupyterLab, the site, the server's page; screenshots/index.html shows what was seen.
test-browser: .venv/test
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ test "$$(id -u)" = 0 && command -v apt-get && apt-get update && apt-get install -y chromium; } || true
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" -rs tests/browser tests/docs tests/server/test_page.py

# Tensor parallelism: every family of models by two processes.
test-ranks: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/engine/test_ranks.py -m ""

# Replicas on Ray.
test-scale: .venv/test .venv/scale
	$(BIN)/python -m pytest tests/scale -m ""

lab: .venv/notebooks
	$(BIN)/jupyter lab notebooks

notebooks: .venv/notebooks
	$(BIN)/python notebooks/build.py

assignments: .venv/assignments
	$(BIN)/python -m minillm.course.assignments release

grade: .venv/assignments
	$(BIN)/python -m minillm.course.assignments grade --jobs $(JOBS) $(if $(CELL_SECONDS),--cell-seconds $(CELL_SECONDS))

docs: .venv/docs
	rm -rf docs/api
	$(SPHINX) . docs/_build/html
	@echo "open docs/_build/html/index.html"

# Links that lead out of the site; needs the network.
linkcheck: .venv/docs
	$(SPHINX) -b linkcheck . docs/_build/linkcheck

lint: .venv/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/test
	$(BIN)/mypy

bench-kernels: .venv/notebooks
	$(BIN)/minillm bench cpu-attention
	$(BIN)/minillm bench operations

bench-cpu: .venv/test
	$(BIN)/minillm bench compare $(if $(VLLM),--vllm $(VLLM)) $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP))

bench-gpu: .venv/notebooks
	$(BIN)/minillm bench gpu-attention
	$(BIN)/minillm bench operations --device cuda
	$(BIN)/minillm bench gpu-engine

clean:
	rm -rf .venv build docs/_build docs/api *.egg-info

# An environment with the extra that its name says; made again when the lists of packages change.
.venv/%: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.version_info < (3, 11) and sys.exit('minillm needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	@echo "installing; the first time, this takes some minutes"
	$(PIP_INSTALL) -e '.[$*]'
	touch $@
