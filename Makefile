# `make demo` and `make test` each work first thing on a fresh clone: they make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test test-fast test-long faults audit lint types docs bench schema clean

# Two stamps, because the demo needs far less than the tests. Both are made again when pyproject.toml changes.
# torch comes first, because DeepSpeed's build looks for it.
.venv/runtime: pyproject.toml
	@echo "Installing into .venv: torch, DeepSpeed, TensorBoard and the packages of the data builder."
	@echo "About 1.5 GB on disk with a CPU build of torch, several GB with a CUDA build; some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "torch>=2.11,<2.14"
	$(BIN)/python -m pip install -e ".[data]"
	@touch $@

.venv/installed: .venv/runtime pyproject.toml
	@echo "Installing into .venv what the tests need as well: pytest, mypy, ruff, moto, selenium and others, about 0.9 GB."
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@

# The data is built from files that every machine has: the Python standard library.
data/demo/manifest.json: | .venv/runtime
	@echo; echo "1 of 3: build a dataset from the source files of Python's standard library"
	@python -m data_tools build --config ds_configs/demo_data.json --out data/demo \
	    --input "$$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

# One process, on a GPU if there is one: the batch of 8 is too small to divide over more.
demo: .venv/runtime data/demo/manifest.json
	@echo; echo "2 of 3: train 2.6 million parameters for 500 steps, a few minutes on two idle CPU cores"
	megagpt train ds_configs/demo.json --nproc 1
	@echo "For comparison, val/loss of plain GPT-2 with AdamW (ds_configs/demo_gpt2.json), measured with Python 3.11:"
	@echo "step 200: 4.2546   step 400: 3.9051   step 600: 3.6885   step 800: 3.5722"
	@echo; echo "3 of 3: use the model"
	megagpt evaluate runs/demo --tokens 200064
	@echo "Its text looks like Python and makes no sense: the model is tiny, and was trained for a few minutes."
	megagpt generate runs/demo --prompt "import " --max-tokens 30
	@printf '%s\n' "" "Next, your own text, a folder of files, after 'source .venv/bin/activate':" \
	    "  python -m data_tools build --input my_texts/ --out data/mine vocab_size=2048 val_fraction=0.05" \
	    "  megagpt init data/mine --hours 0.2   # writes mine.jsonc: a run file for this data and machine, for 12 minutes" \
	    "  megagpt train mine.jsonc" \
	    "  megagpt generate runs/mine --prompt 'The '"

# A process of tests for each core (at most four), and one more where tests wait for what they start; the longest first.
# Tests that share something run in one of them.
# Each compiles only what has changed, also where a container's image says that nothing compiled is to be kept.
PYTEST := PYTHONDONTWRITEBYTECODE= python -m pytest -n auto --dist loadscope --no-loadscope-reorder

test: .venv/installed
	$(PYTEST) -m "not long"

# All that starts no process, for every save of a file; a test that is not marked as starting one fails if it does.
test-fast: .venv/installed
	$(PYTEST) -m "not long and not process"

test-long: .venv/installed
	$(PYTEST)

# Every fault that tests/faults/cases.py lists, then what bare DeepSpeed makes of the same: hours. A campaign that was
# stopped continues with the cases that it has not run.
faults: .venv/installed
	PYTHONPATH=.:tests:tests/programs OMP_NUM_THREADS=1 python tests/faults/campaign.py
	PYTHONPATH=.:tests:tests/programs OMP_NUM_THREADS=1 python tests/faults/campaign.py --baseline
	python tests/faults/report.py runs/faults.jsonl

lint: .venv/installed
	ruff check .
	ruff format --check .

types: .venv/installed
	mypy

# The documentation site, build/docs/html/index.html; warnings and dead links are errors.
docs: .venv/installed
	python -m docs_site.build

# About half an hour on two cores; the first two lines are training speed. On a GPU: tests/benchmarks/gpu_suite.sh
bench: .venv/installed
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	python tests/benchmarks/throughput.py --device cpu --seq 256 --micro-batch 4 --tokens-per-step 1024 \
	    --steps 1 --rounds 4 --warmup 1
	python tests/benchmarks/throughput.py --device cpu --seq 256 --micro-batch 4 --tokens-per-step 8192 \
	    --steps 1 --rounds 2 --warmup 1
	OMP_NUM_THREADS=1 python tests/benchmarks/steady.py
	python tests/benchmarks/char_cpu.py
	python tests/benchmarks/loader.py
	python tests/benchmarks/near_dedup.py
	python tests/benchmarks/build.py

# Known vulnerabilities of the packages in .venv. Without a network it prints that, and passes.
audit: .venv/installed
	.ci/audit

# The editors' completion for run files; a test compares it with the code.
schema: .venv/installed
	python -c "import json; from megagpt.config.run_file import run_schema; print(json.dumps(run_schema(), indent=2))" \
	    > ds_configs/run.schema.json

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
