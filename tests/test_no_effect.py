"""Options that have no effect beside others are refused in one line, with exit code 2."""

from __future__ import annotations

import re

import pytest
from tunnel import run_program

TOX = f"client -k x -s tox:{'A' * 76}"
VIA = "client -k x --via cat"
PAIRS = {
    "server -k x --stdio --takeover": "--takeover has no effect with --stdio",
    "server -k x --stdio -mptcp": "--mptcp has no effect with --stdio",
    "server -k x --stdio --tox": "--tox has no effect with --stdio",
    "server -k x --stdio -l :1": "not allowed with argument",
    "server -k x --tox -l :1": "--listen has no effect with --tox",
    "server -k x --tox -mptcp": "--mptcp has no effect with --tox",
    "server -k x --tox --congestion-control bbr": "--congestion-control has no effect with --tox",
    "server -k x --tox-dir /var/lib/ttun": "--tox-dir has no effect without --tox",
    "server -k x --tox-nodes nodes": "--tox-nodes has no effect without --tox",
    "server -k x --hook-user root": "--hook-user has no effect without --up or --down",
    "client -k x -s h --hook-user root": "--hook-user has no effect without --up or --down",
    "client -k x -s h --wire v1 --rekey 5": "--rekey has no effect with --wire v1",
    "client -k x -s h --tox-nodes nodes": "--tox-nodes has no effect without -s tox:ID",
    f"{VIA} --tox-nodes nodes": "--tox-nodes has no effect without -s tox:ID",
    f"{TOX} -mptcp": "--mptcp has no effect with -s tox:ID",
    f"{TOX} --congestion-control bbr": "--congestion-control has no effect with -s tox:ID",
    f"{TOX} --proxy http://h:1": "--bind do not work with tox:",
    f"{TOX} --bind %lo": "--bind do not work with tox:",
    f"{VIA} --congestion-control bbr": "--congestion-control has no effect with --via",
    f"{VIA} --proxy http://me:xyzzy@h:1": "--proxy has no effect with --via",
    f"{VIA} --bind %lo": "--bind has no effect with --via",
    f"{VIA} -mptcp": "--mptcp has no effect with --via",
    f"{VIA} -s a -s b": "--via takes one -s",
    f"{TOX} --via cat": "--via takes one -s, which is no tox:ID",
    "client -k x --via=": "--via: the command is empty",
}


@pytest.mark.parametrize("line", PAIRS)
def test_an_option_without_effect_is_refused(line: str) -> None:
    done = run_program(*line.split())
    err = done.stderr
    assert (done.returncode, done.stdout) == (2, "")
    assert err.count("\n") == 1
    assert PAIRS[line] in err
    assert "xyzzy" not in err
    assert re.search(r"; see ttun.* -h$", err.strip())
