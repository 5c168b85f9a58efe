#!/usr/bin/env bash
# Gather what run_on_gpu.sh needs on a machine without a network: wheels and compiled kernels in .whl, a model file in
# .model0, .model1, ...
#
#   benchmarks/pack_for_gpu.sh [MODEL.gguf]      run where pip works and this package's dependencies are installed
#
# Copy the working tree and .whl to the machine; a model's parts may come one a run (each fits PART_MIB), run_on_gpu.sh
# keeps them there until it has all. The wheels are for FOR_PYTHON on Linux x86-64, in the versions installed here, so
# that what runs there is what was tested here. Kernels are compiled with KERNEL_PYTHON, whose Triton must be that of the
# machine: another one would compile them again. What such a machine has anyway (torch, triton, transformers, numba, ...)
# is not among them.
set -eu
python=${PYTHON:-python3}
for_python=${FOR_PYTHON:-3.12}
part_mib=${PART_MIB:-32}
cd "$(dirname "$0")/.."
packages=(
  annotated-types gguf lark lazy-loader msgspec outlines-core platformdirs pydantic pydantic-core typing-extensions
  typing-inspection packaging
  jsonschema jsonschema-specifications referencing rpds-py # of the tests
)
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux_2_5 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
wanted=()
for name in "${packages[@]}"; do
  wanted+=("$name==$($python -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$name")")
done
rm -rf .whl .model[0-9]*
$python -m pip download -q --no-deps --only-binary=:all: --python-version "$for_python" --implementation cp \
  "${platforms[@]}" -d .whl "${wanted[@]}"
git describe --always --dirty >.whl/commit
cache=$(mktemp -d)
cores=$(nproc)
pids=()
for ((share = 0; share < cores; share++)); do
  PYTHONPATH="$PWD:${PYTHONPATH:-}" TRITON_CACHE_DIR=$cache ${KERNEL_PYTHON:-$python} benchmarks/compile_kernels.py --candidates \
    --only "${KERNELS:-llama-8b,smollm2,try,prepare,commit,scatter,copy_pages,build_masks,advance}" --share "$share/$cores" \
    >"$cache/$share.txt" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || echo "a kernel in use is bad: see .whl/kernels.txt"; done
cat "$cache"/*.txt >.whl/kernels.txt
# What a launch needs, and what a report is made of; Triton's own intermediate forms are as much again. With xz less than
# half of what gzip leaves: hundreds of kernels have much in common.
(cd "$cache" && find . \( -name '*.cubin' -o -name '*.ptx' -o -name '*.json' \) -print0 | tar -cf - --null -T -) | xz -T0 >.whl/triton.tar.xz
rm -r "$cache"
# The CPU's answers, too: where minutes of a GPU count, they are not computed there.
reference() { # name, options
  local name=$1
  shift
  PYTHONPATH="$PWD:${PYTHONPATH:-}" $python benchmarks/check_gpu.py --device cpu --sections reference --reference ".whl/$name.json" "$@"
}
reference random
if [ -n "${1:-}" ]; then
  # Names carry the whole file's hash: parts of two files are never put together.
  hash=$(sha256sum "$1" | cut -c1-16)
  split -b "${part_mib}M" -d -a 1 "$1" ".part-$hash."
  count=$(ls .part-"$hash".* | wc -l)
  for part in .part-"$hash".*; do
    number=${part##*.}
    mkdir ".model$number"
    mv "$part" ".model$number/$hash.$number.of$count"
  done
  reference "$hash" --model "$1"
fi
du -sh .whl $(ls -d .model[0-9]* 2>/dev/null)
