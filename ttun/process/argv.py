"""Command lines: where keys are in one, errors that show no key, values that look like options.

An argument that is neither an option nor an option's value may be a misplaced key, as in ``-psk
KEY``. So errors name options and not values.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from ttun.errors import printable
from ttun.process import standard_streams

SECRETS = ("-k", "--psk", "--proxy")  # options whose value is a key, or may have a password
LIKE = 3  # letters after one dash from which on they are an abbreviated option
NOT_SHOWN = "not shown: it may be a key"


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that fits 80 columns, with each option in the form that users should type."""

    def __init__(self, prog: str, **named: Any) -> None:
        """Leave 52 of 80 columns to the text."""
        super().__init__(prog, max_help_position=26, **named)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Return ``-m, --cipher CIPHER``: no second ``-cipher``, and the value once."""
        names = [name for name in action.option_strings if name[1] == "-" or len(name) == 2]
        if not names:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(names) + value

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Wrap the text of an option, but not within a name such as aes-256-gcm."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Keep line breaks, and wrap longer lines."""
        return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and show no value that may be a key."""

    takes_files = False  # whether a bare @FILE stands for the options in a file

    def __init__(self, **named: Any) -> None:
        """Take what argparse takes, but no abbreviated options."""
        super().__init__(allow_abbrev=False, formatter_class=Help, **named)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where help is, and exit with code 2."""
        message = re.sub("ignored explicit argument .*", "takes no value", message, flags=re.DOTALL)
        standard_streams.tell(f"{self.prog}: {printable(message)}; see {self.prog} -h")
        sys.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help. argparse would ignore a full disk."""
        print(message, end="", file=file)

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        """Parse as argparse does, but reject unknown arguments."""
        parsed, unknown = super().parse_known_args(*arguments, **named)
        if unknown:  # a value where none belongs
            self.error(_why_unknown(unknown[0], self._option_string_actions))
        return parsed, unknown

    def _parse_optional(self, arg_string: str) -> Any:
        """Reject an unknown option at once, before argparse misses what was meant by it."""
        found: Any = super()._parse_optional(arg_string)
        first = found[0] if isinstance(found, list) else found
        if first is not None and first[0] is None and self._subparsers is None:
            self.error(_why_unknown(arg_string, self._option_string_actions))
        return found

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Return the options of one letter that an argument may be, with the value attached.

        argparse would also accept an abbreviated long option after one dash.
        """
        found = super()._get_option_tuples(option_string)
        return [
            each for each in found if _joins(option_string, each[1], self._option_string_actions)
        ]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Reject an unknown command without showing it."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            like = _closest(str(value), choices)
            why = [f"choose from {', '.join(choices)}", *_did_you_mean(like)]
            raise argparse.ArgumentError(action, f"unknown command ({'; '.join(why)})")


def find_secrets(arguments: Sequence[str], parser: Parser) -> Iterator[tuple[int, int]]:
    """Yield where a key may be on a command line: an argument's index, and its first character.

    That is each value of -k and --psk, in all forms, and whatever is neither an option nor a value:
    parsing will fail there, but the process is visible until then.
    """
    options, commands, free = _what_it_takes(parser)
    files = getattr(parser, "takes_files", False)
    index = -1
    is_after_unknown = False
    while (index := index + 1) < len(arguments):
        argument = arguments[index]
        name, equals, _ = argument.partition("=")
        was_after_unknown, is_after_unknown = is_after_unknown, False
        if argument in options:
            index += bool(options[argument])
            if argument in SECRETS and index < len(arguments):
                yield index, 0
        elif equals and name in options:
            if name in SECRETS or options[name] is None:
                yield index, len(name) + 1
        elif argument in commands:
            files = getattr(commands[argument], "takes_files", False)
            options, commands, free = _what_it_takes(commands[argument])
        elif not argument.startswith("-"):
            if files and argument.startswith("@") and not was_after_unknown:
                continue
            if was_after_unknown or not free:
                yield index, 0
            else:
                free -= 1
        elif options.get(argument[:2]) and _joins(argument, argument[:2], options):
            if argument[:2] in SECRETS:
                yield index, 2
        else:
            yield index, len(name) + 1 if equals else 1
            is_after_unknown = not equals


def _what_it_takes(
    parser: argparse.ArgumentParser,
) -> tuple[dict[str, bool | None], dict[str, argparse.ArgumentParser], int]:
    """Return a parser's options, its commands, and how many other arguments it takes.

    The value of an option is whether it takes the next argument; None if it takes no value.
    """
    options = {
        name: None if action.nargs == 0 else action.nargs is None
        for name, action in parser._option_string_actions.items()
    }
    others = [action for action in parser._actions if not action.option_strings]
    below = [action for action in others if isinstance(action, argparse._SubParsersAction)]
    commands = dict(below[0].choices) if below else {}
    return options, commands, len(others) - len(below)


def join_each(
    arguments: Sequence[str], takes_value: Callable[[str], bool], joint: str
) -> list[str]:
    """Join each option that takes a value to the argument after it.

    Not to an empty one, nor to two dashes: argparse drops such a value if it is joined, and rejects
    it if it is not.
    """
    joined, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if takes_value(argument) and rest and rest[0] not in ("", "--"):
            argument += joint + rest.pop(0)
        joined.append(argument)
    return joined


def _joins(argument: str, option: str, names: Iterable[str]) -> bool:
    """Return whether an argument can be an option of one letter with its value attached.

    Not if it begins with a long option after one dash, or with LIKE letters of one and an end:
    ``-server h`` does not mean ``-s erver``.
    """
    word = argument.partition("=")[0][1:]
    long = [name.lstrip("-") for name in names if len(name) > 2]
    return len(option) == 2 and not any(
        word.startswith(name) or (len(word) >= LIKE and name.startswith(word)) for name in long
    )


def _why_unknown(argument: str, names: Iterable[str]) -> str:
    """Return what is wrong with an argument; show of it only what is in one of the names."""
    if argument.startswith("@"):
        return "unexpected @FILE: a file of options cannot name another one"
    if not argument.startswith("-"):
        return f"unexpected argument ({NOT_SHOWN})"
    typed = argument.partition("=")[0]
    word = typed.lstrip("-")
    known = sorted({name.lstrip("-") for name in names if len(name) > 2})
    like = [name for name in known if len(word) > 1 and name.startswith(word)]
    is_shown = like or len(typed) == 2
    like = like or [name for name in known if word.startswith(name)]
    like = like or _closest(word, known)
    what = f"unknown option {typed}" if is_shown else "unknown option"
    more = [] if is_shown else [NOT_SHOWN]
    more += _did_you_mean([f"--{name}" for name in like])
    return f"{what} ({'; '.join(more)})" if more else what


def _closest(word: str, known: Sequence[str]) -> list[str]:
    import difflib  # after an error only: programs start often, and on slow machines

    return difflib.get_close_matches(word, known, 1)


def _did_you_mean(names: Sequence[str]) -> list[str]:
    return [f"did you mean {' or '.join(names)}?"] if names else []
