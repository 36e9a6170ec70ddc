"""Triton kernels, in the configurations of their tables, compile for three generations of GPUs within their
registers and shared memory. No GPU is needed; tests/aot.py does it, and prints the table on its own."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHOSEN_FOR = "3.6.0"
OPERATIONS = sorted(path.stem.removeprefix("aot_") for path in HERE.glob("aot_*.py"))


def installed():
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_without_spills(operation, tmp_path, pytestconfig):
    if installed() != CHOSEN_FOR:
        pytest.skip(
            f"the tables were chosen for triton {CHOSEN_FOR}, here is {installed()}: spills may differ"
        )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "aot.py"), operation, "--json", str(tmp_path / "rows.json")]
    if not pytestconfig.getoption("--every-case"):
        command.append("--sample")
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout)
    assert (tmp_path / "rows.json").exists(), run.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["cc"] for row in rows} >= {80, 90, 100}
    faulty = [row for row in rows if row["faults"]]
    assert not faulty, faulty
