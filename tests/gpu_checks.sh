#!/usr/bin/env bash
# On a machine with a GPU: every test that needs one, and with --sanitize each test of cuda_ops_test
# under compute-sanitizer's memcheck, initcheck and racecheck, as many at once as there are cores.
# Usage: tests/gpu_checks.sh [--sanitize] [BIN_DIR]   (default: build/release/bin)
# A line per test and tool; ends with an error if one of them failed. Races inside kernels of
# cuBLASLt and cuDNN are told, and do not count. SECONDS_EACH limits a test under a tool [1200]; TOOLS
# names some of the tools, ONLY what a test's name has to contain (a regular expression): then the
# tests and the job without a tool are left out.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
sanitize=no
[ "${1:-}" != --sanitize ] || { sanitize=yes; shift; }
bin=$(realpath "${1:-$root/build/release/bin}")
export bin SECONDS_EACH=${SECONDS_EACH:-1200}
export logs
logs=$(mktemp -d)
nvidia-smi -L

failed=()
run() {  # NAME COMMAND...
  local name=$1
  shift
  if "$@" >"$logs/$name" 2>&1; then
    echo "ok      $name"
  else
    echo "FAILED  $name: $logs/$name"
    failed+=("$name")
  fi
}
if [ -z "${TOOLS:-}${ONLY:-}" ]; then
  for test in cuda_ops_test engine_cuda_test worker_memory_test communicator_test; do
    run "$test" "$bin/$test" --gtest_brief=1
  done
  run gpu_job_test env ATTUNE_BIN_DIR="$bin" python3 "$root/tests/e2e/gpu_job_test.py"
fi

under() {  # TOOL TEST
  local log=$logs/$1-${2//\//-} rc=0
  timeout "$SECONDS_EACH" compute-sanitizer --tool "$1" --print-limit 20 "$bin/cuda_ops_test" \
    --gtest_brief=1 --gtest_filter="$2" >"$log" 2>&1 || rc=$?
  local note=""
  if grep -q "before first instrumented API call" "$log" && grep -q "  PASSED  " "$log"; then
    rc=0 note=" (nothing on the device)"
  elif [ "$1" = racecheck ] && grep -q "access at" "$log"; then
    if grep "access at" "$log" | grep -q "attune::"; then rc=1; else note=" (races in a library's kernel)"; fi
  elif [ "$1" != racecheck ] && ! grep -q "ERROR SUMMARY: 0 errors" "$log"; then
    [ "$rc" != 0 ] || rc=1
  fi
  case $rc in
    0) echo "ok      $1 $2$note" ;;
    124) echo "FAILED  $1 $2: not within $SECONDS_EACH s"; return 1 ;;
    *) echo "FAILED  $1 $2: $log"; return 1 ;;
  esac
}
export -f under
if [ "$sanitize" = yes ]; then
  tests=$("$bin/cuda_ops_test" --gtest_list_tests |
    awk '/^[^ ]/ {suite = $1} /^ / {print suite $1}' | grep -E "${ONLY:-.}") ||
    { echo "no test's name contains $ONLY"; exit 1; }
  for tool in ${TOOLS:-memcheck initcheck racecheck}; do
    for test in $tests; do printf '%s %s\n' "$tool" "$test"; done
  done | xargs -P "$(nproc)" -L 1 bash -c 'under "$@"' _ || failed+=(sanitizers)
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all passed"
