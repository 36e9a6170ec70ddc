"""A pytest plugin that tells what each test does as it does it, a line of JSON an event, also under xdist:

    PYTHONPATH=benchmarks python -m pytest -p report_events --report-events events.jsonl

Events: collected (tests), start (test), report (test, outcome, seconds, text, worker), finish (test). With
xdist they come from the process that hands out the tests, to which the workers report at once. A worker whose
GPU answers no more, after an illegal access, ends: another takes its place, in which later tests can pass.
"""

import json
import os
import sys
import time
from pathlib import Path

import pytest

LONGEST_TEXT = 6000


def pytest_addoption(parser):
    parser.addoption("--report-events", type=Path, help="file for a line of JSON an event")


def pytest_configure(config):
    path = config.getoption("report_events")
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker())
    elif path is not None:
        config.pluginmanager.register(Events(path))


class Events:
    def __init__(self, path):
        self.file, self.begin = path.open("a", buffering=1), time.monotonic()
        self.collected = None

    def tell(self, event, **more):
        seconds = round(time.monotonic() - self.begin, 2)
        print(json.dumps({"event": event, "at": seconds, **more}), file=self.file)

    def pytest_collection_finish(self, session):
        if session.items:
            self.tell("collected", tests=[item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        if self.collected is None:
            self.collected = ids
            self.tell("collected", tests=list(ids))

    def pytest_collectreport(self, report):
        if report.failed:
            self.report(report, "failed", 0.0)

    def pytest_runtest_logstart(self, nodeid, location):
        self.tell("start", test=nodeid)

    def pytest_runtest_logreport(self, report):
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        if report.when == "call" or outcome != "passed":
            self.report(report, outcome, report.duration)

    def report(self, report, outcome, seconds):
        text = ""
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            text = report.longrepr[2].removeprefix("Skipped: ")
        elif outcome == "failed":
            text = report.longreprtext
            if len(text) > LONGEST_TEXT:
                text = f"{text[: LONGEST_TEXT // 3]}\n...\n{text[-2 * LONGEST_TEXT // 3 :]}"
        worker = getattr(getattr(report, "node", None), "gateway", None)
        more = {"outcome": outcome, "seconds": round(seconds, 2), "text": text}
        self.tell("report", test=report.nodeid, worker=worker and worker.id, **more)

    def pytest_runtest_logfinish(self, nodeid, location):
        self.tell("finish", test=nodeid)


class Worker:
    failed = False

    def pytest_runtest_logreport(self, report):
        self.failed = self.failed or report.failed

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid, location):
        if self.failed and gpu_is_lost():
            os._exit(1)
        self.failed = False


def gpu_is_lost():
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
