#!/usr/bin/env bash
# Every measurement that needs a card, in three runs of under ten minutes each; results go to the folder OUT.
#
#   benchmarks/run_on_gpu.sh ladder OUT     kernels against their references, then the engine, a feature a process
#   benchmarks/run_on_gpu.sh kernels OUT    kernels' times, and a table of choices
#   benchmarks/run_on_gpu.sh engine OUT     greedy agreement, the rows of bench_gpu.py, a profile, a soak
#   benchmarks/run_on_gpu.sh ladder OUT --dry-run    the same commands on a CPU with toy shapes (also: kernels, engine);
#                                                    PLANT=products makes that command fail
#
# `kernels` and `engine` leave out the features that failed in `ladder` (OUT/flags.txt, or the one kept on the machine);
# `engine` uses the table that `kernels` made: OUT/table.json, the one kept on the machine, or the file named by TABLE.
# Parts run in the order of their worth and write what they find as they go; each has a limit, and none begins when
# SECONDS_IN_ALL (580) are nearly over. What fails says so, with the stack where it crashed, and the rest goes on. Rows
# run in three processes, so that a lost card costs one of them; one that fails starts again without tree attention,
# then without graphs. OUT has few, small files: *.jsonl, *.json, flags.txt, *.log, log.txt, trace.json.gz.
#
# Needs python3 (PYTHON) with torch built for CUDA, triton, numpy, numba, transformers, tokenizers, safetensors, pytest,
# pytest-timeout and hypothesis. benchmarks/pack_for_gpu.sh gathers the rest, for a machine without a network: wheels and
# compiled kernels in .whl, and the parts of a model file in .model0, .model1, ..., which may come one a run. What later
# runs on the same machine can use stays in KEEP.
set -u
part=${1:?ladder, kernels or engine}
out=${2:?a folder for the results}
dry=${3:-}
python=${PYTHON:-python3}
in_all=${SECONDS_IN_ALL:-580}
slack=1 # limits are those of a card; a rehearsal on a CPU has more time
[ -n "$dry" ] && slack=4
keep=${KEEP:-/tmp/ramet-on-gpu}
mkdir -p "$out" "$keep"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore PYTHONFAULTHANDLER=1
export TRITON_CACHE_DIR=$keep/triton # the folder that pack_for_gpu.sh filled: part of no key, but kept between runs
log=$out/log.txt
if [ -d .whl ]; then
  $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$keep/site" .whl/*.whl || exit 1
  COMMIT=$(cat .whl/commit) && export COMMIT
  export PYTHONPATH="$keep/site:${PYTHONPATH:-}"
  if [ -f .whl/triton.tar.gz ] && [ ! -d "$TRITON_CACHE_DIR" ]; then
    mkdir "$TRITON_CACHE_DIR" && tar -xzf .whl/triton.tar.gz -C "$TRITON_CACHE_DIR"
    PYTHONPATH="$PWD:$keep/site" $python benchmarks/compile_kernels.py --adopt "$TRITON_CACHE_DIR"
  fi
fi
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
# Whatever is missing shows here, and not after the first minutes: Triton's launchers need a C compiler and Python's
# headers, and a driver that takes their code.
$python -c 'import sys; sys.path.insert(0, "benchmarks"); import bench_gpu, check_gpu, triton' || exit 1
if [ -z "$dry" ]; then
  $python benchmarks/smallest_launch.py || exit 1
