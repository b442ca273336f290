"""The man page and the shell completions, written out of the command line's own parser.

    python packaging/manual.py man|bash|zsh|fish

``make install`` runs it, so nothing of the command line is kept in two places. First the parser is
read into a tree of Command and Option; then each of the four is one function over that tree.
Sources: man(7); bash(1), Programmable Completion; zshcompsys(1), _arguments; fish's complete(1).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Callable

from ttun.cipher import CIPHERS
from ttun.commands import key
from ttun.commands import parser as grammar
from ttun.version import __version__

EXIT_CODES = [
    ("0", "It was ended by a signal, or did what it was to do."),
    ("1", "It cannot work here; one line on stderr says why."),
    ("2", "Bad usage; one line on stderr says what."),
]
SIGNALS = [
    (
        "SIGTERM, SIGINT, SIGHUP",
        "End a server, a client or ttun tox with exit status 0. SIGINT and SIGHUP stay ignored if "
        "they were ignored when the program was started, as nohup does.",
    ),
    ("SIGUSR1", "Log one line that says what a server, a client or ttun tox is doing."),
]
PROGRAMS = "ttun ttun.py"  # as installed, and in its source directory


@dataclass(frozen=True)
class Option:
    """An option or, without names, a positional argument."""

    names: list[str]
    value: str  # what it takes, as help shows it; empty for none
    optional: bool  # the value may be left out; it then stands behind a =
    repeatable: bool
    help: str

    @property
    def values(self) -> list[str]:
        """What the value can be, where that is a list."""
        if self.value == "CIPHER":
            return list(CIPHERS)
        return self.value.split("|") if "|" in self.value else []

    @property
    def is_file(self) -> bool:
        """Is the value a file's name?"""
        return self.value.startswith("FILE")

    @property
    def is_host(self) -> bool:
        """Is the value a host's name?"""
        return self.value.startswith("HOST")


@dataclass(frozen=True)
class Command:
    """A command: ttun itself, or one of its subcommands."""

    words: list[str]  # as typed, without "ttun"
    help: str
    epilog: str
    options: list[Option]
    arguments: list[Option]
    commands: list[Command] = field(default_factory=list)

    @property
    def path(self) -> str:
        """The words of its subcommands as one string."""
        return " ".join(self.words)

    def all(self) -> Iterator[Command]:
        """Yield it and all below it."""
        yield self
        for command in self.commands:
            yield from command.all()


def tree() -> Command:
    """Return the whole command line; ``ttun tox`` has its options in a parser of its own."""
    from ttun.tox import options as tox

    parser = grammar.build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    tox.build_parser(commands.choices["tox"])
    return read(parser, [], parser.description or "")


def read(parser: argparse.ArgumentParser, words: list[str], text: str) -> Command:
    """Return the tree of a parser; words are those of its subcommands, text its help."""
    options: list[Option] = []
    arguments: list[Option] = []
    commands: list[Command] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, below in action.choices.items():
                commands.append(read(below, [*words, name], helps[name]))
        else:
            (options if action.option_strings else arguments).append(_option(action, parser))
    return Command(words, text, parser.epilog or "", options, arguments, commands)


def _option(action: argparse.Action, parser: argparse.ArgumentParser) -> Option:
    takes = action.nargs is None or action.nargs == "?"
    return Option(
        names=list(action.option_strings),
        value=str(action.metavar or action.dest.upper()) if takes else "",
        optional=action.nargs == "?",
        repeatable=isinstance(action, argparse._AppendAction),
        help=(action.help or "") % {**vars(action), "prog": parser.prog},
    )


def man(root: Command) -> str:
    """Return the man page ttun(1)."""
    lines = [
        f'.TH TTUN 1 "{_date()}" "ttun {__version__}" "User Commands"',
        ".SH NAME",
        rf"ttun \- {_roff(root.help[0].lower() + root.help[1:].rstrip('.'))}",
        ".SH SYNOPSIS",
    ]
    for command in root.all():
        if not command.commands:
            lines += [*_synopsis(command), ".br"]
    lines[-1] = ".SH DESCRIPTION"
    lines.append(
        "A server and a client, each with a TUN device, and one TCP connection between them. "
        "Each proves a pre-shared key to the other; every packet is encrypted and authenticated."
    )
    for command in root.all():
        lines.append(f".SS {_roff(command.path)}" if command.words else ".SH OPTIONS")
        if command.words:
            lines.append(_roff(command.help[0].upper() + command.help[1:] + "."))
        for option in command.options + command.arguments:
            if "--help" not in option.names or not command.words:
                lines += [".TP", _roff_usage(option), _roff(option.help)]
        if command.epilog:
            lines += [".PP", *map(_roff, command.epilog.splitlines())]
        if not command.words:
            lines.append(".SH COMMANDS")
    lines.append(".SH EXIT STATUS")
    for code, meaning in EXIT_CODES:
        lines += [".TP", f".B {code}", meaning]
    lines.append(".SH SIGNALS")
    for names, meaning in SIGNALS:
        lines += [".TP", f".B {names}", _roff(meaning)]
    lines += [".SH ENVIRONMENT", ".TP", f".B {key.VARIABLE}", "The pre-shared key."]
    lines += [".SH FILES", ".TP", f".I {_roff(str(key.DEFAULT_FILE))}"]
    lines += ["The pre-shared key, mode 0600; a server without one makes it."]
    return "\n".join(lines) + "\n"


