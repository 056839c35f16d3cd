#!/usr/bin/env bash
# Everything that needs a GPU, in one command with a deadline of nine minutes: build, GPU tests, the oracle check, the benchmark
# grid, compute-sanitizer, a profile. Needs nvcc, torch with CUDA and the packages of requirements/dev.txt that the stages
# name when they miss them; no network.
#
#   scripts/gpu_check.sh [--dry-run] [OUT]
#
# OUT (default: benchmarks/results/gpu-<name>/) receives gpu.json, gpu.csv, gpu.md, gpu.png (the benchmark), check.json (the
# oracle check), plan.txt (which tier the cost model takes), tuned/ (what each tier took for a few layers, as a tuned table),
# triton/ (the Triton backend's oracle check, its benchmark beside the CUDA backend's, and head.json, the linear + cross-entropy
# head), summary.json (every stage and how it ended) and logs/, a file for each stage. Every stage has a time limit; one that
# fails or runs out of time does not stop the others, but the exit code is 1. --dry-run needs no GPU: the same stages, with the
# emulator and Triton's interpreter in place of the device.
#
#   PYTHON                    the interpreter (python3)
#   RNNLM_GPU_CHECK_SECONDS   for everything (520)
#   RNNLM_COMMIT              what the results name as the commit where the tree is no repository
#   RNNLM_GPU_PROBES          a folder with probe.cu and baseline.py of one's own, each called with an output folder: built
#                             and run last
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONUNBUFFERED=1
export RNNLM_TUNED_DIR=off # what is measured is what everybody gets
python=${PYTHON:-python3}
dry=
[[ ${1:-} == --dry-run ]] && { dry=1; shift; }
deadline=$((EPOCHSECONDS + ${RNNLM_GPU_CHECK_SECONDS:-520}))

if [[ -z $dry ]]; then
  "$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu_check.sh: torch sees no GPU")' || exit 2
  read -r gpu arch < <("$python" - <<'PY'
import re, torch
major, minor = torch.cuda.get_device_capability()
name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
print(f"gpu-{name}", f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real")
PY
  )
else
  gpu=dry-run arch=none
fi
out=${1:-benchmarks/results/$gpu}
mkdir -p "$out/logs" || exit 2
out=$(cd "$out" && pwd)
summary=$out/logs/stages.tsv
: >"$summary"

left() { echo $((deadline - EPOCHSECONDS)); }

record() { # NAME RESULT SECONDS
  printf '%s\t%s\t%s\n' "$@" >>"$summary"
  printf '== %-11s %s (%s s)\n' "$@"
}

# stage NAME LIMIT COMMAND...: runs it with its output in logs/NAME.txt and no longer than LIMIT seconds.
stage() {
  local name=$1 limit=$2 log=$out/logs/$1.txt start=$SECONDS result=ok code
  shift 2
  ((limit > $(left))) && limit=$(left)
  if ((limit < 3)); then
    record "$name" "no time left" 0
    return 1
  fi
  timeout -k 5 "$limit" "$@" </dev/null >"$log" 2>&1
  code=$?
  ((code == 124 || code == 137)) && result="stopped after its $limit s"
  ((code != 0)) && [[ $result == ok ]] && result="failed with code $code"
  record "$name" "$result" $((SECONDS - start))
  [[ $result == ok ]] || tail -n 12 "$log" | sed 's/^/   | /'
  return $((code != 0))
}

have() { # WHAT COMMAND: records that a stage is left out where its tool is missing
  command -v "$2" >/dev/null && return
  record "$1" "skipped: no $2 here" 0
  return 1
}

# What is here, and what will be missed.
tools() {
  "$python" -VV
  "$python" - <<'PY'
import importlib.metadata, importlib.util
for name in ("torch", "triton", "numpy", "setuptools", "pybind11", "cmake", "ninja", "pytest", "hypothesis", "typer", "rich",
             "matplotlib", "psutil"):
    if importlib.util.find_spec(name) is None:
        print(f"MISSING: Python package {name}")
    else:
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "without a version")
PY
  for tool in nvcc cmake ninja compute-sanitizer ncu nvidia-smi g++ git; do
    printf '%s: %s\n' "$tool" "$(command -v "$tool" || echo MISSING)"
  done
  nvcc --version | tail -n 2
  nvidia-smi
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit --format=csv
  git log -1 --format='commit %H, %cd' || echo "commit ${RNNLM_COMMIT:-unknown}"
  return 0
}

build() {
  if [[ -z $dry ]]; then
    RNNLM_BUILD_CUDA=1 RNNLM_CUDA_ARCHS=$arch "$python" setup.py -q build_ext --inplace
  elif ! "$python" -c 'import rnnlm_kernels._emulated'; then
    RNNLM_BUILD_CUDA=0 RNNLM_BUILD_EMULATOR=1 "$python" setup.py -q build_ext --inplace
  fi && "$python" -m rnnlm_kernels info
}

check() {
  if [[ -z $dry ]]; then
    "$python" -m rnnlm_kernels check --device cuda --backend cuda --json >"$out/check.json"
  else
    "$python" -m rnnlm_kernels check --shape 3,2,5,7 --json >"$out/check.json"
  fi
}

tune() {
  if [[ -z $dry ]]; then
    "$python" -m rnnlm_kernels tune --backend cuda --cell lstm --dtype bfloat16 --hidden 1024 --hidden 256 --batch 16 --batch 64 \
      --steps 64 --budget 0.3 --budget-seconds 25 --out "$out/tuned"
  else
    "$python" scripts/gpu_tiny.py tune --emulate --cell gru --hidden 24 --batch 2 --steps 3 --samples 2 --out "$out/tuned"
  fi
}

