"""Which cases of the slow backends run, and which kernels are compiled, without --every-case; and what tests
do not do at the same time."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch


class Case:
    def __init__(self, backend, heads, dtype, file="test_reattention.py"):
        self.name, self.originalname = f"test_it[{backend}-{heads}-{dtype}]", "test_it"
        self.path = Path(file)
        self.callspec = SimpleNamespace(params={"backend": backend, "heads": heads, "dtype": dtype})


def kept(cases, every_case=False):
    hook = SimpleNamespace(pytest_deselected=lambda items: None)
    conftest.pytest_collection_modifyitems(
        SimpleNamespace(getoption=lambda name: every_case, hook=hook), cases
    )
    return cases


@pytest.mark.parametrize("backend", conftest.BACKENDS)
def test_each_value_is_in_a_case(backend):
    cases = [Case(backend, *values) for values in itertools.product((1, 3, 12), ("float32", "float16"))]
    assert kept(list(cases), every_case=True) == cases
    left = kept(list(cases))
    assert len(left) == (3 if backend in conftest.SAMPLED else 6)
    for name in ("heads", "dtype"):
        values = [{case.callspec.params[name] for case in some} for some in (left, cases)]
        assert values[0] == values[1]


def test_backends_are_sampled_apart():
    cases = [Case(backend, 3, "float32") for backend in conftest.SAMPLED]
    assert kept(list(cases)) == cases
    assert kept([Case("emulated-cuda", 3, "float32", "test_compile.py")]) == []


def test_kernels_are_compiled_for_one_gpu_in_turn():
    pytest.importorskip("triton")
    import aot

    keys = [("op", cc, name, options) for name in "abcd" for options in (1, 2) for cc in (80, 90, 100)]
    keys.append(("op", 90, "of sm_90 alone", 1))
    chosen = aot.in_turn(dict.fromkeys(keys, "launch"))
    assert [key[0] + key[2] for key in chosen] == [f"op{name}" for name in "aabbccdd"] + ["opof sm_90 alone"]
    assert [key[1] for key in chosen] == [80, 90, 100, 80, 90, 100, 80, 90, 90]
    assert set(chosen.values()) == {"launch"}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_gigabytes_of_a_gpu_are_for_one_process_at_a_time(tmp_path, monkeypatch, device):
    """Here for one thread of three: each opens the file for itself, as processes do."""
    events, together = [], threading.Barrier(3, timeout=30)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("empty"))

    def test():
        together.wait()
        with conftest.much_memory(device, tmp_path):
            events.append("in")
            time.sleep(0.05) if device == "cuda" else together.wait()
            events.append("out")

    with ThreadPoolExecutor(3) as pool:
        for ended in [pool.submit(test) for _ in range(3)]:
            ended.result()
    in_turn = ["in", "out", "empty"] * 3
    assert events == (in_turn if device == "cuda" else ["in"] * 3 + ["out"] * 3)
