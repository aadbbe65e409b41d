#!/usr/bin/env python3
"""A disk that is full in the middle of a job: the job waits with the reason, nothing is stuck, and
with room again it ends with the losses of an undisturbed run.

The disk is a small tmpfs, mounted in a mount namespace of this test's own (as root, or in a user
namespace): nobody else sees it."""
import json
import os
import subprocess
import sys
import unittest

from service import Service, check_stream, last_losses, wait_until

STEPS = 30
NAMESPACE = "ATTUNE_DISK_FULL_NAMESPACE"


def mount(directory, mebibytes):
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=0700", "tmpfs",
                    str(directory)], check=True)


def fill(directory):
    """Leaves not a byte; returns the file that takes the room."""
    ballast = directory / "ballast"
    with open(ballast, "wb", buffering=0) as out:
        for size in (1 << 20, 4096):
            try:
                while True:
                    out.write(b"x" * size)
            except OSError:
                pass
    return ballast


class FullDisk(Service):
    """The service with the disk of one of its parts being small."""

    def __init__(self, small, mebibytes):
        self.small_name = small
        self.mebibytes = mebibytes
        super().__init__()

    def start_coordinator(self):
        self.small = self.directory / self.small_name
        if not self.small.exists():
            mount(self.small, self.mebibytes)
        super().start_coordinator()

    def __exit__(self, kind, value, trace):
        super().__exit__(kind, value, trace)
        subprocess.run(["umount", "--lazy", str(self.small)], check=False)

    def free_devices(self):
        workers = json.loads(self.cli("workers", "-o", "json").stdout)["workers"]
        return not any(w.get("uses") for w in workers)


class DiskFull(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with Service() as service:
            name = service.submit("baseline", steps=STEPS)
            assert service.finish(name)["state"] == "JOB_STATE_SUCCEEDED"
            cls.baseline = last_losses(service.history(name)[1])

    def check_same(self, service, name):
        job = service.finish(name)
        self.assertEqual(job["state"], "JOB_STATE_SUCCEEDED", job.get("message"))
        events, metrics = service.history(name)
        check_stream(self, events)
        check_stream(self, metrics)
        self.assertEqual(last_losses(metrics), self.baseline)
        return job

    def check_usable(self, service):
        """Nothing was left over: another job runs to its end."""
        other = service.submit("other", steps=2, checkpoint=100)
        self.assertEqual(service.finish(other)["state"], "JOB_STATE_SUCCEEDED")

    def test_of_the_worker(self):
        with FullDisk("worker", 24) as service:
            name = service.submit("worker-full", steps=STEPS, restarts=1)
            wait_until("past a checkpoint", lambda: service.step(name) >= 8)
            ballast = fill(service.small)
            job = service.wait_state(name, "JOB_STATE_PAUSED", timeout_s=60)
            self.assertEqual(job["reason"], "PAUSED_BY_STORAGE")
            self.assertIn("No space left on device", job["message"])
            self.assertIn("make room", job["message"])
            wait_until("devices are free", service.free_devices, 5)
            self.assertFalse(service.trainers())
            self.assertGreaterEqual(service.step(name), 5, "its checkpoint is lost")
            # Where nothing fits, a new job waits as well, and says why.
            second = service.submit("no-room", steps=2, restarts=0)
            job = service.wait_state(second, "JOB_STATE_PAUSED", timeout_s=30)
            self.assertIn("No space left on device", job["message"])
            ballast.unlink()
            for job in (name, second):
                service.cli("resume", job)
            self.check_same(service, name)
            self.assertEqual(service.finish(second)["state"], "JOB_STATE_SUCCEEDED")
            self.check_usable(service)

    def test_of_the_coordinator(self):
        """It may end rather than acknowledge what it cannot keep: then it is started again."""
        with FullDisk("data", 64) as service:
            name = service.submit("coordinator-full", steps=STEPS, restarts=1)
            wait_until("past a checkpoint", lambda: service.step(name) >= 8)
            ballast = fill(service.small)

            def refused():
                """Asked without the client's help: the coordinator may end while it is asked."""
                if service.coordinator.poll() is not None:
                    return "ended"
                asked = service.cli("get", name, "-o", "json", check=False)
                if asked.returncode != 0:
                    return None
                return json.loads(asked.stdout)["state"] == "JOB_STATE_PAUSED" and "paused"

            how = wait_until("the coordinator ends or the job waits", refused, 60)
            if how == "ended":
                log = (service.directory / "coordinator.log").read_text()
                self.assertRegex(log, r"(disk is full|No space left on device)")
                self.assertGreater(service.coordinator.returncode, 0, "it crashed")
            ballast.unlink()
            if how == "ended":
                service.start_coordinator()
            job = service.wait_state(name, "JOB_STATE_PAUSED", "JOB_STATE_SUCCEEDED")
            if job["state"] == "JOB_STATE_PAUSED":
                self.assertEqual(job["reason"], "PAUSED_BY_STORAGE")
                service.cli("resume", name)
            self.check_same(service, name)
            self.check_usable(service)


def enter_namespace():
    """Starts this program again where it may mount; False where that is not allowed."""
    if NAMESPACE in os.environ:
        return True
    command = ["unshare", "--mount"] + ([] if os.geteuid() == 0 else ["--user", "--map-root-user"])
    if subprocess.run(command + ["true"], capture_output=True).returncode != 0:
        return False
    os.environ[NAMESPACE] = "1"
    os.execvp(command[0], command + [sys.executable] + sys.argv)


if __name__ == "__main__":
    if not enter_namespace():
        print("skipped: this user may not mount a file system of its own")
        sys.exit(77)
    unittest.main(verbosity=2)
