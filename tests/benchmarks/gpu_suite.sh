#!/bin/bash
# The GPU's rows of RESULTS.md, in order of worth: at most 9 minutes a call and 25 in all on one H200-class GPU.
# Call it until it says that nothing is left, for which 25 minutes may not be enough; rows that are done are kept, and
# each call goes on where the last ended.
#
#   tests/benchmarks/gpu_suite.sh                      on one GPU; results in tests/benchmarks/gpu
#   tests/benchmarks/gpu_suite.sh --table              the table of what is there, "not measured" for what is not
#   tests/benchmarks/gpu_suite.sh --device cpu --out /tmp/suite   the same rows with a tiny model, to try the script
#
# Needs the packages of `pip install -e ".[bench]"`, a compiler for DeepSpeed's FusedAdam, and no network.
set -eu
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "${PYTHON:-$python}" tests/benchmarks/gpu_suite.py "$@"
