# `make demo` and `make test` each work first thing on a fresh clone: they make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test test-long faults audit lint types bench schema clean

# Installed again when pyproject.toml changes. DeepSpeed's build looks for torch, so torch comes first.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

data/demo/manifest.json: | .venv/installed
	python -m data_tools build --config ds_configs/demo_data.json --out data/demo \
	    --input "$$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

demo: .venv/installed data/demo/manifest.json
	deepspeed --num_gpus 1 launch/pretrain.py --deepspeed_config ds_configs/demo.json
	@echo
	@megagpt evaluate runs/demo --data data/demo --tokens 200064
	@echo; echo "What it writes after 'def ' and after 'import ':"
	@megagpt generate runs/demo --prompt "def " --prompt "import " --max-tokens 100
	@echo "Watch the curves:  .venv/bin/tensorboard --logdir runs"

test: .venv/installed
	python -m pytest -m "not long"

test-long: .venv/installed
	python -m pytest

# Every fault that tests/faults/cases.py lists, then what bare DeepSpeed makes of the same: hours, but it goes on where
# it was stopped.
faults: .venv/installed
	PYTHONPATH=.:tests:tests/programs OMP_NUM_THREADS=1 python tests/faults/campaign.py
	PYTHONPATH=.:tests:tests/programs OMP_NUM_THREADS=1 python tests/faults/campaign.py --baseline
	python tests/faults/report.py runs/faults.jsonl

lint: .venv/installed
	ruff check .
	ruff format --check .

types: .venv/installed
	mypy

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

# Known vulnerabilities of the packages in .venv; without a network it says so and passes.
audit: .venv/installed
	.ci/audit

# The editors' completion for run files; a test compares it with the code.
schema: .venv/installed
	python -c "import json; from megagpt.config.run_file import run_schema; print(json.dumps(run_schema(), indent=2))" \
	    > ds_configs/run.schema.json

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
