"""Options in a file: ``ttun client @FILE``.

An option a line, with its value; words and quotes as in a shell, ``#`` begins a comment. Only a
bare word names such a file: in ``-k @x`` it is a key. The words of the file take the place of
``@FILE``; there is no ``@FILE`` within a file.
"""

from __future__ import annotations

import codecs
import os
import re
import shlex
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from ttun.errors import TtunError, UsageError
from ttun.process import files
from ttun.process.argv import SECRETS, Parser, find_secrets

MAX_SIZE = 65536  # bytes
BLANK = " \t\r"
WORD = re.compile(rf"""(?:[^{BLANK}"'\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+""")


def expand(arguments: Sequence[str], takes_value: set[str], parser: Parser) -> Iterator[str]:
    """Yield arguments of a command, with the words of each file in its place.

    takes_value: the options whose next argument is a value. Raises TtunError.
    """
    given = iter(arguments)
    for argument in given:
        if argument.startswith("@"):
            yield from read(argument[1:], parser)
            continue
        yield argument
        if argument in takes_value:
            yield from (value for value in [next(given, None)] if value is not None)


def read(name: str, parser: Parser) -> list[str]:
    """Return the words in a file. Raises TtunError, also if others can read a key in it."""
    if not name:
        raise UsageError("@ without a file name (@FILE stands for the options in FILE)")
    found: list[os.stat_result] = []
    path = Path(name)
    try:
        read = files.read(path, MAX_SIZE, found.append)
        text = os.fsdecode(read[3:] if read.startswith(codecs.BOM_UTF8) else read)
    except OSError as error:
        raise UsageError(f"cannot read the options in {name}: {files.why(path, error)}") from None
    words: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        words += _words(line, f"{name}, line {number}")
    if _has_key(words, parser):
        files.check_secret(path, found[0], "options file with a key")
    elif stat.S_ISREG(found[0].st_mode) and found[0].st_mode & stat.S_IWOTH:
        raise TtunError(f"the options file {name} is writable by other users (chmod o-w {name})")
    return words


def _words(line: str, where: str) -> Iterator[str]:
    """Yield the words of a line. Errors do not show it: it may have a key."""
    if "\0" in line:
        raise UsageError(f"{where}: it has a zero byte")
    at = 0
    while (rest := line[at:].lstrip(BLANK)) and not rest.startswith("#"):
        word = WORD.match(rest)
        if word is None or rest[word.end() : word.end() + 1].strip(BLANK):
            raise UsageError(f"{where}: a quote or backslash at its end has no other half")
        yield from shlex.split(word[0])
        at = len(line) - len(rest) + word.end()


def _has_key(words: Sequence[str], parser: Parser) -> bool:
    """Return whether one of the words is, or ends with, a key or a URL with a password."""
    for index, first in find_secrets(words, parser):
        option = words[index - 1 if first == 0 else index][: first or None].rstrip("=")
        if option in SECRETS and (option != "--proxy" or "@" in words[index]):
            return True
    return False
