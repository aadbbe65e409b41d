#!/usr/bin/env bash
# Installs what attune needs, builds it, and fine-tunes a small model on two CPU devices of this
# machine: the same prompt is answered before and after. Can be run again; leaves no process.
set -euo pipefail
cd "$(dirname "$0")"

example=examples/quickstart
out=.quickstart
bin=build/release/bin
bold() { printf '\n\033[1m%s\033[0m\n' "$*"; }

bold "1. Packages"
deploy/install_packages.sh build

bold "2. Build (log: $out/build.log)"
mkdir -p "$out"
{ cmake --preset release && cmake --build --preset release -j "$(nproc)" --target \
    attuned attune-worker attune-trainer attune; } >"$out/build.log" 2>&1 ||
  { tail -n 40 "$out/build.log"; exit 1; }
ls -1 "$bin"/attune*

prompt=$(cat "$example/prompt.txt")
ask() { "$bin/attune" generate --model "$example/model" "$@" --prompt "$prompt" --max-tokens 60; }

bold "3. Before: \"$prompt\""
before=$(ask)
printf '%s\n' "$before"

bold "4. Fine-tuning: coordinator, agent and two trainers on this machine"
rm -rf "$out/adapter"
"$bin/attune" local "$example/job.yaml" --cpu-slots 2 -o "$out/adapter"

bold "5. After: \"$prompt\""
after=$(ask --adapter "$out/adapter")
printf '%s\n' "$after"
[ "$before" != "$after" ] || { echo "the answer did not change" >&2; exit 1; }

bold "Try next"
cat <<NEXT
  $bin/attune generate --model $example/model --adapter $out/adapter --prompt "Your question"
  $bin/attune estimate $example/job.yaml
  $bin/attuned --help        (then README.md, "Run it as a service")
NEXT
