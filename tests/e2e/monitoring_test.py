#!/usr/bin/env python3
"""Debian's Prometheus scrapes a real run: promtool passes, and every query of the dashboard and of
the alerts is answered, those of the dashboard with data."""
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time
import unittest
import urllib.parse
import urllib.request

from service import ROOT, Service, wait_until

DASHBOARD = ROOT / "deploy/grafana/dashboards/attune.json"
RULES = ROOT / "deploy/prometheus/rules.yml"
CONFIG = ROOT / "deploy/prometheus/prometheus.yml"


def get(url):
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.read().decode()


@unittest.skipUnless(shutil.which("prometheus"), "Prometheus is not installed")
class Monitoring(unittest.TestCase):
    def query(self, port, expression):
        answer = json.loads(get(f"http://127.0.0.1:{port}/api/v1/query?" +
                                urllib.parse.urlencode({"query": expression})))
        self.assertEqual(answer["status"], "success", expression)
        return answer["data"]["result"]

    def start_prometheus(self, service):
        directory = service.directory / "prometheus"
        directory.mkdir()
        shutil.copy(RULES, directory)
        text = CONFIG.read_text()
        self.assertIn("127.0.0.1:9464", text)
        text = text.replace("127.0.0.1:9464", f"127.0.0.1:{service.metrics_port}")
        text = re.sub(r"(scrape|evaluation)_interval: 5s", r"\1_interval: 1s", text)
        (directory / "prometheus.yml").write_text(text)
        for check in (["config", directory / "prometheus.yml"], ["rules", directory / "rules.yml"]):
            subprocess.run(["promtool", "check", *check], check=True, capture_output=True)
        port = service.metrics_port + 2500
        with open(directory / "log", "wb") as log:
            process = subprocess.Popen(
                ["prometheus", f"--config.file={directory}/prometheus.yml",
                 f"--storage.tsdb.path={directory}/data",
                 f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

        def stop():
            process.kill()
            process.wait()
        self.addCleanup(stop)

        def ready():
            try:
                return get(f"http://127.0.0.1:{port}/-/ready")
            except OSError:
                return None
        wait_until("Prometheus is ready", ready, 30)
        return port

    def test_every_query_is_answered(self):
        with Service(metrics=True) as service:
            port = self.start_prometheus(service)
            # A rate needs a sample from before the first job.
            wait_until("a first scrape", lambda: self.query(
                port, "count_over_time(attune_job_queue_wait_seconds_count[1m]) >= 2"), 30)
            waits = service.submit("a", steps=25)
            time.sleep(2)
            bad = service.write_spec("bad")
            bad.write_text(bad.read_text().replace("path: model", "path: nothing"))
            broken = json.loads(service.cli("submit", bad, "-o", "json").stdout)["name"]
            second = service.submit("b", steps=25)
            self.assertEqual(service.finish(broken)["state"], "JOB_STATE_FAILED")
            wait_until("it runs", lambda: service.step(second) >= 2)
            os.kill(service.trainers()[0], signal.SIGKILL)  # a restart to be counted
            for name in (waits, second):
                self.assertEqual(service.finish(name)["state"], "JOB_STATE_SUCCEEDED")
            time.sleep(3)
            metrics = get(f"http://127.0.0.1:{service.metrics_port}/metrics")
            lint = subprocess.run(["promtool", "check", "metrics"], input=metrics, text=True,
                                  capture_output=True)
            self.assertEqual(lint.returncode, 0, lint.stderr + lint.stdout)
            self.assertNotIn(waits.split("/")[1], metrics, "a series per job")
            for panel in json.loads(DASHBOARD.read_text())["panels"]:
                for target in panel["targets"]:
                    with self.subTest(panel["title"], expr=target["expr"]):
                        result = self.query(port, target["expr"])
                        self.assertTrue(result, "no data")
                        values = [float(r["value"][1]) for r in result]
                        self.assertTrue(any(v == v for v in values), "only NaN")
            for expression in re.findall(r"expr: (.*)", RULES.read_text()):
                with self.subTest(expression):
                    self.query(port, expression)
            self.assertEqual(len(self.query(port, "up == 1")), 1)


if __name__ == "__main__":
    unittest.main(verbosity=2)
