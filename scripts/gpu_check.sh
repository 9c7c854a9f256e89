#!/usr/bin/env bash
# Everything a GPU can tell about this checkout, on a bare NVIDIA machine without network: python with torch, triton,
# pybind11, ninja, pytest and nvcc on PATH. A failing part does not stop the rest; a short table comes last.
#
#   scripts/gpu_check.sh FOLDER      logs and rows go to FOLDER
set -u
cd "$(dirname "$0")/.."
out=${1:?name a folder for the results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
summary=()

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    status=$?
    summary+=("$(printf '%-12s exit %-3s %4s s  %s' "$name" $status $((SECONDS - start)) "$(tail -n 1 "$out/$name.log" | cut -c1-90)")")
}

nvidia-smi > "$out/nvidia-smi.log" 2>&1
part build 200 env BARK_FAST_CUDA="${BARK_FAST_CUDA:-90}" python3 setup.py build_ext --inplace
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ ! -e bark_fast/kernels ]; then # an in-place build has no package-dir mapping
    ln -s ../kernels bark_fast/kernels
    trap 'rm -f bark_fast/kernels' EXIT
fi
part doctor 60 python3 -m bark_fast.cli doctor
part tests 150 python3 -m pytest -m gpu -q -p no:cacheprovider
part memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m pytest -m gpu -q -x tests/ops
part paged-kv 60 python3 benchmarks/bench_paged_kv_cuda.py
for dtype in float32 bfloat16; do
    part "e2e-$dtype" 150 python3 benchmarks/bench_e2e.py --device cuda --dtype "$dtype" --size small --seconds 5 --repeats 1
done
cp benchmarks/results/*.csv "$out/" 2> /dev/null

printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
