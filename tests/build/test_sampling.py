"""Which cases of the slow backends run, which kernels are compiled, without --every-case; what runs alone."""

import itertools
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest


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


def test_a_gpu_runs_the_cases_that_were_chosen(monkeypatch):
    monkeypatch.setattr(conftest, "INTERPRETED", False)
    monkeypatch.setattr(conftest, "GPU_CASES", {"test_reattention.py::test_it": ["triton-gpu-3-float32"]})
    values = list(itertools.product((1, 3, 12), ("float32", "float16")))
    on_gpu, elsewhere, unknown = (
        [Case(*where[:1], *value, *where[1:]) for value in values]
        for where in (("triton-gpu",), ("native-cpu",), ("triton-gpu", "test_new.py"))
    )
    assert kept(list(on_gpu)) == [on_gpu[2]]
    assert kept(list(on_gpu), every_case=True) == on_gpu
    assert kept(list(elsewhere)) == elsewhere
    assert len(kept(list(unknown))) == 3


def test_kernels_are_compiled_for_one_gpu_in_turn():
    pytest.importorskip("triton")
    import aot

    keys = [("op", cc, name, options) for name in "abcd" for options in (1, 2) for cc in (80, 90, 100)]
    keys.append(("op", 90, "of sm_90 alone", 1))
    chosen = aot.in_turn(dict.fromkeys(keys, "launch"))
    assert [key[0] + key[2] for key in chosen] == [f"op{name}" for name in "aabbccdd"] + ["opof sm_90 alone"]
    assert [key[1] for key in chosen] == [80, 90, 100, 80, 90, 100, 80, 90, 90]
    assert set(chosen.values()) == {"launch"}


def test_compiled_kernels_have_each_value_among_them():
    pytest.importorskip("triton")
    import aot

    launches = {}
    for cc, kind, rows, half, warps in itertools.product(
        (80, 90, 100), ("fp16", "fp32"), (16, 32, 64), (True, False), (4, 8)
    ):
        signature = (("X", f"*{kind}"), ("N", "i32"), ("ROWS", "constexpr"), ("HALF", "constexpr"))
        aligned = ((0, "D"), (1, "D")) if half else ((0, "D"),)
        for name in ("kernel", "other"):
            key = "op", cc, name, signature, ((2, rows), (3, half)), aligned, (warps, 2, None)
            launches[key] = SimpleNamespace(kernel=SimpleNamespace(__module__="kernels"))
    chosen = aot.sample(launches)
    assert len(chosen) <= len(launches) / 10
    for name in ("kernel", "other"):
        found, every = (
            set().union(*(aot.values_of(key) for key in keys if key[2] == name))
            for keys in (chosen, launches)
        )
        assert found == every
        assert {80, 90, 100} == {key[1] for key in chosen if key[2] == name}


def test_tensors_that_fill_a_gpu_are_of_one_process_at_a_time():
    fcntl = pytest.importorskip("fcntl")
    path = Path(tempfile.gettempdir()) / f"vitdiv_far_apart_{os.getuid()}.lock"

    def take():
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    with conftest.on_the_gpu_alone(), conftest.on_the_gpu_alone(), pytest.raises(BlockingIOError):
        take()
    take()
