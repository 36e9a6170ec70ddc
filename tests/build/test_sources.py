"""The files of the repository: what every compiler takes, what an sdist holds, nothing half merged."""

import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from places import ROOT

# What an installation leaves in the tree.
COMPILED = [f"vitdiv_kernels/{name}" for name in ("_build.json", "_C.cpython-311.so", "libvitdiv.so")]


@pytest.fixture(scope="module")
def tracked():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of git")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


def half_merged(text):
    return re.search(rb"^(<<<<<<<|\|\|\|\|\|\|\||>>>>>>>)( |$)", text, re.MULTILINE) is not None


def test_no_file_is_half_merged(tracked):
    assert half_merged(b"a\n<" + b"<<<<<< HEAD\nb")
    assert half_merged(b"a\n" + b">" * 7 + b" branch\n")
    assert [name for name in tracked if half_merged((ROOT / name).read_bytes())] == []


def wide(text, limit=100):
    """Numbers of the lines of Markdown that are too wide. A row of a table cannot break."""
    lines = enumerate(text.splitlines(), 1)
    return [number for number, line in lines if len(line) > limit and not line.startswith("|")]


def test_markdown_is_at_most_100_columns_wide(tracked):
    assert wide("a" * 100 + "\n" + "b" * 101 + "\n|" + "c" * 101) == [2]
    pages = [name for name in tracked if name.endswith(".md")]
    found = {name: wide((ROOT / name).read_text()) for name in pages}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_an_sdist_holds_what_is_tracked(tracked, tmp_path):
    tree = tmp_path / "tree"
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for stray in ("tests/__pycache__/conftest.cpython-311.pyc", *COMPILED):
        (tree / stray).parent.mkdir(exist_ok=True)
        (tree / stray).touch()
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        held = {name.partition("/")[2] for name in (file.name for file in sdist if file.isfile())}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert held - made == set(tracked)


def test_lines_of_cpp_are_at_most_110_long(tracked):
    """Comments and strings, too, which clang-format leaves as they are."""
    sources = [name for name in tracked if name.endswith((".cpp", ".h", ".cu", ".cuh", ".def"))]
    assert len(sources) > 70
    lines = [(name, number, line) for name in sources for number, line in numbered(name)]
    assert [f"{name}:{number}" for name, number, line in lines if len(line) > 110] == []


def numbered(name):
    return enumerate((ROOT / name).read_text().splitlines(), 1)


def captured_bindings(source):
    """Names of structured bindings that a lambda in the rest of their block uses: clang before 16 refuses."""
    source = re.sub(r"//.*", "", source)
    found = set()
    for binding in re.finditer(r"\bauto\s*&{0,2}\s*\[([\w\s,]+)\]\s*[=:({]", source):
        names, rest = set(re.findall(r"\w+", binding[1])), source[binding.end() :]
        rest = rest[: block_end(rest)]
        for captures in re.finditer(r"\[[&=][^\]]*\]", rest):
            body = rest.find("{", captures.end())
            used = re.findall(r"\w+", rest[captures.end() : body + 1 + block_end(rest[body + 1 :])])
            found |= names & set(used)
    return found


def block_end(text):
    """Where the block ends that text is in."""
    depth = 1
    for brace in re.finditer("[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return len(text)


def test_no_lambda_captures_a_structured_binding():
    code = "void f() { %s auto& [a, b] = pair; { use(a); } %s } void g() { int b; h([&] { b; }); }"
    assert captured_bindings(code % ("", "const auto run = [&](int x) { if (x) { } b; };")) == {"b"}
    assert captured_bindings(code % ("h([&] { b; });", "h([&] { c; });")) == set()
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 50
    captured = {str(path): captured_bindings(path.read_text()) for path in sources}
    assert {path: names for path, names in captured.items() if names} == {}


def test_torchs_own_is_exporting_is_asked_in_one_place():
    """Traced by torch.compile it is True in some releases, with nothing exported."""
    sources = (ROOT / "vitdiv_kernels").rglob("*.py")
    askers = [path.name for path in sources if "compiler.is_exporting" in path.read_text()]
    assert askers == ["_exporting.py"]
