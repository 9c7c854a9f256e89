#!/usr/bin/env bash
# Everything a GPU can tell about this checkout, in 9 minutes, on a bare NVIDIA machine without network: python with
# torch, triton, pybind11, ninja, pytest and nvcc on PATH. A failing part does not stop the rest; a short table comes
# last. What is most worth knowing comes first: tests beside one another, then benchmarks, each alone on the GPU.
#
#   scripts/gpu_check.sh FOLDER      logs and rows go to FOLDER
set -u
cd "$(dirname "$0")/.."
out=${1:?name a folder for the results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
deadline=${GPU_CHECK_SECONDS:-530}
checkpoints=$(mktemp -d)
linked=
trap 'rm -rf "$checkpoints" $linked' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

part() { # part NAME SECONDS COMMAND...: run, log, and keep a line for the table
    local name=$1 limit=$2 start=$SECONDS status=skipped
    shift 2
    [ $limit -gt $((deadline - SECONDS)) ] && limit=$((deadline - SECONDS))
    if [ $limit -ge 5 ]; then
        timeout -k 5 $limit "$@" > "$out/$name.log" 2>&1
        status=$?
    else
        echo "no time was left" > "$out/$name.log"
    fi
    printf '%-14s exit %-7s %4s s  %s\n' "$name" $status $((SECONDS - start)) \
        "$(tail -n 1 "$out/$name.log" | cut -c1-100)" > "$out/$name.status"
}

nvidia-smi > "$out/nvidia-smi.log" 2>&1
part build 150 env BARK_FAST_CUDA="${BARK_FAST_CUDA:-90}" python3 setup.py build_ext --inplace
if [ ! -e bark_fast/kernels ]; then # an in-place build has no package-dir mapping
    ln -s ../kernels bark_fast/kernels && linked=bark_fast/kernels
fi
part doctor 60 python3 -m bark_fast.cli doctor

# most of a first test's time is Triton compiling on the CPU, so several run at once where xdist is there
workers=()
python3 -c "import xdist" 2> /dev/null && workers=(-n 6)
pytest=(python3 -m pytest -m gpu -q --import-mode=importlib -p no:cacheprovider --continue-on-collection-errors)
part tests 200 "${pytest[@]}" "${workers[@]}" tests &
# allocations of their own, or an overrun would end in a neighbour's; a driver call that torch lets fail is no fault
part memcheck 200 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
    --report-api-errors no "${pytest[@]}" -k "not captured" tests/ops/test_paged_kv.py &
wait

# large takes a while to make, and three benchmarks speak with it
large=(--device cuda --size large --dtype bfloat16 --checkpoints "$checkpoints")
part decode 120 python3 benchmarks/bench_decode.py "${large[@]}"
part engine 90 python3 benchmarks/bench_engine.py "${large[@]}" --case alone many
some=(--dtype bfloat16 --rows 1 8 1024) # of the linear layers: all of them take minutes to compile
part norm_linear 45 python3 benchmarks/bench_norm_linear.py "${some[@]}"
part mlp 45 python3 benchmarks/bench_mlp.py "${some[@]}"
for name in attention sampling paged_kv_cuda; do
    part "$name" 45 python3 "benchmarks/bench_$name.py"
done
part e2e-large 90 python3 benchmarks/bench_e2e.py "${large[@]}" --seconds 5 --repeats 1 --peers transformers
part e2e-small 60 python3 benchmarks/bench_e2e.py --device cuda --dtype float32 --size small --seconds 5 --repeats 1
part batches 60 python3 benchmarks/bench_engine.py --device cuda --case equal
cp benchmarks/results/*.csv "$out/" 2> /dev/null

for name in build doctor tests memcheck decode engine attention norm_linear mlp sampling paged_kv_cuda \
    e2e-large e2e-small batches; do
    cat "$out/$name.status"
done | tee "$out/summary.txt"
