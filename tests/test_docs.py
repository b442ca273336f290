"""README and docs name what there is: files, tests, flags, commands. What drifts fails here."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import manual
import pytest
from tunnel import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
COMMANDS = dict(manual.each(manual.whole_parser()))


def code_lines(page: Path) -> list[str]:
    """The lines that a reader may paste, indented by four; what is in quotes stands by itself."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    return [part for line in lines for part in line.split("'")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            there = page.parent / name if name else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def anchors(page: Path) -> list[str]:
    """Those of the headings, as a forge makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    sources = "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in sources, name


@pytest.mark.parametrize("page", [*ROOT.glob("docs/*.md"), ROOT / "SECURITY.md"], ids=str)
def test_a_page_says_first_whom_it_is_for_and_the_index_has_it(page: Path) -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert page.name == "README.md" or f"{page.name}](" in index
    first = page.read_text(encoding="utf-8").split("\n\n")[1]
    assert re.search(r"\bfor\b", first, re.I), first


def test_the_map_has_every_room_and_names_files_that_are_there() -> None:
    """And each file says what it is for."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    rooms = {f"`{path.parent.relative_to(ROOT)}/`" for path in ROOT.glob("ttun/*/__init__.py")}
    assert {room for room in rooms if room in text} == rooms
    sources = [path for place in ("ttun", "csrc") for path in ROOT.glob(f"{place}/**/*.[pch]*")]
    others = [path for place in ("tests", "packaging") for path in ROOT.glob(f"{place}/**/*.*")]
    names = {path.name for path in [*sources, *others]}
    for name in re.findall(r"`(?:ttun/|csrc/)?(?:\w+/)?(\w+\.(?:py|c|h))`", text):
        assert name in names, name
    for path in sources:
        has_header = path.with_suffix(".h").exists() and path.suffix == ".c"
        if path.suffix in (".py", ".c", ".h") and not has_header:
            assert path.read_text(encoding="utf-8").startswith(('"""', "/*")), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_are_ones_that_the_parser_has(page: Path) -> None:
    for line in code_lines(page):
        for words in re.findall(r"ttun(?:\.py)? ((?:bench )?[a-z]+\b)([^#&:|]*)", line):
            command = COMMANDS.get(words[0])
            if command is None:
                continue  # prose, or a diagram
            known = command._option_string_actions
            for flag in re.findall(r"(?<=\s)(--?[a-zA-Z][\w-]*)", words[1]):
                assert flag in known, f"{flag} in: {line}"


