"""What the documentation shows is run: the examples of the docstrings and of README.md."""

from __future__ import annotations

import doctest
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

import rnnkern

ROOT = Path(__file__).parent.parent
PACKAGE = Path(rnnkern.__file__).parent
WITH_EXAMPLES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
CHECKED_ELSEWHERE = ("convert.md", "sklearn.md")  # with what their programs compute
FRAGMENTS = "examples"  # shows parts of the programs that tests/test_examples.py runs
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [
    page
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if BLOCK.search(page.read_text(encoding="utf-8"))
    if page.name not in CHECKED_ELSEWHERE and page.parent.name != FRAGMENTS
]


def run_programs(page):
    """All blocks of a page as one program; what `pycon` shows is what comes."""
    text = page.read_text(encoding="utf-8")
    names = {"__name__": "__main__"}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for block in BLOCK.finditer(text):
        line, (kind, program) = text.count("\n", 0, block.start(2)), block.groups()
        if kind == "python":
            exec(compile("\n" * line + program, page, "exec"), names)
        else:
            test = doctest.DocTestParser().get_doctest(program, names, page.name, str(page), line)
            runner.run(test, clear_globs=False)
            names.update(test.globs)
    assert runner.failures == 0


def test_examples_of_docstrings_give_what_they_show(subtests):
    """Every `>>>` of every module."""
    for name in WITH_EXAMPLES:
        with subtests.test(name):
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError as error:  # of a bridge, whose framework is not installed
                pytest.skip(str(error))
            result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
            assert result.failed == 0


def test_the_example_of_the_readme_runs():
    """As printed, and it learns."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(program.replace("range(200)", "range(20)"), names)
    assert names["y_t"].shape == (1, 64)
    assert float(names["loss"]) < 1


def test_the_programs_of_the_pages_run(subtests, tmp_path, monkeypatch):
    """As printed, in an empty folder each, and with what they show."""
    threads = rnnkern.num_threads()
    for page in PAGES:
        with subtests.test(page.name):
            folder = tmp_path / page.stem
            folder.mkdir(exist_ok=True)
            monkeypatch.chdir(folder)
            try:
                run_programs(page)
            except ModuleNotFoundError as error:  # of a framework that is not installed
                pytest.skip(str(error))
            finally:
                rnnkern.set_num_threads(threads)


def test_the_files_that_the_pages_name_are_there():
    """So that a page changes with the files that it sends its readers to, by name or by a link."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text("utf-8")
        named = re.findall(r"`((?:csrc|python|tests|tools|cmake|lab|examples|benchmarks)/[\w./]+)`", text)
        linked = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
        for path in [*(ROOT / name for name in named), *(page.parent / name for name in linked)]:
            assert path.exists(), f"{page.name}: {path}"


def test_the_reference_has_every_public_name():
    """A new name has to be put where its readers look for it; modules like `rnnkern.data` are there as a whole."""
    text = "".join(page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    entries = set(re.findall(r"\.\. auto(?:class|function|exception|module):: (?:rnnkern\.)?(\w+)", text))
    assert set(rnnkern.__all__) <= entries


def test_a_decision_stands_once_and_begins_a_paragraph():
    """Branches that write there at the same time leave a paragraph twice, or two in one."""
    text = (ROOT / "docs" / "decisions.md").read_text("utf-8")
    topics = re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]
    decisions = [f"**{one}" for topic in topics for one in f"\n{topic}".split("\n\n**")[1:]]
    assert [one for one in decisions if one.count("**") != 2] == []
    assert [topic for topic in topics if not topic.startswith("\n\n**")] == []
    titles = Counter(" ".join(one.split("**")[1].split()) for one in decisions)
    assert [title for title, times in titles.items() if times > 1] == []
