#!/usr/bin/env bash
# The independent oracles: installs them from PyPI (torch is 3 GB), regenerates every golden file
# into a scratch directory and compares it with the committed one, and runs the live checks against
# the programs of build/release. Not needed to build, to run, or for ./test.sh.
# Usage: tests/parity/run_oracles.sh [ADAPTER]   (an adapter trained by ./quickstart.sh)
# ATTUNE_ORACLE_VENV names an environment that has the packages already.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=${ATTUNE_ORACLE_VENV:-build/oracle-venv}
bin=build/release/bin
shared=${ATTUNE_SHARED_DIR:-../shared}
adapter=${1:-.quickstart/adapter}
if [ ! -x "$venv/bin/python" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q torch transformers peft bitsandbytes tokenizers jinja2 numpy safetensors
fi
python=$venv/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

echo "== engine golden files"
"$python" tests/parity/engine/make_golden.py --out "$scratch/engine"
for case in "$scratch"/engine/*; do
  "$python" - "$case/case.json" "tests/parity/engine/golden/$(basename "$case")/case.json" <<'PY'
import json, sys
new, old = (json.load(open(p)) for p in sys.argv[1:3])
worst = max(abs(a - b) / b for a, b in zip(new["losses"], old["losses"]))
assert new["steps"] == old["steps"] and worst < 1e-5, worst
print("the same documents; losses within", worst)
PY
done

echo "== schedule golden file"
"$python" tests/parity/schedule/make_golden.py --out "$scratch/schedule.json"
cmp "$scratch/schedule.json" tests/parity/schedule/golden.json
echo "== early stopping golden file"
"$python" tests/parity/early_stopping/make_golden.py --out "$scratch/early_stopping.json"
cmp "$scratch/early_stopping.json" tests/parity/early_stopping/golden.json

echo "== merge golden file"
"$python" tests/parity/merge/check_merge.py --golden "$scratch/merge.json"
cmp "$scratch/merge.json" tests/parity/merge/golden.json

echo "== optimiser golden file"
"$python" tests/parity/optimizer/make_golden.py --out "$scratch/optimizer.json"
cmp "$scratch/optimizer.json" tests/parity/optimizer/golden.json

# Their scripts write beside themselves.
echo "== NF4 and text golden files"
cp -r tests/parity/nf4 tests/parity/text "$scratch"
"$python" "$scratch/nf4/make_golden.py"
cmp "$scratch/nf4/golden.json" tests/parity/nf4/golden.json
llama=$(realpath "$shared/tokenizers/llama-bpe" 2>/dev/null) && [ -d "$llama" ] || llama=
"$python" "$scratch/text/make_golden.py" ${llama:+"$llama"}
diff -r "$scratch/text/golden" tests/parity/text/golden
echo "made anew, and the same"

echo "== PEFT loads our adapter"
"$python" tests/parity/engine/check_peft.py "$bin" examples/quickstart/model "$adapter"
"$python" tests/parity/engine/check_peft.py "$bin" tests/parity/engine/golden/*

echo "== merge"
"$python" tests/parity/merge/check_merge.py "$bin"

echo "== tokenizers"
"$python" tests/parity/text/check_tokenizer.py "$bin/encode_tool" tests/parity/text
if [ -d "$shared/tokenizers/llama-bpe" ]; then
  "$python" tests/parity/text/check_tokenizer.py "$bin/encode_tool" \
    "$shared/tokenizers/llama-bpe"
fi

echo "== chat templates"
for templates in tests/parity/text/templates "$shared/templates"; do
  [ -d "$templates" ] || continue
  for oracle in "" --transformers; do
    "$python" tests/parity/text/check_public_templates.py "$bin/render_tool" "$templates" $oracle
  done
done
