"""README and docs name what there is: files, tests, flags, commands. What drifts fails here."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import manual
import pytest
from tunnel import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
TREE = manual.tree()
COMMANDS = {command.path: command for command in TREE.all()}


def code_lines(page: Path) -> list[str]:
    """The lines that a reader may paste, indented by four; what is in quotes stands by itself."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    return [part for line in lines for part in line.split("'")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    sources = "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in sources, name


def test_the_design_names_every_source_file() -> None:
    table = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    plain = {"__init__.py", "__main__.py", "errors.py", "version.py"}
    for path in [*ROOT.glob("ttun/**/*.py"), *ROOT.glob("csrc/*.c")]:
        assert path.name in table or path.name in plain, path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_are_ones_that_the_parser_has(page: Path) -> None:
    for line in code_lines(page):
        for words in re.findall(r"ttun(?:\.py)? ((?:bench )?[a-z]+\b)([^#&:|]*)", line):
            command = COMMANDS.get(words[0])
            if command is None:
                continue  # prose, or a diagram
            known = {name for option in command.options for name in option.names}
            for flag in re.findall(r"(?<=\s)(--?[a-zA-Z][\w-]*)", words[1]):
                assert flag in known, f"{flag} in: {line}"


def test_flags_in_the_table_of_the_readme_have_the_defaults_that_it_says() -> None:
    rows = re.findall(r"^\| (`-.*?) \| (.*?) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) > 10
    known = {n: o for c in ("server", "client") for o in COMMANDS[c].options for n in o.names}
    for flags, default in rows:
        for flag in re.findall(r"(?<=`)--?[\w-]+", flags):
            assert flag in known, flag
            told = re.search(r"\(default: ([^,)]+)", known[flag].help)
            given = re.fullmatch(r"`(.+)`", default)
            if told and given:
                assert told[1].startswith(given[1]), flag


def test_pictures_are_small_and_well_formed() -> None:
    for name in ("demo", "watch", "performance"):
        picture = ROOT / "docs" / f"{name}.svg"
        assert picture.stat().st_size < 40_000
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
