"""`make matrix` keeps what it has, counts what pytest reports, and names the kernels that differ."""

import sys
from types import SimpleNamespace

import matrix
import pytest


def row(check, version, of, passed, **cells):
    columns = (
        {"torch": version, "triton": "3.6.0"}
        if check != "tables"
        else {"torch": "2.13.0+cpu", "triton": version}
    )
    return {"check": check, **columns, "of": of, "passed": passed, "failed": 0, **cells}


def test_a_row_replaces_that_of_the_same_check_and_release(tmp_path):
    matrix.update(tmp_path, row("tables", "3.10.0", "sm_90", 7))
    matrix.update(tmp_path, row("tables", "3.9.0", "sm_90", 6))
    matrix.update(
        tmp_path, row("tests", "2.8.0+cu128", "all files", 1), "all files", "all files; until now 1"
    )
    matrix.update(tmp_path, row("tests", "2.8.0+cu128", "2 files: a b", 2))
    matrix.update(tmp_path, row("tests", "2.8.0+cpu", "all files", 3), "all files", "all files; until now 2")
    matrix.update(tmp_path, row("tests", "2.11.0", "all files", 4))
    matrix.update(tmp_path, row("build", "2.11.0", "make build", 1))
    kept = [(r["check"], r["of"], r["passed"]) for r in matrix.table(tmp_path / "releases.csv")]
    assert kept == [
        ("build", "make build", "1"),
        ("tests", "2 files: a b", "2"),
        ("tests", "all files; until now 2", "3"),
        ("tests", "all files", "4"),
        ("tables", "sm_90", "6"),
        ("tables", "sm_90", "7"),
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--only", "tests", "--tests", "func,fnuc"], "--tests: there is no tests/*/test_fnuc.py"),
        (["--capabilities", "90,91"], "--capabilities must be of 80, 89, 90, 100, 120, got 91"),
        (["--only", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_wrong_names_are_refused_before_anything_runs(monkeypatch, capsys, options, sentence):
    monkeypatch.setattr(sys, "argv", ["matrix.py", *options])
    with pytest.raises(SystemExit):
        matrix.main()
    assert sentence in capsys.readouterr().err


def arguments(folder, **options):
    return SimpleNamespace(
        folder=folder,
        results=folder / "results",
        prefix=[],
        capabilities="90",
        one_in=1,
        jobs=1,
        only=None,
        **options,
    )


def test_a_folder_is_that_of_the_shell(monkeypatch, tmp_path):
    """The processes start elsewhere."""
    found = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matrix, "with_torch", lambda version, folder, args: found.append(folder))
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--only", "build", "--torch", "2.8.0", "--folder", "a/b"])
    matrix.main()
    assert found == [tmp_path / "a/b"]


def test_the_tests_of_the_copy_run(monkeypatch, tmp_path):
    """Not those of this tree, which may change meanwhile."""
    tree, calls = tmp_path / "source", []
    (tree / "tests/ops").mkdir(parents=True)
    (tree / "tests/ops/test_func.py").touch()

    def finished(command, folder):
        calls.append((command, folder))
        return SimpleNamespace(returncode=0, stdout="1 passed")

    monkeypatch.setattr(matrix, "finished", finished)
    monkeypatch.setattr(matrix, "versions", lambda python: {"torch": "2.8.0", "triton": "3.4.0"})
    matrix.tests("python", tree, tmp_path, arguments(tmp_path, tests=["func"], sample=False, k=""))
    ((command, folder),) = calls
    assert folder == tree
    assert command[:5] == ["python", "-m", "pytest", "-q", "tests/ops/test_func.py"]


def test_releases_that_do_not_exist_are_no_failures(monkeypatch, tmp_path):
    """They leave no row; nor is the Triton that is installed taken for another one."""
    said = "ERROR: No matching distribution found for torch==9.9.9"
    monkeypatch.setattr(
        matrix, "finished", lambda command, folder: SimpleNamespace(returncode=1, stdout=said)
    )
    monkeypatch.setattr(matrix, "copy_of_tree", lambda folder: folder)
    with pytest.raises(SystemExit, match=r"--torch 9\.9\.9: pip finds no such release"):
        matrix.with_torch("9.9.9", tmp_path, arguments(tmp_path))
    with pytest.raises(SystemExit, match=r"--triton 9\.9\.9: pip did not install it: ERROR: No matching"):
        matrix.with_triton("9.9.9", tmp_path, arguments(tmp_path))
    (tmp_path / "triton-9.9.9").mkdir()
    here = {"torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3"}
    monkeypatch.setattr(matrix, "versions", lambda python, environment: here)
    with pytest.raises(SystemExit, match=r"--triton 9\.9\.9: Python imports 3\.6\.0"):
        matrix.with_triton("9.9.9", tmp_path, arguments(tmp_path))
    assert not (tmp_path / "results").exists()


def test_what_pytest_reports_is_counted(tmp_path):
    cases = "<failure/>", "<error/>", "<skipped/>", "", "<system-out/>"
    inner = "".join(
        f'<testcase classname="tests.test_a" name="{i}">{c}</testcase>' for i, c in enumerate(cases)
    )
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{inner}</testsuite></testsuites>")
    counted = {"passed": 10, "failed": 0, "skipped": 0, "what_failed": ""}
    matrix.count(tmp_path / "report.xml", counted)
    assert counted == {"passed": 12, "failed": 2, "skipped": 1, "what_failed": "test_a::0; test_a::1"}


def compiled(kernel, registers, stack=0, **cells):
    faults = [f"spills: stack of {stack} bytes a thread"] if stack else []
    figures = {"registers": registers, "stack": stack, "faults": faults}
    return dict.fromkeys(matrix.KERNEL, 1) | {"kernel": kernel} | figures | cells


@pytest.mark.parametrize(
    ("now", "before", "found"),
    [
        (compiled("k", 100), compiled("k", 131), []),
        (compiled("k", 100), compiled("k", 132), [(100, 132)]),
        (compiled("k", 255, 8), compiled("k", 255), [(255, 255)]),
        (compiled("k", 255), compiled("k", 255, 8), [(255, 255)]),
        (compiled("k", 255), compiled("another", 1), []),
        (
            {**compiled("k", 0), "registers": "", "failure": "no", "faults": ["no"]},
            compiled("k", 9),
            [("", 9)],
        ),
    ],
)
def test_kernels_that_differ_clearly_are_named(now, before, found):
    rows = list(matrix.differences([now], [before]))
    assert [(r["registers"], r[f"registers with {matrix.TRITON[0]}"]) for r in rows] == found


def test_launches_described_alike_are_compared_in_their_order():
    before = [compiled("k", 10), compiled("k", 100)]
    assert list(matrix.differences(list(before), before)) == []
    assert len(list(matrix.differences(before[::-1], before))) == 2


def test_a_part_of_the_kernels_is_enough_to_compare():
    assert [
        r["kernel"] for r in matrix.differences([compiled("k", 10)], [compiled("k", 50), compiled("l", 1)])
    ] == ["k"]
