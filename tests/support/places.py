"""Where the repository has what the tests read and start."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"
BENCHMARKS = ROOT / "benchmarks"


def test_file(name):
    """tests/<folder>/test_<name>.py, from ROOT."""
    (path,) = TESTS.glob(f"*/test_{name}.py")
    return str(path.relative_to(ROOT))


def python_path(*first):
    """PYTHONPATH of a process that imports the package of this tree, and modules of the tests."""
    folders = [*first, ROOT, TESTS, SUPPORT, *sorted(path for path in TESTS.iterdir() if path.is_dir())]
    return os.pathsep.join([*map(str, dict.fromkeys(folders)), os.environ.get("PYTHONPATH", "")])
