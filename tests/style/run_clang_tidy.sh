#!/usr/bin/env bash
# clang-tidy (.clang-tidy) over our C++ sources, with the compile commands of build/release. Not part
# of ./test.sh: a full run takes an hour or so of one core.
# Usage: tests/style/run_clang_tidy.sh [FILE.cc ...]
#   without files: those that differ from origin's main branch, or from main (cheap; before a commit)
#   --all:         every source that build/release compiles
# Ends with another code than 0 where something is found.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${ATTUNE_BUILD_DIR:-build/release}
[ -f "$build/compile_commands.json" ] ||
  { echo "$0: configure first: cmake --preset release" >&2; exit 2; }
command -v clang-tidy >/dev/null || { echo "$0: apt-get install clang-tidy" >&2; exit 2; }

compiled() {  # what the build compiles of ours, as paths from here
  python3 - "$build" <<'PY'
import json, os, sys
for entry in json.load(open(sys.argv[1] + "/compile_commands.json")):
    path = os.path.relpath(os.path.join(entry["directory"], entry["file"]))
    if path.endswith(".cc") and not path.startswith((os.path.relpath(sys.argv[1]), "..")):
        print(path)
PY
}

if [ "${1:-}" = --all ]; then
  files=$(compiled | sort -u)
elif [ $# -gt 0 ]; then
  files=$(printf '%s\n' "$@")
else
  base=$(git merge-base HEAD origin/main 2>/dev/null || git merge-base HEAD main)
  files=$(comm -12 <(compiled | sort -u) <(git diff --name-only "$base" | sort -u))
fi
[ -n "$files" ] || { echo "nothing to check"; exit 0; }
printf '%s\n' "$files" |
  xargs -P "$(nproc)" -n 1 clang-tidy -p "$build" --quiet --warnings-as-errors='*' 2>/dev/null