fi
for file in .model[0-9]*/*; do [ -f "$file" ] && cp "$file" "$keep"; done
model=()
for first in "$keep"/*.0.of*; do
  [ -f "$first" ] || continue
  hash=$(basename "${first%.0.of*}")
  if [ "$(ls "$keep/$hash".*.of* | wc -l)" = "${first##*.of}" ]; then
    cat $(seq -f "$keep/$hash.%g.of${first##*.of}" 0 $((${first##*.of} - 1))) >"$keep/$hash.gguf"
    [ "$(sha256sum "$keep/$hash.gguf" | cut -c1-16)" = "$hash" ] && model=(--model "$keep/$hash.gguf")
    [ -f ".whl/$hash.json" ] && model+=(--reference ".whl/$hash.json")
  fi
done

run() { # name, limit in seconds, command...
  local name=$1 limit=$(($2 * slack)) left=$((in_all * slack - SECONDS)) start=$SECONDS
  shift 2
  if [ "$left" -lt 15 ]; then
    echo "== $name: skipped, no time left" | tee -a "$log"
    return
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  [ "${PLANT:-}" = "$name" ] && set -- $python -c 'import os; os.abort()' # a rehearsal of what a failure costs
  echo "== $name ($limit s at most)" >>"$log"
  timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$log" | tail -n "${LINES_SHOWN:-25}" | cut -c1-240
  local status=${PIPESTATUS[0]}
  echo "== $name: status $status, $((SECONDS - start)) s, $SECONDS s in all" | tee -a "$log"
  return "$status"
}

rows() { # name, limit in seconds, rows: in a process of their own
  local name=$1 limit=$2 fewer
  shift 2
  local command=($python benchmarks/bench_gpu.py "${dry_rows[@]}" "${table[@]}" "${flags[@]}" --rows "$1" --out "$out/rows.jsonl")
  run "$name" "$limit" "${command[@]}" --label rows && return
  for fewer in 'tree_attention="off"' cuda_graph=false; do
    run "$name, $fewer" "$limit" "${command[@]}" --label "$fewer" --set "$fewer" && return
  done
}

compile_ahead() { # fills Triton's cache on all cores at once; no kernel is launched
  local workers=${WORKERS:-12} only="llama-8b,smollm2,prepare,commit,scatter,copy_pages,build_masks,advance,table" share pids=()
  [ -n "$dry" ] && workers=1 only="prepare_decode"
  for ((share = 0; share < workers; share++)); do
    $python benchmarks/compile_kernels.py --candidates --only "$only" ${chosen:+--kernel-table "$chosen"} --share "$share/$workers" >"$out/.compile.$share" 2>&1 &
    pids+=($!)
  done
  wait "${pids[@]}"
  cat "$out"/.compile.* | grep -E "BAD|Error" | head -n 5
  rm -f "$out"/.compile.*
  echo "== compile ahead: of $carried kernels that were here and others, $(kernels_kept -newer "$keep/started") were compiled; $SECONDS s in all" | tee -a "$log"
}

kernels_kept() {
  find "$TRITON_CACHE_DIR" -name '*.cubin' "$@" 2>/dev/null | wc -l
}

if [ -n "$dry" ]; then
  dry_kernels=(--dry-run) dry_attention=(--dry-run) dry_checks=(--device cpu --tiny)
  dry_rows=("${dry_checks[@]}" --scale 64 --shrink 64)
  tests=(tests/kernels/slots/test_tables.py) soak=4
else
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.used --format=csv,noheader | tee -a "$log"
  # The memory of graphs is extrapolated from some of them: nobody has seen yet how well.
  dry_kernels=() dry_attention=() dry_checks=() dry_rows=(--set mem_fraction_static=0.85)
  # Not those of the CPU's kernels: compiling these takes a minute there.
  tests=(tests/kernels "--ignore-glob=*cpu*" "--ignore-glob=*block_*" tests/runtime/steps/test_tree_planner.py) soak=45
  $python -c 'import xdist' 2>/dev/null && tests+=(-n 8)
fi
table=() chosen=
for file in "${TABLE:-$out/table.json}" "$keep/table.json"; do
  [ -f "$file" ] && chosen=$(realpath "$file") && table=(--set "kernel_table=\"$chosen\"") && break
done
flags=() fit=()
for file in "$out/flags.txt" "$keep/flags.txt"; do
  [ -f "$file" ] || continue
  while read -r line; do
    case $line in --*) fit+=("$line") ;; *) flags+=(--set "$line") ;; esac
  done <"$file"
  break
done
carried=$(kernels_kept)
touch "$keep/started"
compile_ahead
case $part in
  ladder)
    run check 90 $python benchmarks/bench_kernels.py "${dry_kernels[@]}" --sections check --out "$out/check.json"
    run ladder 330 $python benchmarks/ladder.py "${dry_checks[@]}" --limit $((30 * slack * slack)) --out "$out"
    climbed=$?
    [ -f "$out/flags.txt" ] && [ -z "$dry" ] && cp "$out/flags.txt" "$keep"
    [ "$climbed" = 1 ] && [ -z "$dry" ] && exit 1 # the plainest engine fails; past its time (124) it has found something
    run attention 60 $python benchmarks/bench_attention.py "${dry_attention[@]}" --sections tree,decode --seconds 50 --out "$out/attention.json"
    ;;
  kernels)
    run tree-decode 130 $python benchmarks/bench_attention.py "${dry_attention[@]}" --sections tree,decode --seconds 120 --out "$out/attention.json"
    run products 110 $python benchmarks/bench_kernels.py "${dry_kernels[@]}" --sections gemv,gate,stack --out "$out/products.json"
    run pages 60 $python benchmarks/bench_attention.py "${dry_attention[@]}" --sections decode --page 64 --seconds 50 --out "$out/pages.json"
    run extend 70 $python benchmarks/bench_attention.py "${dry_attention[@]}" --sections extend --seconds 60 --out "$out/extend.json"
    run fit 20 $python benchmarks/fit_table.py "${fit[@]}" --kernels "$out/products.json" --attention "$out/attention.json" "$out/extend.json" --pages "$out/pages.json" --out "$out/table.json"
    [ -f "$out/table.json" ] && [ -z "$dry" ] && cp "$out/table.json" "$keep"
    run kernel-tests 110 $python -m pytest -q -p no:cacheprovider -W default -m "not slow" --timeout 100 "${tests[@]}"
    run others 60 $python benchmarks/bench_kernels.py "${dry_kernels[@]}" --sections sampling,masks,small --out "$out/others.json"
    if [ -z "$dry" ] && command -v compute-sanitizer >/dev/null; then
      run sanitizer 60 compute-sanitizer --error-exitcode 9 $python -m pytest -q -p no:cacheprovider -W default tests/kernels/attention/test_tree.py tests/kernels/slots/test_tables.py
    fi
    ;;
  engine)
    run checks 120 $python benchmarks/check_gpu.py "${dry_checks[@]}" "${flags[@]}" "${model[@]}" --sections reference,same --out "$out/checks.jsonl"
    rows rows-few 80 decode1@1,unique@50,jsonoff@32,json@32
    rows rows-shared 120 fork@64,rag@50,agentic@50,multiturn@50,unique@10,mixed@64
    rows rows-many 130 rag@256,multiturn@256,agentic@256,unique@256,jsonoff@128,json@128,jsonoff@1,json@1
    run profile 60 $python benchmarks/bench_gpu.py "${dry_rows[@]}" "${table[@]}" "${flags[@]}" --rows unique@50 --most 60 --label profile --profile "$out/trace.json" --out "$out/rows.jsonl"
    run no-tree 45 $python benchmarks/bench_gpu.py "${dry_rows[@]}" "${table[@]}" "${flags[@]}" --rows fork@64,rag@50 --label no-tree --set 'tree_attention="off"' --out "$out/rows.jsonl"
    run grammar-soak 80 $python benchmarks/check_gpu.py "${dry_checks[@]}" "${flags[@]}" --sections grammar,soak --soak "$soak" --out "$out/checks.jsonl"
    run deterministic 60 $python benchmarks/check_gpu.py "${dry_checks[@]}" "${flags[@]}" "${model[@]}" --sections deterministic --out "$out/checks.jsonl"
    run deterministic-cost 60 $python benchmarks/bench_gpu.py "${dry_rows[@]}" "${flags[@]}" --rows unique@50 --label deterministic --set deterministic=true --out "$out/rows.jsonl"
    [ -f "$out/trace.json" ] && gzip -f "$out/trace.json"
    ;;
  *)
    echo "unknown part $part: ladder, kernels or engine" >&2
    exit 2
    ;;
esac
grep "^== .*status" "$log"
