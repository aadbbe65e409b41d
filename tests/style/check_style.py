#!/usr/bin/env python3
"""The rules of docs and CONTRIBUTING.md that a compiler does not check. Prints file:line: what.

    python3 tests/style/check_style.py [ROOT]

Rules: who may include whom; one place for each power (kernel launches, device memory,
collectives, SQL, environment, clock); names that say nothing; unfinished marks; file and function
size; every op has its four files; every metric in dashboards and alerts is in the table.
"""
import json
import pathlib
import re
import sys

SOURCE = {".h", ".cc", ".cu", ".cuh"}
FOLDERS = ("proto", "kernels", "worker", "server", "client", "tests")

# folder -> folders of ours that it may include. The longest matching key counts.
MAY_INCLUDE = {
    "proto": {"proto"},
    "kernels": {"kernels"},
    "server": {"server", "proto"},
    "server/sched": {"server/sched"},
    "client": {"client", "proto"},
    "client/commands/local": {"client", "proto", "server", "worker/agent"},
    "worker/agent": {"worker/agent", "worker/io", "proto"},
    "worker/io": {"worker/io", "kernels/core", "proto/sha256.h"},
    "worker/data": {"worker/data", "worker/io", "kernels/core"},
    "worker/memory": {"worker/memory", "kernels/core"},
    "worker/shard": {"worker/shard", "kernels/core"},
    "worker/layers": {"worker/layers", "worker/memory", "worker/shard", "kernels"},
    "worker/model": {"worker/model", "worker/layers", "worker/memory", "worker/io", "kernels"},
    "worker/methods": {"worker/methods", "worker/model", "worker/layers", "worker/memory",
                       "worker/data", "kernels"},
    "worker/train": {"worker", "kernels", "proto"},
    "worker/trainer_main": {"worker", "kernels", "proto"},
    "tests": set(FOLDERS),
}
NEVER = {"worker/train": {"worker/agent"}, "worker/trainer_main": {"worker/agent"}}

