"""The command line of ``ttun tox``, which is tuntox's, and the rules of a server."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from tunnel import PROGRAM

from ttun.address import Address
from ttun.commands.parser import Parser
from ttun.errors import TtunError, UsageError
from ttun.tox import instance, nodes, options, rules, toxcore, transport
from ttun.tox.options import Forward, Options

ID = "1B9A5FD500A45D4719DA3EA9535A4913AC4763811D90F243A32458698BDEDD0121206484ECB5"


def read(*arguments: str, **environment: str) -> Options:
    return options.read(Parser(prog="ttun tox"), arguments, environment)


def test_without_anything_it_is_a_server_as_tuntox_is() -> None:
    asked = read()
    assert not asked.client
    assert asked.directory == Path("/etc/tuntox")
    assert not asked.daemonize
    assert asked.secret is None


@pytest.mark.parametrize(
    "line",
    [  # of Tuntox's README and FAQ
        "",
        "-C /path/to/the/config/directory/",
        "-z",
        f"-i {ID} -L 2222:127.0.0.1:22",
        f"-i {ID} -W localhost:22",
        f"-W 127.0.0.1@9876 -i {ID}",
        f"-W 127.0.0.1:22 -d -i {ID}",
        f"-d -d -d -i {ID} -p",
        f"-i {ID} -p",
        "-s yourpassword",
        f"-s yourpassword -i {ID} -L 2222:127.0.0.1:22",
        "-f rules",
        f"-i {ID} -D 1080",
    ],
)
def test_a_command_line_of_the_original_is_understood(line: str) -> None:
    asked = read(*line.split())
    assert asked.client == any(option in line for option in ("-L", "-W", "-p", "-D"))


def test_values_may_be_joined_and_begin_with_a_dash() -> None:
    asked = read("-dds", "-secret", f"-i{ID}", "-L2222:h:22")
    assert asked.secret == b"-secret"
    assert asked.debug == 2
    assert asked.ids == [ID]
    assert asked.forwards == [Forward(None, 2222, ("h", 22))]


@pytest.mark.parametrize(
    ("text", "forward"),
    [
        ("2222:127.0.0.1:22", Forward(None, 2222, ("127.0.0.1", 22))),
        ("2222@127.0.0.1@22", Forward(None, 2222, ("127.0.0.1", 22))),
        ("2222:[2001:db8::1]:22", Forward(None, 2222, ("2001:db8::1", 22))),
        ("*:2222:h:22", Forward("", 2222, ("h", 22))),
        (":2222:h:22", Forward("", 2222, ("h", 22))),
        ("[::1]:2222:h:22", Forward("::1", 2222, ("h", 22))),
        ("192.0.2.1:0:h:22", Forward("192.0.2.1", 0, ("h", 22))),
    ],
)
def test_a_forward(text: str, forward: Forward) -> None:
    assert read("-i", ID, "-L", text).forwards == [forward]


@pytest.mark.parametrize(
    "text", ["", "22", "22:h", "x:h:22", "22:h:0", "22:h:65536", "22::22", f"22:{256 * 'h'}:22"]
)
def test_what_is_no_forward(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read("-i", ID, "-L", text)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_socks5_port_and_a_bare_d() -> None:
    asked = read("-i", ID, "-D", "1080", "-D", "*:1081")
    assert asked.forwards == [Forward(None, 1080, None), Forward("", 1081, None)]
    assert not asked.daemonize
    background = read("-D")
    assert background.daemonize
    assert background.syslog
    assert not background.client


def test_the_secret_comes_from_the_option_or_the_environment() -> None:
    assert read(TUNTOX_SHARED_SECRET="of the environment").secret == b"of the environment"
    assert read("-s", "given", TUNTOX_SHARED_SECRET="other").secret == b"given"
    assert read("-s", "x" * 920).secret == b"x" * 920
    with pytest.raises(UsageError, match="shared secret"):
        read(TUNTOX_SHARED_SECRET="x" * 921)


def test_an_empty_secret_of_the_environment_is_none_and_behind_s_a_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert read(TUNTOX_SHARED_SECRET="").secret is None
    assert read("-s", "given", TUNTOX_SHARED_SECRET="").secret == b"given"
    with pytest.raises(UsageError, match="shared secret is empty"):
        read("-s", "")
    monkeypatch.setenv("TUNTOX_SHARED_SECRET", "")
    assert transport.Dialer(ID)._secret is None


@pytest.mark.parametrize(
    ("value", "proxy"),
    [
        ("socks5://127.0.0.1:9050", instance.Proxy(toxcore.PROXY_SOCKS5, "127.0.0.1", 9050)),
        ("SOCKS5://h:1/", instance.Proxy(toxcore.PROXY_SOCKS5, "h", 1)),
        ("socks5h://h:1", instance.Proxy(toxcore.PROXY_SOCKS5, "h", 1)),
        ("socks://127.0.0.1:9050/", instance.Proxy(toxcore.PROXY_SOCKS5, "127.0.0.1", 9050)),
        ("Socks://h:1", instance.Proxy(toxcore.PROXY_SOCKS5, "h", 1)),
        (
            " socks://[2001:db8::1]:1080 \n",
            instance.Proxy(toxcore.PROXY_SOCKS5, "2001:db8::1", 1080),
        ),
        ("http://192.0.2.1:80", instance.Proxy(toxcore.PROXY_HTTP, "192.0.2.1", 80)),
        ("HTTP://h:3128/path", instance.Proxy(toxcore.PROXY_HTTP, "h", 3128)),
        ("", None),
        (" ", None),
    ],
)
def test_a_proxy(value: str, proxy: instance.Proxy | None) -> None:
    assert read(ALL_PROXY=value).proxy == proxy
    assert read(all_proxy=value).proxy == proxy


def test_behind_a_proxy_there_is_no_relay_unless_asked_for() -> None:
    """It listened on all addresses, beside the proxy that all traffic is to go through."""
    assert read(ALL_PROXY="socks5://h:1").relay_port == 0
    assert read("-t", "443", ALL_PROXY="socks5://h:1").relay_port == 443
    assert read().relay_port is None


def test_behind_a_proxy_no_name_of_a_node_is_looked_up(tmp_path: Path) -> None:
    node = {"port": 33445, "public_key": "00" * 32}
    file = tmp_path / "nodes.json"
    file.write_text(json.dumps({"nodes": [{**node, "ipv4": "node.invalid", "ipv6": "-"}]}))
    done = subprocess.run(
        [*PROGRAM, "tox", "-t", "0", "-s", "x", "-C", str(tmp_path), "-b", str(file)],
        capture_output=True, text=True, timeout=20, check=False,
        env={**os.environ, "ALL_PROXY": "socks5h://127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "behind a proxy" in done.stderr
    file.write_text(
        json.dumps({"nodes": [{**node, "ipv4": "node.invalid", "ipv6": "2001:db8::1"}]})
    )
    assert [each.host for each in nodes.load(file, proxied=True)] == ["2001:db8::1"]


@pytest.mark.parametrize("value", ["h:1", "ftp://h:1", "socks5://h", "socks5://u:p@h:1"])
def test_what_is_no_proxy(value: str) -> None:
    with pytest.raises(UsageError):
        read(ALL_PROXY=value)


@pytest.mark.parametrize("scheme", ["socks4", "SOCKS4a", "https"])
def test_a_proxy_that_toxcore_cannot_use_is_named(scheme: str) -> None:
    with pytest.raises(UsageError, match=f"{scheme.lower()} is not supported"):
        read(ALL_PROXY=f"{scheme}://h:1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-L", "1:h:1"], "one -i"),
        (["-p"], "one -i"),
        (["-p", "-i", ID, "-i", ID], "one -i"),
        (["-i", ID, "-W", "h:1", "-L", "1:h:1"], "-W"),
        (["-i", ID, "-p", "-D", "1080"], "-p"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(*arguments)


def test_ports_of_tox() -> None:
    assert read("-t", "0", "-u", "40000:40010").udp_ports == (40000, 40010)
    assert read("-t", "0").relay_port == 0
    assert read().relay_port is None
    for wrong in (["-t", "65536"], ["-u", "0:5"], ["-u", "a:b"]):
        with pytest.raises(SystemExit):
            read(*wrong)


def test_udp_ports_of_no_choice_are_where_others_on_the_network_look() -> None:
    """toxcore's local discovery (friend_connection.c) sends to 33445 and the next hundred alone."""
    ranges = {instance.any_udp_ports(anywhere=False) for _ in range(1000)}
    assert len(ranges) > 1
    assert all(33445 <= first < last <= 33545 for first, last in ranges)
    assert any(instance.any_udp_ports(anywhere=True)[1] > 33545 for _ in range(1000))


