#!/usr/bin/env bash
# compute-sanitizer over the CUDA kernels of csrc/, on the small cases: accesses outside, races in shared memory, reads of
# what was never written, wrong barriers. Needs a GPU and the CUDA toolkit; takes minutes. Ends with 1 at the first finding.
#
#   tests/csrc/sanitize.sh              all four tools
#   tests/csrc/sanitize.sh racecheck    one of them
set -euo pipefail
cd "$(dirname "$0")/../.."

command -v compute-sanitizer > /dev/null || PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
command -v compute-sanitizer > /dev/null || {
  echo "sanitize.sh: compute-sanitizer was not found; it comes with the CUDA toolkit, put its bin folder on PATH" >&2
  exit 2
}
python=${PYTHON:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3

# Without torch's cache every tensor, and the scratch of every call, is an allocation of its own with an end of its own.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

for tool in "${@:-memcheck racecheck initcheck synccheck}"; do
  for one in $tool; do
    echo "== $one"
    compute-sanitizer --tool "$one" --error-exitcode 1 --kernel-name kernel_substring=contextrast \
      "$python" tests/csrc/sanitize_cases.py
  done
done