def test_flags_in_the_table_of_the_readme_have_the_defaults_that_it_says() -> None:
    rows = re.findall(r"^\| (`-.*?) \| (.*?) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) > 10
    known = {
        name: (option.help or "") % vars(option)
        for command in ("server", "client")
        for name, option in COMMANDS[command]._option_string_actions.items()
    }
    for flags, default in rows:
        for flag in re.findall(r"(?<=`)--?[\w-]+", flags):
            assert flag in known, flag
            told = re.search(r"\(default: ([^,)]+)", known[flag])
            given = re.fullmatch(r"`(.+)`", default)
            if told and given:
                assert told[1].startswith(given[1]), flag


def test_no_two_pages_use_the_same_nftables_table() -> None:
    """One recipe would delete the rules of the other."""
    found = [
        table
        for page in PAGES
        for table in set(re.findall(r"table[ =]\"?(ip6? \w+|inet \w+)", page.read_text("utf-8")))
    ]
    assert len(found) >= 4
    assert len(found) == len(set(found)), found


# What no manual of another tunnel would say, and the word for it.
INVENTED = {
    r"two (ends )?of ours|(the|an) original\b(?! bytes)": "two ttun ends; Go ttun, Tuntox",
    r"(?<!-)wires? [vx]1": "protocol v1, protocol x1",
    r"who may\b": "authentication, authorized",
    r"mailbox": "inbox, outbox",
    r"going on as|g[ia]ven? up (its|all|their) (rights|privileges)": "drop privileges",
    r"did not add up|does not add up": "failed validation",
    r"unsendable": "dropped: too large",
    r"speaks? against": "limitations",
    r"and no other\b": "only",
    r"without a word": "silently",
    r"talk(ed)? down": "downgrade",
    r"use a recording again": "replay",
    r"all that is to be known": "the details",
    r"gone with the tunnel": "removed when the tunnel stops",
    r"who to be\b": "user to switch to",
    r"holds on over": "survives",
    r"\b(he|his|him|himself)\b": "an attacker, they",
}


def prose(page: Path) -> str:
    """What a page says in words: no block of code, no code within a line, no name of a file."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"^    .*", "", text, flags=re.M)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_use_the_terms_of_the_field(page: Path) -> None:
    assert invented(prose(page)) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_uses_the_terms_of_the_field(command: str) -> None:
    assert invented(COMMANDS[command].format_help()) == []


@pytest.mark.parametrize("place", ["ttun", "packaging"])
def test_messages_and_docstrings_use_the_terms_of_the_field(place: str) -> None:
    for path in sorted(ROOT.glob(f"{place}/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                assert invented(node.value) == [], f"{path}:{node.lineno}"


def invented(text: str) -> list[str]:
    """Each term that is not of the field, and what to say instead."""
    text = " ".join(text.lower().split())
    return [
        f"{found[0]!r}: say {instead!r}"
        for term, instead in INVENTED.items()
        for found in re.finditer(term, text)
    ]


def test_an_invented_term_is_found_also_over_the_end_of_a_line() -> None:
    assert len(invented("Two\nof ours, on Wire\nx1, and what speaks against him")) == 4
    assert invented("with --wire x1 between two ttun ends the client reconnects") == []


# pip, pipx and uv, up to what ends a command in a shell, in prose or in a string of Python.
INSTALLS = re.compile(r"\b(?:pip[x3]?|uv)\b[^\n|;&`]*? (?:install|download|wheel) [^\n|;&`()\"#]*")
WITH_A_VALUE = {"-w", "-d", "-t", "-r", "--find-links", "--no-binary", "--target"}


def fetched_by_name(text: str) -> list[str]:
    """The packages that commands in a text have an index asked for."""
    names = []
    for command in INSTALLS.findall(text.replace("\\\n", " ")):
        words = re.split(r" (?:install|download|wheel) ", command, maxsplit=1)[1].split()
        if "--no-index" not in command:
            for before, word in zip(["", *words], words):
                path = "/" in word or word.endswith((".whl", ".tar.gz"))
                if word[0].isalpha() and not path and before not in WITH_A_VALUE:
                    names.append(re.split("[<>=.,]", word)[0])
    return names


def test_no_command_asks_an_index_for_a_package_of_this_name() -> None:
    """PyPI's ttun is another project; ttun-tunnel is not registered there: anybody could."""
    text = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[0]
    rows = re.findall(r"^(?!dynamic)\w+ = \[(.*)\]", text, re.M)
    known = {re.split("[<>=]", name)[0] for row in rows for name in re.findall(r'"(.*?)"', row)}
    assert {"pynacl", "matplotlib", "setuptools"} < known
    for command, names in (
        ("pip install --find-links dist ttun", ["ttun"]),
        ("sudo pip3 install -U ttun", ["ttun"]),
        ("pip install --find-links dist \\\n  ttun-tunnel", ["ttun-tunnel"]),
        ("python -m pip download -d dist ttun-tunnel==0.2.0", ["ttun-tunnel"]),
        ("`pipx install ttun`, or", ["ttun"]),
        ("/opt/ttun/bin/pip install --no-index --find-links /tmp/dist ttun-tunnel", []),
        ("pip install .", []),
        ("pip install dist/ttun_tunnel-0.2.0-cp39-abi3-linux_x86_64.whl", []),
    ):
        assert fetched_by_name(command) == names, command
    places = [*PAGES, *ROOT.glob("ttun/**/*.py"), *ROOT.glob("packaging/*.*"),
              ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "setup.py"]  # fmt: skip
    named = 0
    for place in places:
        commands = place.read_text(encoding="utf-8")
        named += len(re.findall(r"--no-index[^\n]*\bttun-tunnel\b", commands))
        assert set(fetched_by_name(commands)) <= known, place
    assert named >= 4, "the documented ones, which have it"


def test_the_readme_warns_of_the_other_project() -> None:
    (line,) = [row for row in (ROOT / "README.md").read_text().split("\n\n") if "PyPI" in row]
    assert "`ttun` on PyPI is another project" in line
    assert "`ttun-tunnel` is not registered" in line


def test_pictures_are_small_and_well_formed() -> None:
    for name in ("demo", "watch", "performance"):
        picture = ROOT / "docs" / f"{name}.svg"
        assert picture.stat().st_size < 40_000
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