# what, pattern, where it may stand
POWERS = [
    ("kernel launch", r"<<<", ("kernels/",)),
    ("device allocation", r"\b(cudaMalloc\w*|cudaFree\w*|cuMemAlloc\w*)\s*\(", ("worker/memory/", "kernels/core/op_testing_cuda.h", "tests/bench/")),
    ("collective", r"\b(nccl[A-Z]\w+|gloo::)", ("worker/shard/",)),
    ("SQL", r"\bsqlite3_\w+\s*\(", ("server/store/",)),
    ("environment", r"\b(secure_)?getenv\s*\(",
     ("server/main.cc", "client/main.cc", "worker/trainer_main.cc", "worker/agent/main.cc",
      "tests/")),
    ("clock in a deterministic part", r"absl::Now\s*\(|system_clock::now|\btime\s*\(\s*(NULL|nullptr|0)",
     ("server/rpc/", "server/main.cc", "server/core/runner", "server/artifacts/", "server/server",
      "server/metrics/", "worker/", "client/", "proto/", "tests/")),
]
BAD_NAMES = re.compile(r"(^|_)(util|utils|helper|helpers|manager|common|misc|v2|fast)(_|$)")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|\bDISABLED_|NOLINT(?!\(|: )")
MAX_LINES = 900
MAX_FUNCTION_LINES = 100


def longest_key(table, path):
    best = ""
    for key in table:
        if (path == key or path.startswith(key + "/") or path.startswith(key + ".") or
                path.startswith(key + "_")) and len(key) > len(best):
            best = key
    return best


def check_includes(path, number, line, problems):
    found = re.match(r'\s*#include "([^"]+)"', line)
    if not found or path.split("/")[0] == "tests" or path.endswith("_test.cc"):
        return
    target = found.group(1)
    if target.startswith(("attune/v1/", "google/rpc/")):  # generated from proto/
        if path.startswith("kernels/") or path.startswith("server/sched/"):
            problems.append(f"{path}:{number}: may not include messages")
        return
    if target.split("/")[0] not in FOLDERS:  # a library's
        if "/" not in target:
            problems.append(f"{path}:{number}: include from the top of the repository: {target}")
        return
    if target == "kernels/core/check.h" and not path.startswith("proto/"):
        return  # the one CHECK; a header without anything behind it
    key = longest_key(MAY_INCLUDE, path)
    inside = lambda folder: target == folder or target.startswith(folder + "/")
    if not any(inside(f) for f in MAY_INCLUDE[key]) or any(
            inside(f) for f in NEVER.get(key, ())):
        problems.append(f"{path}:{number}: {key} may not include {target}")


def check_lines(path, text, problems):
    is_cuda = path.endswith((".cu", ".cuh"))
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        check_includes(path, number, line, problems)
        code = line.split("//")[0]
        for what, pattern, places in POWERS:
            test = path.endswith("_test.cc")  # a test may wait by the clock
            if re.search(pattern, code) and not path.startswith(places) and not (
                    test and what.startswith("clock")):
                problems.append(f"{path}:{number}: {what} outside {', '.join(places)}")
        if UNFINISHED.search(line):
            problems.append(f"{path}:{number}: unfinished mark")
        if len(line) > 100 and not re.search(r'https?://|R"', line):
            problems.append(f"{path}:{number}: line of {len(line)} columns")
    if len(lines) > MAX_LINES:
        problems.append(f"{path}:1: {len(lines)} lines; at most {MAX_LINES}")
    if not is_cuda:
        check_functions(path, lines, problems)


def check_functions(path, lines, problems):
    """Functions by clang-format's shape: a line that ends in '{' at column 0-2 up to its '}'."""
    begin = None
    for number, line in enumerate(lines, 1):
        opens = re.match(r"( {0,2})[\w:~<].*\)[\w\s:&>-]*\{$", line)
        statement = re.match(r" *(return|if|for|while|switch|else|do)\b", line)
        if opens and begin is None and not statement and "namespace" not in line:
            begin = (number, opens.group(1))
        elif begin and line == begin[1] + "}":
            if number - begin[0] > MAX_FUNCTION_LINES:
                problems.append(f"{path}:{begin[0]}: function of {number - begin[0]} lines")
            begin = None


def check_ops(root, problems):
    for folder in sorted((root / "kernels").glob("*")):
        if not folder.is_dir() or folder.name == "core":
            continue
        for suffix in (".h", ".cc", "_cpu.cc", "_test.cc"):
            if not (folder / (folder.name + suffix)).exists():
                problems.append(f"kernels/{folder.name}:1: {folder.name}{suffix} is missing")


def check_metrics(root, problems):
    table = root / "proto" / "metric_names.h"
    if not table.exists():
        return
    known = set(re.findall(r'= "([a-z_]+)"', table.read_text()))
    suffixes = ("_bucket", "_sum", "_count")
    queries = []
    for path in sorted((root / "deploy").rglob("*.json")):
        for panel in json.loads(path.read_text()).get("panels", []):
            queries += [(path, t["expr"]) for t in panel.get("targets", [])]
    for path in sorted((root / "deploy").rglob("rules.yml")):
        queries += [(path, e) for e in re.findall(r"expr: (.*)", path.read_text())]
    for path, query in queries:
        for name in re.findall(r"\b((?:attune|grpc_server)_[a-z_]+)", query):
            base = next((name[: -len(s)] for s in suffixes if name.endswith(s)), name)
            if base not in known and name not in known:
                problems.append(f"{path.relative_to(root)}:1: {name} is not in proto/metric_names.h")


def check(root):
    problems = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix not in SOURCE or not path.is_file():
                continue
            name = path.relative_to(root).as_posix()
            if BAD_NAMES.search(path.stem):
                problems.append(f"{name}:1: a name that says nothing")
            check_lines(name, path.read_text(), problems)
    check_ops(root, problems)
    check_metrics(root, problems)
    return problems


if __name__ == "__main__":
    top = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parents[2]
    found = check(top)
    print("\n".join(found))
    print(f"{len(found)} problems")
    sys.exit(1 if found else 0)
