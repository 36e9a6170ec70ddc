"""Triton kernels, in the configurations of their tables, compile for three generations of GPUs within their
registers and shared memory. No GPU is needed; tests/aot.py does it, and prints the table on its own."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from places import ROOT, SUPPORT, TESTS, python_path

CHOSEN_FOR = "3.6.0"
OPERATIONS = sorted(path.stem.removeprefix("aot_") for path in SUPPORT.glob("aot_*.py"))
PAIRS = [name for name in OPERATIONS if (ROOT / "vitdiv_kernels/ops/pairs" / name).is_dir()]
# A family shares kernels, of which a sample is taken.
FAMILIES = {"pairs": PAIRS, "maps": [name for name in OPERATIONS if name not in PAIRS]}


def installed():
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def compiled(tmp_path, *arguments):
    """The rows that tests/aot.py makes of these arguments."""
    if installed() != CHOSEN_FOR:
        pytest.skip(
            f"the tables were chosen for triton {CHOSEN_FOR}, here is {installed()}: spills may differ"
        )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = python_path()
    command = [sys.executable, str(TESTS / "aot.py"), *arguments, "--json", str(tmp_path / "rows.json")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout)
    assert (tmp_path / "rows.json").exists(), run.stderr[-3000:]
    return json.loads((tmp_path / "rows.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_without_spills(family, tmp_path, pytestconfig):
    some = [] if pytestconfig.getoption("--every-case") else ["--sample"]
    rows = compiled(tmp_path, *FAMILIES[family], *some)
    assert {row["cc"] for row in rows} >= {80, 90, 100}
    assert {row["operation"] for row in rows} <= set(FAMILIES[family])
    if family == "maps":  # whose operations share their kernels
        of_all = {"logits_kernel", "values_kernel", "forward_rows", "backward_rows", "dot_rows"}
        assert {row["kernel"] for row in rows} == of_all
    faulty = [row for row in rows if row["faults"]]
    assert not faulty, faulty


def test_no_product_of_the_maps_chains_in_tensor_memory(tmp_path):
    """Each: it depends on GPU, dtype and width together, which a sample may miss."""
    rows = compiled(tmp_path, *FAMILIES["maps"], "--capabilities", "100", "--kernels", "s_kernel")
    assert {row["kernel"] for row in rows} == {"logits_kernel", "values_kernel"}
    assert any(row["tensor_core"].get("tcgen05.mma") for row in rows)
    faulty = [row for row in rows if row["faults"]]
    assert not faulty, faulty


CHAIN = """
    %acc = ttng.tmem_alloc : () -> !ttg.memdesc<64x64xf32>
    %sum:2 = scf.for %i = %c0 to %n step %c32 iter_args(%s = %zero) -> (tensor<64x64xf32>)  : i32 {
      ttng.tc_gen5_mma %a, %b, %acc, %false, %true, %bar[%true] {is_async} : !ttg.memdesc<64x32xf32>
      %part = ttng.tmem_load %acc : !ttg.memdesc<64x64xf32> -> tensor<64x64xf32>
      %finite = arith.select %nan, %zero, %part : tensor<64x64xf32>
      ttng.tmem_store %finite, %other, %true : tensor<64x64xf32> -> !ttg.memdesc<64x64xf32>
      ttng.tc_gen5_mma %a, %c, %other[%token], %true, %true, %bar[%true] {is_async} : !ttg.memdesc<64x32xf32>
      scf.yield %t : tensor<64x64xf32>
    }
    ttng.tc_gen5_mma %a, %b, %other, %true, %true, %bar[%true] {is_async} : !ttg.memdesc<64x32xf32>
"""


@pytest.mark.parametrize(
    ("text", "most"),
    [
        (CHAIN, 2),
        (CHAIN.replace("%finite, %other", "%zero, %other"), 1),  # the second starts from zero
        (CHAIN.replace("%other[%token], %true", "%other[%token], %false"), 1),
        (CHAIN.replace("%part = ttng.tmem_load %acc", "%part = ttng.tmem_load %third"), 1),
        (CHAIN.replace("ttng.tc_gen5_mma", "ttng.warp_group_dot"), 0),
    ],
    ids=["chained", "from zero", "not added", "of another", "wgmma"],
)
def test_chained_products_are_seen(text, most):
    pytest.importorskip("triton")
    import aot

    assert aot.most_chained(text) == most


def test_what_is_a_fault():
    pytest.importorskip("triton")
    import aot

    good = {"stack": 0, "shared": 100, "chained": 1, "one element": 0}
    for name, value in [("stack", 8), ("shared", 101), ("chained", 3), ("one element", 24)]:
        assert aot.faults("kernel", 100, good) == []
        (fault,) = aot.faults("kernel", 100, good | {name: value})
        assert str(value) in fault


@pytest.mark.parametrize(
    ("instruction", "one"),
    [
        ("@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", True),
        ("ld.global.L1::evict_last.b16 { %rs1 }, [ %rd1 + 0 ];", True),
        ("st.global.b16 [ %rd1 + 0 ], { %rs1 };", True),
        ("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", False),
        ("ld.global.v2.b16 { %rs1, %rs2 }, [ %rd1 + 0 ];", False),
        ("ld.shared.b16 %rs1, [ %r1 + 0 ];", False),
        ("st.global.b32 [ %rd1 + 0 ], { %r1 };", False),
    ],
)
def test_accesses_of_one_element_are_seen(instruction, one):
    pytest.importorskip("triton")
    import aot

    assert bool(aot.ONE_ELEMENT.search(instruction)) == one
