#!/usr/bin/env bash
# Installs what the tests need, builds, and runs all of them: one optimised tree with everything,
# then the targets without gRPC under AddressSanitizer and UBSan (with the fuzzers) and under
# ThreadSanitizer. Can be run again; leaves no process behind.
# Usage: ./test.sh [release|asan|tsan|bundle ...]   (default: the first three; bundle builds the
# static programs and runs them in a root that holds nothing but glibc)
set -euo pipefail
cd "$(dirname "$0")"

jobs=$(nproc)
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(release asan tsan)

step() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }

step "packages"
deploy/install_packages.sh test

failed=()
for stage in "${stages[@]}"; do
  step "build: $stage"
  cmake --preset "$stage" >"build-$stage.log" 2>&1 || { cat "build-$stage.log"; exit 1; }
  cmake --build --preset "$stage" -j "$jobs" >>"build-$stage.log" 2>&1 ||
    { tail -n 60 "build-$stage.log"; exit 1; }
  mv "build-$stage.log" "build/$stage/build.log"
  step "test: $stage"
  # One test more than cores: those of processes wait for each other half of the time. OpenMP's
  # threads sleep instead of spinning.
  if ! env GOMP_SPINCOUNT=1000 \
      TSAN_OPTIONS="halt_on_error=1" \
      ASAN_OPTIONS="detect_leaks=1" UBSAN_OPTIONS="print_stacktrace=1" \
      ctest --preset "$stage" -j "$((jobs + 1))" --no-tests=error; then
    failed+=("$stage")
  fi
done

step "done"
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all stages passed: ${stages[*]}"
