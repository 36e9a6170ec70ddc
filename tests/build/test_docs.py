"""README, docs/ and docstrings: links lead somewhere, examples run, numbers are those of the CSVs."""

import doctest
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT

import vitdiv_kernels
from vitdiv_kernels import losses, nn, vit

README = ROOT / "README.md"


def pages():
    folders = [ROOT / name for name in ("docs", "vitdiv_kernels", "benchmarks", "tests", "findings")]
    return sorted([*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))])


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def without_code(text):
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page):
    """Those that GitHub and the site give to the headings of a page, and to those of what it includes."""
    text = page.read_text()
    for target in re.findall(r"^```\{include\} (\S+)", text, re.MULTILINE):
        text += (page.parent / target).read_text()
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page):
    """The relative links of a page that lead nowhere."""
    text = page.read_text()
    targets = re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", without_code(text))
    targets += re.findall(r"^```\{include\} (\S+)", text, re.MULTILINE)
    found = []
    for target in targets:
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            found.append(target)
    return found


def test_broken_links_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, `code`\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md#a-heading-code) [b](there.md#b) [c](gone.md) [d](https://x.org) `[e](no)`")
    assert broken(page) == ["there.md#b", "gone.md"]


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_lead_somewhere(page):
    assert broken(page) == []


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def a_trained_run():
    """What the tutorial's training has left."""
    config = dict(image_size=32, patch=16, dim=24, depth=2, heads=2, classes=2, reattention=[0, 1])
    model = vit.ViT(vit.ViTConfig(**config))
    run = Path("runs/deepvit")
    run.mkdir(parents=True)
    state = {"config": config, "model": model.state_dict(), "classes": ["cat", "dog"]}
    torch.save(state, run / "checkpoint.pt")


BEFORE = {"docs/tutorials/deepvit.md": a_trained_run}


@pytest.mark.parametrize("page", [page for page in pages() if blocks(page)], ids=name_of)
def test_code_blocks_run(page, request, tmp_path, monkeypatch, one_thread):
    """As they stand, one after the other."""
    code = blocks(page)
    if any("import timm" in block for block in code):
        request.getfixturevalue("torchvision")
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    BEFORE.get(name_of(page), lambda: None)()
    names = {}
    for block in code:
        # its own lines in a traceback
        first = page.read_text()[: page.read_text().index(block)].count("\n")
        exec(compile("\n" * first + block, str(page), "exec"), names)


def public():
    for module in (vitdiv_kernels, losses, nn, vit):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                yield f"{module.__name__}.{name}", value


# an example of theirs would be that of their function
OF_A_FUNCTION = {name for name, value in public() if ".nn." in name and name.endswith("Loss")}


@pytest.mark.parametrize("name", [name for name, _ in public()])
def test_docstring_examples_run(name, request, one_thread):
    value = dict(public())[name]
    if ">>> import timm" in inspect.getdoc(value):
        request.getfixturevalue("torchvision")
        pytest.importorskip("timm")
    names = {"torch": torch, "vitdiv_kernels": vitdiv_kernels} | {
        part.rpartition(".")[2]: each for part, each in public()
    }
    finder = doctest.DocTestFinder(recurse=False)
    examples = [test for test in finder.find(value, name, globs=names | {"losses": losses}) if test.examples]
    assert examples or name in OF_A_FUNCTION, f"{name} has no example"
    for example in examples:
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
        assert result.failed == 0, f"doctest of {name}: see the output"


def test_readme_is_read_in_two_minutes():
    text = README.read_text()
    assert len(text.splitlines()) <= 110
    assert len(text.split()) <= 800


@pytest.mark.parametrize("name", ["README.md", "docs/speed.md"])
def test_tables_of_speed_are_those_of_the_csvs(name):
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert set(tables.PAGES) == {"README.md", "docs/speed.md"}
    text = (ROOT / name).read_text()
    assert "<!-- table: " in text
    assert tables.renewed(text) == text, "run python benchmarks/tables.py"
    cells = re.sub(r"\| [\d.]+ \|", "| 77 |", text)
    assert tables.renewed(cells) == text


def test_the_api_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: (?:vitdiv_kernels\.)?(\w+)$", pages, re.MULTILINE))
    assert set(vitdiv_kernels.__all__) <= documented


def test_the_site_builds(tmp_path):
    """With warnings as errors; `make docs` installs what it takes."""
    for package in ("sphinx", "myst_parser", "pydata_sphinx_theme", "sphinx_copybutton"):
        pytest.importorskip(package)
    options = ["-W", "--keep-going", "-q", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, "docs", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    html = (tmp_path / "api/operations.html").read_text()
    assert 'id="vitdiv_kernels.reattention"' in html
    # the READMEs are part of the site, and their links lead to its pages
    assert "../names.html" in (tmp_path / "operations/reattention.html").read_text()
