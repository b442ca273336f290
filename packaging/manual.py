"""The man page and the shell completions, generated from the command line's parser.

    python packaging/manual.py man|bash|zsh|fish

``make install`` runs it, so the options are kept in one place. argparse-manpage and shtab do most
of the work. This adds what they cannot know: the kind of a value, from its metavar (VALUES), and
what each shell needs (BASH, _zsh, _fish). The other sections of the page are in manual.inc.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ttun.cipher import CIPHERS
from ttun.cli import build_parser
from ttun.commands import parser as grammar
from ttun.tox import options as tox
from ttun.version import __version__

# A status socket is named DEVICE.PID.sock: ttun.commands.runtime.
DEVICES = (
    "find /run/ttun $XDG_RUNTIME_DIR/ttun -name '*.sock' 2> /dev/null"
    " | sed 's|.*/||;s|[.][0-9]*[.]sock||'"
)
HOSTS = {
    "bash": "_ttun_hosts",
    "zsh": "_hosts",
    "fish": "(__fish_print_hostnames)",
    "preamble": {"bash": '_ttun_hosts() { compgen -A hostname -- "$1"; }'},
}
VALUES = {"FILE": "file", "DIR": "directory", "HOST": HOSTS}  # by the first word of a metavar
# bash splits --option=value into three words.
BASH = """
_ttun() {
  local word words=("${COMP_WORDS[@]:0:COMP_CWORD + 1}")
  [[ ${words[COMP_CWORD]} == = ]] && words+=("")
  local COMP_CWORD=-1 COMP_WORDS=()
  for word in "${words[@]}"; do
    [[ $word == = ]] || COMP_WORDS[++COMP_CWORD]=$word
  done
  _shtab_ttun
}
complete -o bashdefault -F _ttun ttun ttun.py
"""


def whole_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, with the options of ``ttun tox``."""
    parser = build_parser()
    tox.build_parser(dict(each(parser))["tox"])
    return parser


def each(
    parser: argparse.ArgumentParser, words: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield a parser and all its subparsers, each with the words of its command."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from each(below, f"{words} {name}".strip())


def man(parser: argparse.ArgumentParser) -> str:
    """Return the man page ttun(1)."""
    from argparse_manpage.manpage import Manpage

    os.environ["COLUMNS"] = "9999"  # argparse would break lines
    for _, command in each(parser):
        command.description = command.epilog  # the description only repeats the command's help
    parser.description = parser.epilog = None  # manual.inc has more
    # The date of the parser's last change, as far as it is known.
    seconds = os.environ.get("SOURCE_DATE_EPOCH") or os.stat(grammar.__file__).st_mtime
    date = time.strftime("%Y-%m-%d", time.gmtime(float(seconds)))
    data = {
        "date": date,
        "description": "a point-to-point tunnel over one TCP connection",
        "include": Path(__file__).with_suffix(".inc"),
        "manual_title": "User Commands",
        "version": __version__,
    }
    page = str(Manpage(parser, data, format="single-commands-section")).replace("\n\n.TP", "\n.TP")
    return page.replace(date.replace("-", r"\-"), date)  # man(7) wants plain hyphens in a date


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of a shell."""
    import shtab

    values = {**VALUES, "DEVICE": shtab.cmd(DEVICES)}
    for _, command in each(parser):
        for action in command._actions:
            metavar = str(action.metavar)
            kind = re.split("[^A-Z]", metavar)[0]
            if "|" in metavar or kind == "CIPHER":
                action.choices = metavar.split("|") if "|" in metavar else list(CIPHERS)
            elif kind in values:
                action.complete = values[kind]  # type: ignore[attr-defined]
            if shell == "zsh" and action.option_strings and action.nargs != 0:
                _zsh(action)
    text: str = shtab.complete(parser, shell)
    if shell == "bash":
        return text + BASH
    return text.replace("#compdef ttun", "#compdef ttun ttun.py") if shell == "zsh" else _fish(text)


def _zsh(option: argparse.Action) -> None:
    """Make a value follow a =, as it must if it is optional; escape colons."""
    ending, colon = ("=-", ":") if option.nargs == "?" else ("=", "")
    option.option_strings = [n + ending if len(n) > 2 else n for n in option.option_strings]
    option.metavar = colon + str(option.metavar or option.dest).replace(":", r"\:")


def _fish(text: str) -> str:
    """Accept long options with one dash, and an optional value after a =."""
    text = re.sub(r"^(complete .*?) -s (\w[\w-]+)", r"\1 -o \2", text, flags=re.M)
    text = text.replace('-xka "true false"', '-fka "true false"')
    return text + "complete -c ttun.py -w ttun\n"


if __name__ == "__main__":
    form, parser = sys.argv[1], whole_parser()
    print(man(parser) if form == "man" else completion(parser, form), end="")
