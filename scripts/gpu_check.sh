#!/usr/bin/env bash
# Everything a GPU can tell about this checkout, in 9 minutes, on an NVIDIA machine without network: python with torch,
# triton, numpy, safetensors, tokenizers, click, setuptools, pybind11, ninja, pytest, and nvcc on PATH (transformers too,
# to be compared with; what is missing is said first). A failing part does not stop the rest. What is most worth knowing
# comes first: tests beside one another, then benchmarks, each alone on the GPU, and again with torch.compile in the time
# that is left. Last, also when the script is ended by a signal, it says in less than 12,000 characters whether the CUDA
# part is there, what failed, the figures that have a target, and how each part ended; the exit status is 0 only if
# nothing failed.
#
#   scripts/gpu_check.sh FOLDER      logs and rows go to FOLDER, and all of them to FOLDER/all.tgz
set -u
cd "$(dirname "$0")/.." || exit
out=${1:?name a folder for the results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
linked=
names=()
owed=530 # seconds of the plan below that are still to come
now() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); } # in milliseconds
total=$((1000 * ${GPU_CHECK_SECONDS:-$owed}))
unit=$((total / owed)) # milliseconds of a second of the plan
end=$(($(now) + total))
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$work/triton}" # HOME need not be writable

report() { # the table, whatever has run
    local status=$? running
    trap '' TERM INT HUP
    running=$(jobs -p)
    # shellcheck disable=SC2086
    [ -n "$running" ] && kill $running 2> /dev/null && wait
    cp benchmarks/results/*.csv "$out/" 2> /dev/null
    failures > "$out/failures.txt"
    (cd "$out" && cat "${names[@]/%/.status}" < /dev/null) > "$out/summary.txt"
    {
        cat "$out/missing.log"
        cuda_part
        at_most 2800 < "$out/failures.txt" | by_log
        targets | at_most 5000 | by_log
        cat "$out/summary.txt"
    } > "$out/report.txt"
    tar -czf "$work/all.tgz" -C "$out" --exclude ./all.tgz . && mv "$work/all.tgz" "$out/"
    cat "$out/report.txt"
    rm -rf "$work" $linked
    if [ $status -eq 0 ] && { [ -s "$out/failures.txt" ] || grep -qv ' exit 0 ' "$out/summary.txt"; }; then
        status=1
    fi
    exit $status
}
at_most() { # at_most CHARACTERS: whole lines of the input
    awk -v room="$1" '{ room -= length + 1 } room < 0 { print "...: more is in the logs"; exit } { print }'
}
cuda_part() { # the build goes on without it, and the operations take Triton in its place
    local built
    built=$(grep -h '^bark_fast: ' "$out/build.log" 2> /dev/null | tail -n 1)
    case $built in
        *' and CUDA ('*) echo "CUDA part: built, ${built##* and }" ;;
        *) echo "CUDA PART MISSING: ${built:-the build said nothing}" | cut -c1-300 ;;
    esac
    grep -Eho '(Triton|torch) takes its place on .*' "$out/doctor.log" 2> /dev/null | sed 's/^/CUDA PART NOT USED: /'
}
failures() { # of tests, of contenders in benchmarks, and those that compute-sanitizer found
    found '^(FAILED|ERROR|Fatal Python error:|=+ (Invalid|Program hit|ERROR SUMMARY: [1-9])).' | excerpt 5 140
}
targets() { # a second time, with torch.compile, only beside the static cache
    found ', wanted ' | grep -Ev '^compile_(linear|attention|mlp|sampling)\.log:' | excerpt 12 150
}
found() { # found PATTERN: lines of all logs, with the log's name
    (cd "$out" && grep -HE "$1" "${names[@]/%/.log}" /dev/null 2> /dev/null)
}
excerpt() { # excerpt LINES CHARACTERS: so many of each log, cut to so many, the first of every log first
    awk -v lines="$1" -v width="$2" '{
        colon = index($0, ":")
        log_name = substr($0, 1, colon - 5)
        text = substr($0, colon + 1)
        gsub(/ +/, " ", text)
    } ++seen[log_name] <= lines { print seen[log_name] "\t" log_name ": " substr(text, 1, width) }' |
        sort -s -n -k 1,1 | cut -f 2-
}
by_log() {
    sort -s -t : -k 1,1
}
trap report EXIT
trap 'exit 143' TERM INT HUP

part() { # part NAME SECONDS COMMAND...: run, log, and keep a line for the table
    local name=$1 start status=skipped job
    start=$(now)
    local limit=$((end - start - (owed - $2) * unit)) # with what the parts before it have not used
    shift 2
    if [ $limit -gt 0 ]; then
        timeout -k 5 "$(printf '%d.%03d' $((limit / 1000)) $((limit % 1000)))" "$@" > "$out/$name.log" 2>&1 &
        job=$!
        trap 'kill $job' TERM
        wait $job
        status=$?
        while kill -0 $job 2> /dev/null; do # a signal ended the wait
            wait $job
            status=$?
        done
    else
        echo "no time was left" > "$out/$name.log"
    fi
    printf '%-17s exit %-7s %4s s  %s\n' "$name" $status $((($(now) - start) / 1000)) \
        "$(tail -n 1 "$out/$name.log" | cut -c1-70)" > "$out/$name.status"
}
begin() { # begin NAME SECONDS COMMAND...: a part beside others
    names+=("$1")
    echo "$1 was ended" > "$out/$1.status"
    part "$@" &
}
finish() { # finish SECONDS: wait for all that was begun
    wait
    owed=$((owed - $1))
}
alone() { # alone NAME SECONDS COMMAND...
    begin "$@"
    finish "$2"
}

nvidia-smi > "$out/nvidia-smi.log" 2>&1
python3 -c '
from importlib.util import find_spec
wanted = "torch triton numpy safetensors tokenizers click setuptools pybind11 ninja pytest transformers".split()
print("missing packages:", " ".join(name for name in wanted if find_spec(name) is None) or "none")
from importlib.metadata import version
if find_spec("setuptools") and int(version("setuptools").split(".")[0]) < 77:
    print("setuptools", version("setuptools"), "is too old to build with: 77 is wanted")
' > "$out/missing.log" 2>&1
for tool in nvcc compute-sanitizer; do
    command -v $tool > /dev/null || echo "missing from PATH: $tool" >> "$out/missing.log"
done
archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | tr -d . | sort -u | xargs)
if ! [[ $archs =~ ^[0-9]+( [0-9]+)*$ ]]; then
    archs=90
    echo "nvidia-smi names no compute capability: the CUDA part is built for sm_90" >> "$out/missing.log"
fi
cat "$out/missing.log"

begin build 100 env BARK_FAST_CUDA="${BARK_FAST_CUDA:-$archs}" python3 setup.py build_ext --inplace
# three benchmarks speak with it
begin checkpoint 100 python3 -m bark_fast.cli make-checkpoint "$work/large/hf" --size large --format hf --quiet
finish 100
if [ ! -e bark_fast/kernels ]; then # an in-place build has no package-dir mapping
    ln -s ../kernels bark_fast/kernels && linked=bark_fast/kernels
fi
alone doctor 15 python3 -m bark_fast.cli doctor

# most of a first test's time is Triton compiling on the CPU: a process for each core or so, which also keeps a fault of
# CUDA, after which a process can do nothing more, to the tests of one
tests() { # tests NAME ARGUMENTS...
    local name=$1
    shift
    begin "$name" 125 python3 -m pytest -m gpu -q --import-mode=importlib -p no:cacheprovider \
        -o faulthandler_timeout=60 --continue-on-collection-errors "$@"
}
tests engine tests/test_gpu.py
tests decode_loop tests/test_decode_loop.py tests/test_transfers.py tests/test_kv_pool.py
tests load tests/test_scheduler.py
tests memory tests/test_memory.py tests/test_checkpoint.py tests/test_replicas.py
tests peers tests/test_drift.py tests/test_bench_engine.py tests/test_static_peer.py
linear=tests/ops/test_norm_linear.py
tests shapes $linear -k "barks_shapes and not float32"
tests shapes32 $linear -k "barks_shapes and float32"
tests matmul $linear -k matmul
tests linear $linear -k "not barks_shapes and not matmul"
tests mlp_ops tests/ops/test_mlp.py tests/ops/test_embedding.py
tests sampling_ops tests/ops/test_sampling.py tests/ops/test_head_sampling.py tests/ops/test_philox.py
tests attention_ops tests/ops/test_attention.py tests/ops/test_tf32.py tests/ops/test_decode_state.py \
    tests/ops/test_target.py tests/ops/test_gpus.py
tests paged_ops tests/ops/test_paged_kv.py tests/ops/test_paged_kv_triton.py tests/ops/test_paged_prefill.py
# allocations of their own, or an overrun would end in a neighbour's; a driver call that torch lets fail is no fault
begin memcheck 125 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
    --report-api-errors no python3 -m pytest -m gpu -q --import-mode=importlib -p no:cacheprovider \
    -k "not captured" tests/ops/test_paged_kv.py
finish 125

large=(--device cuda --size large --dtype bfloat16 --checkpoints "$work")
some=(--dtype bfloat16 --width 1024 --rows 1 8) # of the linear layers: all of them take minutes to compile
alone decode 40 python3 benchmarks/bench_decode.py "${large[@]}" --peers-batch 1 --runs 2 --no-compile
alone speech 60 python3 benchmarks/bench_engine.py "${large[@]}" --case alone many equal
alone e2e-large 40 python3 benchmarks/bench_e2e.py "${large[@]}" --seconds 3 --repeats 1 --peers transformers
alone paged_kv_cuda 20 python3 benchmarks/bench_paged_kv_cuda.py --dtype bfloat16
alone norm_linear 20 python3 benchmarks/bench_norm_linear.py "${some[@]}" --no-compile
alone attention 18 python3 benchmarks/bench_attention.py --dtype bfloat16 --no-compile
alone mlp 12 python3 benchmarks/bench_mlp.py "${some[@]}" --no-compile
alone sampling 15 python3 benchmarks/bench_sampling.py --few --no-compile
alone e2e-small 20 python3 benchmarks/bench_e2e.py --device cuda --dtype float32 --size small --seconds 3 --repeats 1 \
    --peers transformers
# the peers under torch.compile, in what time is left: max-autotune of the static cache takes minutes
alone compile_decode 21 python3 benchmarks/bench_decode.py "${large[@]}" --batch 1 --runs 2
alone compile_linear 6 python3 benchmarks/bench_norm_linear.py "${some[@]}"
alone compile_attention 6 python3 benchmarks/bench_attention.py --dtype bfloat16
alone compile_mlp 6 python3 benchmarks/bench_mlp.py "${some[@]}"
alone compile_sampling 6 python3 benchmarks/bench_sampling.py --few
