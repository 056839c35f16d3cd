#!/usr/bin/env bash
# Everything that needs a GPU, in one run: build, GPU tests, the oracle check and the benchmark on the device.
# Results: benchmarks/results/<gpu>/. Needs nvcc, torch with CUDA, and the packages of requirements/dev.txt except torch.
#
#   scripts/gpu_check.sh [OUT]     OUT: where results go instead
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

"$python" - <<'PY'
import sys, torch
sys.exit(None if torch.cuda.is_available() else "gpu_check.sh: torch sees no GPU")
PY
gpu=$("$python" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
out=${1:-benchmarks/results/$gpu}
mkdir -p "$out"

RNNLM_BUILD_CUDA=1 "$python" setup.py -q build_ext --inplace
"$python" -m pytest -m gpu tests -ra
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --error-exitcode 1 "$python" -m pytest -q -m gpu tests/test_cuda_probe.py
fi
"$python" -m rnnlm_kernels info
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader >"$out/device.txt"
git rev-parse HEAD >>"$out/device.txt" 2>/dev/null || true
# There are no fused kernels for GPUs yet: what runs there is the reference, and its distance to cuDNN is the baseline.
"$python" -m rnnlm_kernels check --device cuda --backend reference
"$python" -m rnnlm_kernels bench --device cuda --backend reference --out "$out"