# Layers that PyTorch's own GRU and LSTM are slow at, on both of our backends in turn. Kernels are compiled as they are first used.
triton() {
  mkdir -p "$out/triton"
  if [[ -z $dry ]]; then
    "$python" -m rnnlm_kernels check --device cuda --backend triton --shape 5,3,16,24 --shape 4,9,40,200 --json >"$out/triton/check.json"
    local code=$?
    "$python" -m rnnlm_kernels bench --device cuda --backend triton --backend cuda --cell gru --cell lstm --dtype bfloat16 \
      --shape 64,16,512,512 --shape 64,16,64,64 --shape 64,16,1024,1024 --budget 0.3 --check-steps 64 --budget-seconds 20 \
      --out "$out/triton" || code=1
    "$python" benchmarks/linear_cross_entropy.py --device cuda --dtype bfloat16 --shape 1400,650,10000 --shape 5600,400,33278 \
      --rounds 5 --out "$out/triton/head.json" || code=1
    return $code
  else
    "$python" scripts/gpu_tiny.py triton --emulate &&
      "$python" benchmarks/linear_cross_entropy.py --shape 40,8,300 --rounds 2 --out "$out/triton/head.json"
  fi
}

plan() {
  "$python" scripts/gpu_tiny.py plan >"$out/plan.txt"
}

probes() {
  local budget=$(($(left) - 60))
  ((budget > 220)) && budget=220
  nvcc -O3 -std=c++17 "-gencode=arch=compute_${arch%-real},code=sm_${arch%-real}" -o "$out/logs/probe" \
    "$RNNLM_GPU_PROBES/probe.cu" && "$out/logs/probe" "$out/probes"
  rm -f "$out/logs/probe"
  "$python" "$RNNLM_GPU_PROBES/baseline.py" "$out/probes" --budget-seconds $((budget > 0 ? budget : 0))
}
export -f tools build check tune triton plan probes left
export python dry gpu arch out deadline

stage tools 20 bash -c tools
grep -h MISSING "$out/logs/tools.txt" | sed 's/^/   | /'

if stage build 200 bash -c build; then
  stage plan 20 bash -c plan
  if [[ -z $dry ]]; then
    stage tests 120 "$python" -m pytest -m gpu -q -p no:cacheprovider tests
    stage check 70 bash -c check
    # The rest, less what the stages behind it need; but the grid goes before them.
    budget=$(($(left) - 215))
    ((budget < 100)) && budget=100
    ((budget > 220)) && budget=220
    stage bench $((budget + 20)) "$python" -m rnnlm_kernels bench --grid gpu --device cuda --backend cuda --budget 0.1 \
      --check-steps 128 --budget-seconds $((budget > 0 ? budget : 0)) --out "$out"
    stage tune 40 bash -c tune
    stage triton 70 bash -c triton

    # All at a time: none of them times anything. An allocation of its own for each tensor shows who reads or writes
    # beyond one, or reads what nobody wrote.
    if have sanitizers compute-sanitizer; then
      for tool in memcheck racecheck synccheck initcheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 70 compute-sanitizer --tool "$tool" --kernel-name kns=rnnlm \
          --error-exitcode 9 --report-api-errors no --port $((49200 + RANDOM % 9000)) \
          "$python" scripts/gpu_tiny.py check &
      done
      # Names of Triton's kernels have nothing in common, so all kernels are checked, PyTorch's too.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage memcheck-triton 70 compute-sanitizer --tool memcheck \
        --error-exitcode 9 --report-api-errors no --port $((49200 + RANDOM % 9000)) \
        "$python" scripts/gpu_tiny.py triton &
      wait
    fi
    # The settings of the clocks are left alone.
    have profile ncu && RNNLM_CUDA_TIER=grid stage profile 50 ncu --clock-control none --kernel-name 'regex:grid_(forward|backward)_kernel' \
      --launch-skip 2 --launch-count 2 --set basic --section WarpStateStats --section MemoryWorkloadAnalysis \
      --section InstructionStats "$python" scripts/gpu_tiny.py profile
  else
    stage tests 60 "$python" -m pytest -m gpu -q -p no:cacheprovider --collect-only tests
    stage check 60 bash -c check
    stage bench 60 "$python" -m rnnlm_kernels bench --shape 4,2,8,8 --cell gru --samples 2 --check-steps 3 \
      --budget-seconds 30 --out "$out"
    stage tune 60 bash -c tune
    stage triton 120 bash -c triton
    stage emulator 120 "$python" scripts/gpu_tiny.py check --emulate
  fi
fi
if [[ -n ${RNNLM_GPU_PROBES:-} && -z $dry && -f $RNNLM_GPU_PROBES/probe.cu && -f $RNNLM_GPU_PROBES/baseline.py ]]; then
  mkdir -p "$out/probes"
  stage probes 300 bash -c probes
fi

"$python" - "$summary" "$out/summary.json" <<'PY'
import datetime, json, os, subprocess, sys
rows = [line.rstrip("\n").split("\t") for line in open(sys.argv[1])]
stages = [{"stage": name, "result": result, "seconds": int(seconds)} for name, result, seconds in rows]
git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
summary = {
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "gpu": os.environ["gpu"],
    "commit": git.stdout.strip() or os.environ.get("RNNLM_COMMIT"),
    "stages": stages,
    "ok": all(s["result"] == "ok" or s["result"].startswith("skipped") for s in stages),
}
with open(sys.argv[2], "w") as file:
    json.dump(summary, file, indent=1)
    file.write("\n")
bad = [s["stage"] for s in stages if s["result"] != "ok" and not s["result"].startswith("skipped")]
print(f"gpu_check.sh: {len(stages)} stages, " + (f"not ok: {', '.join(bad)}" if bad else "all ok"))
sys.exit(bool(bad))
PY
code=$?
echo "results in $out, $SECONDS s"
exit $code
