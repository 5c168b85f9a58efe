#!/usr/bin/env bash
# Every measurement that needs a card, in two runs of under ten minutes each; results go to the folder OUT.
#
#   benchmarks/run_on_gpu.sh kernels OUT    kernels against their references, then their times, for the tables of configurations
#   benchmarks/run_on_gpu.sh engine OUT     greedy agreement with the CPU, the rows of bench_gpu.py, and a profile of one row
#
# Needs torch with CUDA, triton, and the package's own dependencies; no network. Stops at nothing: a part that fails says so.
set -u
part=${1:?kernels or engine}
out=${2:?a folder for the results}
mkdir -p "$out"
cd "$(dirname "$0")/.."
export PYTHONPATH=".:${PYTHONPATH:-}" PYTHONUNBUFFERED=1

run() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  local start=$SECONDS
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 60
  echo "== $name: status ${PIPESTATUS[0]}, $((SECONDS - start)) s"
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
case $part in
  kernels)
    run kernel-tests 150 python3 -m pytest -q -x --import-mode=importlib -p no:cacheprovider tests/kernels
    run kernels 180 python3 benchmarks/bench_kernels.py --out "$out/kernels.json"
    run attention 230 python3 benchmarks/bench_attention.py --out "$out/attention.json"
    ;;
  engine)
    run engine 420 python3 benchmarks/bench_gpu.py --out "$out/gpu.jsonl"
    run profile 120 python3 benchmarks/bench_gpu.py --rows unique@50 --profile "$out/trace.json"
    ;;
  *)
    echo "unknown part $part: kernels or engine" >&2
    exit 2
    ;;
esac
