"""What the documentation shows is run: the examples of the docstrings and of README.md."""

from __future__ import annotations

import doctest
import importlib
import re
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
PROGRAMS = [
    page.name
    for page in sorted((ROOT / "docs").glob("*.md"))
    if "```python" in page.read_text(encoding="utf-8") and page.name not in CHECKED_ELSEWHERE
]


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


@pytest.mark.parametrize("page", PROGRAMS)
def test_the_programs_of_the_pages_run(page, tmp_path, monkeypatch):
    """As printed, in an empty folder; all of a page are one program."""
    parts = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile("".join(parts), page, "exec"), {"__name__": "__main__"})
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def test_the_files_that_the_pages_name_are_there():
    """So that a page changes with the files that it sends its readers to."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(
            r"`((?:csrc|python|tests|tools|cmake|lab|examples|benchmarks)/[\w./]+)`", page.read_text("utf-8")
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