def _date() -> str:
    """Return the day on which the command line was changed last, for as much as is known here."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH") or os.stat(grammar.__file__).st_mtime
    return time.strftime("%Y-%m-%d", time.gmtime(float(seconds)))


def _synopsis(command: Command) -> list[str]:
    arguments = " ".join(f"[{option.value}]" for option in command.arguments)
    rest = rf"[\fIOPTION\fR]... {_roff(arguments)}".rstrip()
    return [rf"\fBttun {_roff(command.path)}\fR {rest}"]


def _roff_usage(option: Option) -> str:
    value = rf"\fI{_roff(option.value)}\fR" if option.value else ""
    if not option.names:
        return value
    joined = ", ".join(rf"\fB{_roff(name)}\fR" for name in option.names)
    return joined + (f"[={value}]" if option.optional else f" {value}" if value else "")


def _roff(text: str) -> str:
    """Escape what roff would read: its escape, hyphens, and a leading period or quote."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text[:1] in (".", "'") else text


def bash(root: Command) -> str:
    """Return the completion of bash 4 and newer."""
    paths = [f'"{command.path}"' for command in root.all() if command.words]
    values: dict[str, list[str]] = {}  # what to do, and where
    words = []
    for command in root.all():
        for option in command.options:
            if option.value:
                places = values.setdefault(_bash_value(option), [])
                places += [f'"{command.path}:{name}"' for name in option.names]
        rest = [below.words[-1] for below in command.commands]
        rest += [name for option in command.options for name in option.names]
        words.append(f'        "{command.path}") words="{" ".join(rest)}" ;;')
    hosts = "|".join(f'"{c.path}"' for c in root.all() if any(a.is_host for a in c.arguments))
    return f"""\
# bash completion of ttun, made by: python packaging/manual.py bash
_ttun()
{{
    local word="${{COMP_WORDS[COMP_CWORD]}}" option="" command="" words="" index
    # bash cuts --option=value in three
    if [[ $word == = ]]; then
        word="" option="${{COMP_WORDS[COMP_CWORD - 1]}}"
    elif [[ ${{COMP_WORDS[COMP_CWORD - 1]}} == = ]]; then
        option="${{COMP_WORDS[COMP_CWORD - 2]}}"
    else
        option="${{COMP_WORDS[COMP_CWORD - 1]}}"
    fi
    for ((index = 1; index < COMP_CWORD; index++)); do
        case "${{command:+$command }}${{COMP_WORDS[index]}}" in
            {"|".join(paths)}) command="${{command:+$command }}${{COMP_WORDS[index]}}" ;;
        esac
    done
    COMPREPLY=()
    case "$command:$option" in
{_lines(_bash_case(places, do) for do, places in values.items())}
    esac
    case "$command" in
{_lines(words)}
    esac
    case "$command" in
        {hosts}) [[ $word == -* ]] || words+=" $(compgen -A hostname)" ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}}
complete -F _ttun {PROGRAMS}
"""


def _bash_case(places: list[str], do: str) -> str:
    return f"        {'|'.join(places)})\n            {do}return ;;"


def _bash_value(option: Option) -> str:
    if option.is_file:
        choose = "compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f"
    elif option.is_host:
        choose = "mapfile -t COMPREPLY < <(compgen -A hostname"
    elif option.values:
        choose = f'mapfile -t COMPREPLY < <(compgen -W "{" ".join(option.values)}"'
    else:
        return ""
    return f'{choose} -- "$word"); '


