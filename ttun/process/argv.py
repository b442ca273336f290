"""Command lines: where keys are in one, errors that show none, values that look like options.

Anything that is neither an option nor an option's value may be a key that was put in the wrong
place, as in ``-psk KEY``. So an error names options, not values.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from ttun.errors import printable

SECRETS = ("-k", "--psk", "--proxy")  # options whose value is a key, or may have a password
NOT_SHOWN = "not shown: it may be a key"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without what may be a key."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, where help is, and exit with code 2."""
        message = re.sub("ignored explicit argument .*", "takes no value", message, flags=re.DOTALL)
        with contextlib.suppress(OSError):
            print(f"{self.prog}: {printable(message)}; see {self.prog} -h", file=sys.stderr)
        sys.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help. argparse would keep quiet about a disk that is full."""
        print(message, end="", file=file)

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        """Parse as argparse does, but refuse what is not known."""
        parsed, unknown = super().parse_known_args(*arguments, **named)
        if unknown:
            self.error(_why_unknown(unknown[0], self._option_string_actions))
        return parsed, unknown

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Return what an argument that is no option may stand for: one letter and its value.

        argparse would also take the beginning of a long option, behind one dash, for the whole.
        """
        found = super()._get_option_tuples(option_string)
        return [
            each for each in found if _joins(option_string, each[1], self._option_string_actions)
        ]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse an unknown command without showing it."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            like = difflib.get_close_matches(str(value), choices, 1)
            why = [f"choose from {', '.join(choices)}", *_did_you_mean(like)]
            raise argparse.ArgumentError(action, f"unknown command ({'; '.join(why)})")


def find_secrets(arguments: Sequence[str], parser: Parser) -> Iterator[tuple[int, int]]:
    """Yield where a key may be on a command line: an argument's index, and its first character.

    That is the value of -k and --psk in all ways to write it, also when it is written twice, and
    what is neither an option nor a value: parsing will fail there, but this process is seen first.
    """
    options, commands, free = _what_it_takes(parser)
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
            options, commands, free = _what_it_takes(commands[argument])
        elif not argument.startswith("-"):
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

    With an option stands whether it takes the argument behind it; None where it takes no value.
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
    """Join each option that takes a value to what follows it.

    Not to nothing, which would be no value. Nor to two dashes: argparse drops such a value whatever
    is done; apart, it is refused.
    """
    joined, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if takes_value(argument) and rest and rest[0] not in ("", "--"):
            argument += joint + rest.pop(0)
        joined.append(argument)
    return joined


def _joins(argument: str, option: str, names: Iterable[str]) -> bool:
    """Return whether an argument can be an option of one letter with its value behind it.

    It cannot where it is a long option behind one dash, or begins with one: ``-server h`` does not
    mean ``-s erver``.
    """
    return len(option) == 2 and not any(
        argument.startswith(name) or argument == name[1:] for name in names if len(name) > 2
    )


def _why_unknown(argument: str, names: Iterable[str]) -> str:
    """Return what is wrong with an argument; of it, show no more than one of names has too."""
    if not argument.startswith("-"):
        return f"unexpected argument ({NOT_SHOWN})"
    typed = argument.partition("=")[0]
    word = typed.lstrip("-")
    known = sorted({name.lstrip("-") for name in names if len(name) > 2})
    like = [name for name in known if word and name.startswith(word)]
    is_shown = like or len(typed) == 2
    like = like or [name for name in known if word.startswith(name)]
    like = like or difflib.get_close_matches(word, known, 1)
    what = f"unknown option {typed}" if is_shown else "unknown option"
    more = [] if is_shown else [NOT_SHOWN]
    more += _did_you_mean([f"--{name}" for name in like])
    return f"{what} ({'; '.join(more)})" if more else what


def _did_you_mean(names: Sequence[str]) -> list[str]:
    return [f"did you mean {' or '.join(names)}?"] if names else []
