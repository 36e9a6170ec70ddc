"""The tests of a GPU compile few kernels there."""

import importlib.util
import json
from collections import Counter

import gpu_cases
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import launch_recorder

ADVICE = "choose the cases again: python tests/gpu_cases.py"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(launch_recorder.ROOT / "benchmarks")


@pytest.mark.usefixtures("benchmarks")
def test_the_tests_of_a_gpu_compile_few_kernels():
    launches = launch_recorder.record()
    kernels = set().union(*launches.values())
    by_test = Counter()
    for case, launched in launches.items():
        by_test[gpu_cases.parted(case)[0]] += len(launched)
    print(f"{len(kernels)} kernels of {len(launches)} cases", *by_test.most_common(20), sep="\n")
    assert len(kernels) <= gpu_cases.KERNELS, ADVICE
    named = {test for test, cases in gpu_cases.load().items() if cases}
    assert named <= {gpu_cases.parted(case)[0] for case in launches}, ADVICE
    modules = {module for module, _, _ in kernels}
    assert modules >= {
        f"vitdiv_kernels.ops.{name}"
        for name in ("maps._triton.rows", "maps._triton.products", "pairs._triton")
    }
    operations = {module.split(".")[3] for module in modules}
    assert operations >= {"pairwise_cosine", "pairwise_rows", "two_gram"}
    # what nobody records would also be few
    assert len(kernels) > gpu_cases.KERNELS / 2


def launch(kernel, **values):
    specialization = {
        "signature": dict.fromkeys(values, "constexpr"),
        "constant_keys": [[i] for i in range(len(values))],
        "constant_vals": list(values.values()),
        "attrs_keys": [],
        "attrs_vals": [],
        "options": {"num_warps": 4, "maxnreg": None},
    }
    return "module", kernel, json.dumps(specialization)


def test_cases_are_chosen_by_new_values_for_each_new_kernel():
    one, two, three = (launch("rows", HEADS=heads) for heads in (1, 2, 3))
    cases = {
        f"{gpu_cases.ALWAYS}[x]": {one},
        "test_a.py::test_same[1]": {one},
        "test_a.py::test_same[2]": {two},
        "test_a.py::test_same[2 again]": {two},
        "test_a.py::test_many": {launch("rows", HEADS=heads) for heads in range(4, 9)},
        "test_a.py::test_other": {three},
    }
    chosen = gpu_cases.choose(cases, 1)
    assert chosen == ["test_a.py::test_same[1]", f"{gpu_cases.ALWAYS}[x]"]  # what costs nothing
    assert set(gpu_cases.choose(cases, 2)) == {*chosen, "test_a.py::test_other"}  # a test more is worth more
    assert set(gpu_cases.choose(cases, 3)) == cases.keys() - {"test_a.py::test_many"}
    assert set(gpu_cases.choose(cases, 8)) == cases.keys()
