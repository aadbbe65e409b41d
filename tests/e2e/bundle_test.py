#!/usr/bin/env python3
"""The bundle runs where nothing but glibc is: it is unpacked into a root that holds only the C
library, and trains there through the whole service, with an empty environment.

    ATTUNE_BUNDLE=build/bundle/attune-....tar.xz tests/e2e/bundle_test.py

Without ATTUNE_BUNDLE it packs the programs in ATTUNE_BIN_DIR, which must be of a build with
ATTUNE_STATIC=ON. Needs root (chroot, mount)."""
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
import unittest

from service import BIN, DATA, MODEL, ROOT, SPEC

LARGEST_BYTES = 40 << 20
# The machine's own: everything else must be in the bundle.
GLIBC = ("libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "libresolv.so.2",
         "libutil.so.1", "libanl.so.1", "libnss_files.so.2", "libnss_dns.so.2")
COPIED = ("model", "data")


def make_root(root):
    """A root with glibc and nothing else."""
    libraries = root / "lib/x86_64-linux-gnu"
    for directory in (libraries, root / "lib64", root / "proc", root / "dev", root / "tmp",
                      root / "etc"):
        directory.mkdir(parents=True)
    for name in GLIBC:
        path = pathlib.Path("/lib/x86_64-linux-gnu") / name
        if path.exists():
            shutil.copy(path, libraries / name)
    shutil.copy("/lib64/ld-linux-x86-64.so.2", root / "lib64/ld-linux-x86-64.so.2")
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")


class Bundle(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        probe = ["unshare", "--mount", "--pid", "--fork", "true"]
        if os.geteuid() != 0 or subprocess.run(probe, capture_output=True).returncode != 0:
            raise unittest.SkipTest("needs root and namespaces")
        cls.directory = pathlib.Path(tempfile.mkdtemp(prefix="attune-bundle-"))
        cls.addClassCleanup(shutil.rmtree, cls.directory, True)
        archive = os.environ.get("ATTUNE_BUNDLE")
        if archive is None:
            archive = cls.directory / "bundle.tar.xz"
            subprocess.run([ROOT / "deploy/bundle.sh", archive], check=True, capture_output=True,
                           env=dict(os.environ, BUILD_DIR=str(BIN.parent)))
        cls.archive = pathlib.Path(archive)
        cls.root = cls.directory / "root"
        make_root(cls.root)
        with tarfile.open(cls.archive) as tar:
            tar.extractall(cls.root / "opt")
        (cls.root / "opt").joinpath(next((cls.root / "opt").iterdir()).name).rename(
            cls.root / "attune")
        for name, source in zip(COPIED, (MODEL, DATA)):
            shutil.copytree(source, cls.root / "work" / name)

    def run_inside(self, *command, timeout=300):
        """A command in the root, with /proc and /dev/null, and no environment."""
        script = (f"mount -t proc proc {self.root}/proc && : > {self.root}/dev/null && "
                  f"mount --bind /dev/null {self.root}/dev/null && "
                  f"exec env -i HOME=/tmp $(command -v chroot) {self.root} \"$@\"")
        return subprocess.run(["unshare", "--mount", "--pid", "--fork", "sh", "-c", script, "sh",
                               *command], capture_output=True, text=True, timeout=timeout)

    def test_is_small_and_holds_no_cuda_library(self):
        self.assertLess(self.archive.stat().st_size, LARGEST_BYTES)
        with tarfile.open(self.archive) as tar:
            names = tar.getnames()
        self.assertTrue([n for n in names if n.endswith("bin/attune-trainer")], names)
        wrong = [n for n in names if any(w in n for w in ("cublas", "cudnn", "nccl", "libcuda"))]
        self.assertEqual(wrong, [])

    def test_every_program_starts(self):
        for program in ("attuned", "attune-worker", "attune-trainer", "attune"):
            with self.subTest(program):
                done = self.run_inside(f"/attune/bin/{program}", "--help")
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertIn("Usage", done.stdout)

    def test_trains_through_the_service(self):
        spec = SPEC.format(name="bundle", steps=4, tokens=256, checkpoint=2, devices=1, restarts=0,
                           stall=60, dropout=0)
        (self.root / "work/job.yaml").write_text(spec)
        done = self.run_inside("/attune/bin/attune", "local", "/work/job.yaml", "--root",
                               "/work", "-o", "/work/adapter")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        adapter = self.root / "work/adapter"
        self.assertTrue((adapter / "adapter_model.safetensors").exists(), list(adapter.iterdir()))

    def test_what_cuda_needs_is_named_where_it_is_missing(self):
        packages = self.root / "work/site-packages/nvidia/cu13/lib"
        packages.mkdir(parents=True)
        done = self.run_inside("/attune/bin/attune-trainer", "generate", "--device", "cuda",
                               "--cuda-library-dir", "/work/site-packages",
                               "--model", "/work/model", "--prompt", "hello")
        self.assertEqual(done.returncode, 18, done.stdout + done.stderr)
        self.assertIn("--device cpu", done.stderr)
        if "without the CUDA backend" in done.stderr:
            self.skipTest("a build without CUDA")
        for text in ("libcuda.so.1", "libcublasLt.so.13", "libcudnn.so.9", "/usr/local/cuda/lib64/libcublasLt",
                     "/work/site-packages/nvidia/cu13/lib/libcublasLt"):
            self.assertIn(text, done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