def test_a_mistake_is_one_line_and_code_2() -> None:
    for arguments in (["-x"], ["-i", "ABCD", "-p"], ["-p"], ["-i", ID[:-1] + "0", "-p"]):
        done = subprocess.run(
            [*PROGRAM, "tox", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, arguments
        assert done.stderr.splitlines()[-1].startswith("ttun"), done.stderr
        assert "Traceback" not in done.stderr


def without_library(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    hidden = (
        "import ttun.tox.toxcore as t; t.LIBRARY = 'libtoxcore.so.0';"
        f"import sys; from ttun.cli import main; sys.exit(main(['tox', *{arguments!r}]))"
    )
    return subprocess.run(
        [PROGRAM[0], "-c", hidden], capture_output=True, text=True, check=False,
        cwd=Path(PROGRAM[1]).parent, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("-L", b"2222:\xff\xfe:22"),
        ("-L", b"*:2222:h\xe4:22"),
        ("-W", b"\xff\xfe:22"),
        ("-W", b"h\xe4@1"),
    ],
)
def test_a_host_that_is_not_utf8_is_bad_usage(option: str, value: bytes) -> None:
    """It ended the client's loop when the first connection was forwarded."""
    done = subprocess.run(
        [*PROGRAM, "tox", "-t", "0", "-i", ID, option, value], capture_output=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.decode().splitlines()
    assert re.search(r"the host .*\\x(ff|fe|e4) is not valid UTF-8", line), line


def test_a_proxy_whose_host_is_not_utf8_is_bad_usage() -> None:
    with pytest.raises(UsageError, match="is not valid UTF-8"):
        read(ALL_PROXY=os.fsdecode(b"socks5://h\xff:1080"))


def test_a_missing_library_is_one_line() -> None:
    done = without_library()
    assert done.returncode == 1
    assert "apt install libtoxcore2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("MemoryError", "ttun: not enough memory"),
        (
            "OSError(28, 'No space left on device')",
            "ttun: cannot write the output: No space left on device",
        ),
    ],
)
def test_a_lack_that_ends_the_loop_is_named(tmp_path: Path, raised: str, said: str) -> None:
    """As where the disk is full that takes the line of -p. It was an internal error."""
    ending = (
        f"import sys; import ttun.tox.server as s\ndef end(*_): raise {raised}\n"
        "s.ForwardingServer.on_tick = end\nfrom ttun.cli import main\n"
        f"sys.exit(main(['tox', '-t', '0', '-s', 'x', '-C', {str(tmp_path)!r}]))"
    )
    done = subprocess.run(
        [PROGRAM[0], "-c", ending], capture_output=True, text=True, check=False, timeout=60,
        cwd=Path(PROGRAM[1]).parent,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == said


def test_a_client_may_name_its_server(tmp_path: Path) -> None:
    """A name is as good as an ID: what then is missing is the library that was hidden."""
    (tmp_path / "ttun").mkdir()
    (tmp_path / "ttun" / "hosts").write_text(f"home    {ID}\n")
    done = without_library("-i", "home", "-p", XDG_CONFIG_HOME=str(tmp_path))
    assert (done.returncode, "apt install libtoxcore2" in done.stderr) == (1, True), done.stderr
    done = without_library("-i", "work", "-p", XDG_CONFIG_HOME=str(tmp_path))
    assert (done.returncode, "nor a name in" in done.stderr) == (2, True), done.stderr


def test_called_as_tuntox_it_is_ttun_tox(tmp_path: Path) -> None:
    link = tmp_path / "tuntox"
    link.symlink_to(PROGRAM[1])
    calls = [[PROGRAM[0], str(link)]]
    if (Path(PROGRAM[1]).parent / ".venv").exists():
        calls.append([str(link)])  # which goes on in another Python
    for call in calls:
        for arguments, code, said in (
            (["-h"], 0, "-L [BIND:]PORT:HOST:PORT"),
            (["-p"], 2, "a client needs one -i"),
            (["-p", "-i", ID[:-1] + "0"], 2, "wrong checksum"),
            (["server"], 2, "see ttun tox -h"),
        ):
            done = subprocess.run([*call, *arguments], capture_output=True, text=True, check=False)
            assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done


def test_help_and_version_and_nothing_of_tox_without_the_command() -> None:
    for arguments, said in ((["-h"], "-L [BIND:]PORT:HOST:PORT"), (["-V"], "ttun ")):
        done = subprocess.run(
            [*PROGRAM, "tox", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        assert said in done.stdout
    code = (
        "import sys, ttun.cli; ttun.cli.build_parser(); print(any('tox' in m for m in sys.modules))"
    )
    root = Path(PROGRAM[1]).parent
    done = subprocess.run(
        [PROGRAM[0], "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("host", "port", "is_allowed"),
    [
        ("1.2.3.4", 22, True),
        ("1.2.3.4", 23, False),
        ("127.0.0.1", 80, True),
        ("anything", 6667, True),
        ("anything", 6668, False),
        ("2.3.4.5", 1, True),
        ("2001:db8::1", 443, True),
        ("1.2.3.4.evil", 22, False),
    ],
)
def test_rules(tmp_path: Path, host: str, port: int, is_allowed: bool) -> None:
    file = tmp_path / "rules"
    file.write_text(
        "# a comment\n\n1.2.3.4:22\n127.0.0.1:80 # another\n*:6667\n2.3.4.5:0\n"
        "nonsense\n[2001:db8::1]:443\nh:65536\n"
    )
    read_rules = rules.load(file)
    assert len(read_rules) == 5
    assert rules.allowed(read_rules, host, port) == is_allowed


def test_no_rules_allow_nothing_and_no_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    assert not rules.allowed(rules.load(tmp_path / "empty"), "h", 1)
    with pytest.raises(TtunError, match="cannot read the rules"):
        rules.load(tmp_path / "missing")


@pytest.mark.parametrize(
    "text",
    ["h", ":1", "h:", "h:x", "h:0", "h:99999", "2001:db8::1:22", "::\r:22", 256 * "h\r" + ":22"],
)
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        rules.parse_target(text)
    assert len(str(raised.value).splitlines()) == 1
    assert rules.parse_target("[::1]@22") == Address("::1", 22)
