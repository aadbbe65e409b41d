#!/usr/bin/env python3
"""check_style finds each kind of problem, and nothing in what is right."""
import pathlib
import tempfile
import unittest

import check_style

CASES = {
    # file, content, what must be found
    "a": ("worker/train/a.cc", "void F() { K<<<1, 1>>>(); }\n", "kernel launch"),
    "b": ("worker/model/b.cc", "  cudaMalloc(&p, 1);\n", "device allocation"),
    "c": ("server/core/c.cc", "  sqlite3_open(p, &db);\n", "SQL"),
    "d": ("server/rpc/d.cc", '  getenv("HOME");\n', "environment"),
    "e": ("server/core/e.cc", "  now = absl::Now();\n", "clock"),
    "f": ("kernels/core/f.h", '#include "worker/io/file.h"\n', "may not include"),
    "g": ("worker/model/g.h", '#include "worker/train/engine.h"\n', "may not include"),
    "h": ("server/sched/h.h", '#include "server/store/store.h"\n', "may not include"),
    "i": ("worker/io/string_util.h", "\n", "says nothing"),
    "j": ("worker/io/j.cc", "// TODO: later\n", "unfinished"),
    "k": ("worker/io/k.cc", "x" * 101 + "\n", "columns"),
    "l": ("worker/io/l.cc", "\n" * 901, "lines; at most"),
    "m": ("worker/io/m.cc", "void F() {\n" + "  x;\n" * 101 + "}\n", "function of"),
    "n": ("worker/train/n.cc", "  ncclAllReduce(a);\n", "collective"),
    "o": ("kernels/relu/relu.h", "\n", "relu_test.cc is missing"),
    "p": ("client/lib/p.cc", '#include "server/core/coordinator.h"\n', "may not include"),
    "q": ("worker/train/q.cc", '#include "worker/agent/session.h"\n', "may not include"),
    "r": ("worker/io/r.cc", '#include "file.h"\n', "include from the top"),
}
RIGHT = {
    "kernels/core/a.cu": "void F() { K<<<1, 1>>>(); }\n",
    "worker/memory/b.cc": '#include "kernels/core/exec.h"\n  cudaMalloc(&p, 1);\n',
    "server/store/c.cc": "  sqlite3_open(p, &db);  // no <<< here\n",
    "worker/train/d.cc": '#include "worker/model/model.h"\n#include "attune/v1/job.pb.h"\n',
    "client/commands/local.cc": '#include "server/server.h"\n',
}


class CheckStyleTest(unittest.TestCase):
    def problems(self, files):
        with tempfile.TemporaryDirectory() as directory:
            root = pathlib.Path(directory)
            for name, text in files.items():
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            (root / "kernels").mkdir(exist_ok=True)
            return check_style.check(root)

    def test_finds_each_problem(self):
        for name, (path, text, expected) in CASES.items():
            with self.subTest(name):
                found = self.problems({path: text})
                self.assertTrue(any(expected in p for p in found), f"{path}: {found}")

    def test_leaves_what_is_right_alone(self):
        self.assertEqual(self.problems(RIGHT), [])

    def test_unknown_metric(self):
        found = self.problems({
            "proto/metric_names.h": 'constexpr char kA[] = "attune_jobs";\n',
            "deploy/d.json": '{"panels": [{"targets": [{"expr": "attune_jobs + attune_nothing"}]}]}',
        })
        self.assertEqual(len(found), 1)
        self.assertIn("attune_nothing", found[0])


if __name__ == "__main__":
    unittest.main()