def zsh(root: Command) -> str:
    """Return the completion of zsh: a function for each command."""
    functions = []
    for command in reversed(list(root.all())):
        specs = [spec for option in command.options for spec in _zsh_specs(option)]
        for argument in command.arguments:
            specs.append(f"'::{_zsh(argument.value)}:{_zsh_action(argument)}'")
        name = "_".join(["_ttun", *command.words])
        if not command.commands:
            functions.append(f"{name}() {{\n    _arguments \\\n{_specs(specs)}\n}}\n")
            continue
        below = " ".join(
            f'{c.words[-1]}\\:"{_zsh(c.help, also=chr(34))}"' for c in command.commands
        )
        specs += [f"'1:command:(({below}))'", "'*::argument:->command'"]
        functions.append(
            f"{name}() {{\n    local line state\n    typeset -A opt_args\n"
            f"    _arguments -C \\\n{_specs(specs)} && return\n"
            f'    (( $+functions[{name}_$line[1]] )) && "{name}_$line[1]"\n'
            "}\n"
        )
    head = f"#compdef {PROGRAMS}\n# made by: python packaging/manual.py zsh\n\n"
    return head + "\n".join(functions) + '\n_ttun "$@"\n'


def _specs(specs: list[str]) -> str:
    return " \\\n".join(f"        {spec}" for spec in specs)


def _zsh_specs(option: Option) -> Iterator[str]:
    """Yield what _arguments takes for each name of an option."""
    apart = "*" if option.repeatable else f"({' '.join(option.names)})"
    for name in option.names:
        spec = f"{apart}{name}"
        if option.value:
            spec += "=-" if option.optional else "=" if len(name) > 2 else ""
        spec += f"[{_zsh(option.help)}]"
        if option.value:
            colons = "::" if option.optional else ":"
            spec += f"{colons}{_zsh(option.value)}:{_zsh_action(option)}"
        yield f"'{spec}'"


def _zsh_action(option: Option) -> str:
    if option.is_file:
        return "_files"
    if option.is_host:
        return "_hosts"
    return f"({' '.join(option.values)})" if option.values else " "


def _zsh(text: str, also: str = "") -> str:
    """Escape what _arguments would read in a description, inside single quotes."""
    escaped = _one_line(text)
    for character in "\\[]:" + also:
        escaped = escaped.replace(character, f"\\{character}")
    return escaped.replace("'", "'\\''")


def fish(root: Command) -> str:
    """Return the completion of fish."""
    lines = ["# fish completion of ttun, made by: python packaging/manual.py fish"]
    for program in PROGRAMS.split():
        lines.append(f"complete -c {program} -f")
        for command in root.all():
            when = _fish_when(command)
            for below in command.commands:
                lines.append(
                    f"complete -c {program} -n '{when}' -a {below.words[-1]} -d {_fish(below.help)}"
                )
            for option in command.options:
                names = " ".join(map(_fish_name, option.names))
                value = _fish_value(option)
                lines.append(
                    f"complete -c {program} -n '{when}' {names}{value} -d {_fish(option.help)}"
                )
            for argument in command.arguments:
                lines.append(
                    f"complete -c {program} -n '{when}'{_fish_value(argument)} "
                    f"-d {_fish(argument.help)}"
                )
    return "\n".join(lines) + "\n"


def _fish_when(command: Command) -> str:
    """Return the condition under which a command's own options are offered."""
    parts = [f"__fish_seen_subcommand_from {word}" for word in command.words]
    if command.commands:
        below = " ".join(c.words[-1] for c in command.commands)
        parts.append(f"not __fish_seen_subcommand_from {below}")
    return "; and ".join(parts)


def _fish_name(name: str) -> str:
    if name.startswith("--"):
        return f"-l {name[2:]}"
    return f"-s {name[1:]}" if len(name) == 2 else f"-o {name[1:]}"


def _fish_value(option: Option) -> str:
    if not option.value:
        return ""
    takes = "" if option.optional else " -r"
    if option.is_file:
        return f"{takes} -F"
    if option.is_host:
        return f"{takes} -f -a '(__fish_print_hostnames)'"
    return f"{takes} -f -a '{' '.join(option.values)}'" if option.values else f"{takes} -f"


def _fish(text: str) -> str:
    return "'" + _one_line(text).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


FORMATS: dict[str, Callable[[Command], str]] = {"man": man, "bash": bash, "zsh": zsh, "fish": fish}


def main(arguments: list[str]) -> int:
    """Print one of the four."""
    if len(arguments) != 1 or arguments[0] not in FORMATS:
        print(f"usage: python packaging/manual.py {'|'.join(FORMATS)}", file=sys.stderr)
        return 2
    print(FORMATS[arguments[0]](tree()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
