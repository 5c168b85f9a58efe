#!/usr/bin/env bash
# Everything that is to be known of a card, in three runs on a machine with one; results go to the folder OUT.
#
#   benchmarks/run_on_gpu.sh ladder OUT     290 s: kernels against their references, the engine a feature a process, two rows
#   benchmarks/run_on_gpu.sh engine OUT     580 s: all rows, agreement with a CPU, profile, start, soak, --deterministic
#   benchmarks/run_on_gpu.sh kernels OUT    580 s: kernels' times, a table of choices, rows again with it, sanitizer, tests
#
# docs/performance.md ("On a GPU") says what to do before, between and after, and what a failure means. gpu_steps.py has
# the steps; `... OUT --plan` shows them, `... OUT --dry-run` walks the same commands on a CPU with toy shapes, and `... OUT
# --dry-run --plant products=crash` with a failure. SECONDS_IN_ALL is another length of a run, its preparation included.
#
# This script makes the machine ready. It needs python3 (PYTHON) with torch built for CUDA, triton, numpy, numba,
# transformers, tokenizers, safetensors, pytest, pytest-timeout, pytest-xdist and hypothesis. pack_for_gpu.sh gathers the
# rest, for a machine without a network: wheels and compiled kernels in .whl, and the parts of a model file in .model0,
# .model1, ..., which may come one a run. What later runs on the same machine can use stays in KEEP.
set -u
part=${1:?ladder, engine or kernels}
out=${2:?a folder for the results}
shift 2
python=${PYTHON:-python3}
keep=${KEEP:-/tmp/ramet-on-gpu}
mkdir -p "$out" "$keep"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore PYTHONFAULTHANDLER=1
export TRITON_CACHE_DIR=$keep/triton # the folder that pack_for_gpu.sh filled: part of no key, but kept between runs
if [ -d .whl ]; then
  $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$keep/site" .whl/*.whl || exit 1
  COMMIT=$(cat .whl/commit) && export COMMIT
  export PYTHONPATH="$keep/site:${PYTHONPATH:-}"
fi
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
if [ -f .whl/triton.tar.xz ] && [ ! -d "$TRITON_CACHE_DIR" ]; then
  mkdir "$TRITON_CACHE_DIR" && $python -m tarfile -e .whl/triton.tar.xz "$TRITON_CACHE_DIR"
  $python benchmarks/compile_kernels.py --adopt "$TRITON_CACHE_DIR"
fi
# Whatever is missing shows here, and not after the first minutes.
$python -c 'import sys; sys.path.insert(0, "benchmarks"); import bench_gpu, check_gpu, ladder, triton' || exit 1
command -v nvidia-smi >/dev/null &&
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.used --format=csv,noheader | tee -a "$out/log.txt"
for file in .model[0-9]*/*; do [ -f "$file" ] && cp "$file" "$keep"; done
model=()
for first in "$keep"/*.0.of*; do
  [ -f "$first" ] || continue
  hash=$(basename "${first%.0.of*}")
  if [ "$(ls "$keep/$hash".*.of* | wc -l)" = "${first##*.of}" ]; then
    cat $(seq -f "$keep/$hash.%g.of${first##*.of}" 0 $((${first##*.of} - 1))) >"$keep/$hash.gguf"
    [ "$(sha256sum "$keep/$hash.gguf" | cut -c1-16)" = "$hash" ] && model=(--model "$keep/$hash.gguf")
  fi
done
exec $python benchmarks/gpu_steps.py "$part" "$out" --keep "$keep" --elapsed "$SECONDS" "${model[@]}" \
  ${SECONDS_IN_ALL:+--seconds "$SECONDS_IN_ALL"} "$@"
