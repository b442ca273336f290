"""The library: the examples of docs/library.md run and pass mypy; invalid use is rejected."""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from ttun._codec import lib
from tunnel import CLIENT, ROOT, SERVER, Bench

import ttun
from ttun import handshake
from ttun.cipher import CIPHERS
from ttun.commands import answer
from ttun.flag import Flag
from ttun.handshake import Terms
from ttun.peer import Host
from ttun.pending import Pending
from ttun.settings import MAX_MTU

PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.S)
AS_SERVER, IN_ASYNCIO, OVER_A_SOCKETPAIR, AS_JSON = PROGRAMS
MYPY = shutil.which("mypy", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(MYPY is None, reason="no mypy: make lint fetches it")
def test_programs_pass_a_type_checker_and_wrong_ones_do_not(tmp_path: Path) -> None:
    wrong = {
        'Unexpected keyword argument "mtuu"': AS_SERVER.replace("listen=", "mtuu=3, listen="),
        '"Callable[[int], None]"; expected': AS_SERVER.replace("peer: str", "peer: int"),
        '"str"; expected "bytes"': IN_ASYNCIO.replace('b"secret"', '"secret"'),
    }
    for number, program in enumerate([*PROGRAMS, *wrong.values()]):
        (tmp_path / f"program{number}.py").write_text(program)
    done = subprocess.run(
        [str(MYPY), "--strict", *tmp_path.glob("*.py")],  # with the cache that make lint leaves
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(said) == len(wrong), done.stdout
    for number, what in enumerate(wrong, len(PROGRAMS)):
        assert any(f"program{number}.py" in line and what in line for line in said), done.stdout


@pytest.mark.hosts
def test_a_server_and_a_client_in_asyncio(plain: Bench) -> None:
    server = plain.helper(SERVER, sys.executable, "-c", AS_SERVER, says="port 20203")
    said = plain.run(CLIENT, sys.executable, "-c", IN_ASYNCIO)
    assert said == "connected to 192.0.2.1:20203\n"
    assert server.stdout is not None
    assert server.stdout.readline().startswith("hello 192.0.2.2:")


@pytest.mark.hosts
def test_over_a_socketpair(plain: Bench) -> None:
    said = plain.run(SERVER, sys.executable, "-c", OVER_A_SOCKETPAIR)
    assert said == "connected to the client over a socket\n"


def test_its_status_as_json_is_that_of_ttun_show() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_JSON], cwd=ROOT, capture_output=True, text=True, check=True
    )
    status = json.loads(done.stdout)
    assert status.keys() == answer.FIELDS.keys() - {"format", "pid", "netns"}
    assert status["role"] == "server" and status["peer"] is None
    assert status["totals"]["uplink_bytes"] == 0, "an object, as the page of the status has it"


@pytest.mark.hosts
def test_a_client_ends_with_the_socket_that_it_was_given(plain: Bench) -> None:
    program = """if True:
        import socket, ttun
        ours, theirs = socket.socketpair()
        client = ttun.Client(b"secret", server=ttun.GivenSocket(ours, "a pair"))
        client.start()
        theirs.close()
        try:
            client.wait(20)
        except ttun.TtunError as error:
            print(error)
    """
    said = plain.run(CLIENT, sys.executable, "-c", program)
    assert said == "connection over a pair ended (it cannot be reopened)\n"


def test_too_many_given_sockets_stay_the_callers() -> None:
    given = ttun.GivenSockets()
    pairs = [socket.socketpair() for _ in range(given.MOST + 1)]
    assert [given.give(ours, "x") for ours, _ in pairs] == [True] * given.MOST + [False]
    assert given.accept().sock is pairs[0][0]
    given.close()
    assert [ours.fileno() >= 0 for ours, _ in pairs] == [True, *[False] * (given.MOST - 1), True]
    assert not given.give(pairs[-1][0], "x"), "it is closed"
    assert pairs[-1][0].fileno() >= 0
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_what_is_no_plain_socket_is_refused_and_stays_the_callers() -> None:
    """It once ended the server, or the session: the codec bypasses what Python wraps."""
    ours, theirs = socket.socketpair()
    wrapped = ssl.create_default_context().wrap_socket(
        ours, do_handshake_on_connect=False, server_hostname="x"
    )
    datagrams, others = socket.socketpair(type=socket.SOCK_DGRAM)
    for wrong, says in (
        (wrapped, "must not be a TLS one"),
        ("x", "must be socket, not str"),
        (datagrams, "must be a stream socket"),
    ):
        for take in (ttun.GivenSocket, lambda sock: ttun.GivenSockets().give(sock, "x")):
            with pytest.raises(ttun.UsageError, match=says):
                take(wrong)  # type: ignore[arg-type]
    for sock in (wrapped, theirs, datagrams, others):
        assert sock.fileno() >= 0
        sock.close()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("mtu", "1280", "mtu must be int, not str"),
        ("mtu", True, "mtu must be int, not bool"),
        ("offload", 1, "offload must be bool, not int"),
        ("cipher", b"aes-256-gcm", "cipher must be str or None, not bytes"),
        ("routes", ["192.0.2.0/24"], "a route must be IPv4Network or IPv6Network, not str"),
        ("limits", 60, "limits must be Limits, not int"),
        ("limits", ttun.Limits(seconds=121), "must be above 0 and at most 120 seconds"),
        ("limits", ttun.Limits("60"), "a limit must be int or float, not str"),  # type: ignore[arg-type]
        ("limits", ttun.Limits(bytes=0), "a limit of 0 bytes must be above 0"),
        ("listen", 20203, "listen must be str or Listener, not int"),
        ("takeover", None, "takeover must be bool, not NoneType"),
        ("on_connected", "echo", "a callback must be callable, not str"),
        pytest.param("mtu", 10**5000, "mtu is out of range", id="huge"),
        ("limits", ttun.Limits(10**5000), "a limit is out of range"),
        ("listen", "\ud800", "listen is not valid Unicode text"),
    ],
)
def test_wrong_values_are_refused_at_once(option: str, value: object, says: str) -> None:
    with pytest.raises(ttun.UsageError, match=re.escape(says)):
        ttun.Server(b"secret", **{option: value})  # type: ignore[arg-type]


class Mine(ttun.Dialer, ttun.Listener):
    """A program's own: it hands over one socket."""

    name = "mine"

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def candidates(self, stop: Flag) -> list[ttun.Candidate]:
        return [ttun.Candidate("mine", None, lambda stop: self.sock)]

    def fileno(self) -> int:
        return self.sock.fileno()

    def accept(self) -> ttun.Arrival:
        return ttun.Arrival(self.sock, "mine", "mine")

    def kind(self, sock: socket.socket) -> str:
        raise LookupError("kind")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("proxy", b"http://192.0.2.1:3128", "proxy must be str or None, not bytes"),
        ("proxy", "http://\ud800@192.0.2.1:3128", "proxy is not valid Unicode text"),
        ("bind", Path("/"), "bind must be str or None, not PosixPath"),
        ("bind", "%\ud800", "bind is not valid Unicode text"),
        ("users", [10**5000], "a user is out of range"),
    ],
)
def test_so_are_those_of_a_client(option: str, value: object, says: str) -> None:
    with pytest.raises(ttun.UsageError, match=re.escape(says)):
        ttun.Client(b"secret", server="192.0.2.1", **{option: value})  # type: ignore[arg-type]


def test_names_and_later_keys_are_checked_too() -> None:
    ours, theirs = socket.socketpair()
    nameless = Mine(ours)
    nameless.name = None  # type: ignore[assignment]
    server = ttun.Server(b"secret")
    for use in (
        lambda: ttun.Client(b"secret", server=nameless),
        lambda: ttun.Server(b"secret", listen=nameless),
        lambda: ttun.GivenSocket(ours, 5),  # type: ignore[arg-type]
        lambda: ttun.GivenSockets().give(ours, b"x"),  # type: ignore[arg-type]
        lambda: ttun.GivenSockets().give(ours, "x", 5),  # type: ignore[arg-type]
        lambda: server.use_keys(None),  # type: ignore[arg-type]
        lambda: server.use_keys({b"x"}),  # type: ignore[arg-type]
    ):
        with pytest.raises(ttun.UsageError, match="must be"):
            use()
    with ours, theirs:
        assert ours.fileno() >= 0, "it stays the caller's"


def test_a_list_that_changes_later_changes_no_settings() -> None:
    networks = [ipaddress.ip_network("10.2.0.0/16")]
    settings = ttun.Settings(routes=networks)
    networks.append("10.3.0.0/16")  # type: ignore[arg-type]
    assert settings.routes == (ipaddress.ip_network("10.2.0.0/16"),)
    hash(settings)


@pytest.mark.parametrize("what", ["datagrams", "tls", "kind"])
def test_a_socket_of_no_use_is_closed(what: str) -> None:
    """Nobody else can: the program has handed it over."""
    for use in (dials, accepts):
        ours, theirs = socket.socketpair()
        raised: type[Exception] = ttun.UsageError
        if what == "datagrams":
            ours.close()
            ours = socket.socket(type=socket.SOCK_DGRAM)
        elif what == "tls":
            ours = ssl.create_default_context().wrap_socket(
                ours, do_handshake_on_connect=False, server_hostname="x"
            )
        else:
            raised = LookupError
        with theirs, pytest.raises(raised):
            use(Mine(ours))
        assert ours.fileno() == -1


def test_what_a_dialer_raises_keeps_nothing_else_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch of the device stayed open."""

    def fail() -> None:
        raise LookupError("close")

    mine = Mine(socket.socket())
    monkeypatch.setattr(mine, "close", fail)
    client = ttun.Client(b"secret", server=mine)
    client._watch = watch = Mock()
    with mine.sock, pytest.raises(LookupError):
        client._release()
    watch.close.assert_called_once_with()


def dials(mine: Mine) -> None:
    client = ttun.Client(b"secret", server=mine)
    client._shake_hands(mine.sock, mine.candidates(Flag())[0])


def accepts(mine: Mine) -> None:
    pending = Pending(Flag())
    pending._host = Host(mine, lambda: handshake.server(bytes(32), Terms()), lambda _: False, False)
    pending._accept()


def test_the_largest_mtu_is_what_fits_one_frame_of_the_codec() -> None:
    """They are listed separately, so that the command line works without the codec."""
    assert lib.TTUN_LENGTH_MAX - min(cipher.tag_size for cipher in CIPHERS.values()) == MAX_MTU


def test_a_wrong_key_is_not_shown() -> None:
    with pytest.raises(ttun.UsageError, match=r"^the key must be bytes, not str$"):
        ttun.Server("secret")  # type: ignore[arg-type]


def test_all_of_the_interface_is_there_and_is_shown() -> None:
    assert dir(ttun) == sorted(ttun.__all__)
    for name in ttun.__all__:
        assert getattr(ttun, name) is not None
    with pytest.raises(AttributeError):
        ttun.serve  # noqa: B018


def test_what_a_callback_raises_is_logged_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(peer: str) -> None:
        raise LookupError(f"no {peer}")

    ttun.Server(b"secret")._tell(fail, "friend")
    (record,) = caplog.records
    assert record.getMessage() == "callback failed: LookupError: no friend"
    assert record.exc_info is not None and record.exc_info[0] is LookupError


def test_without_a_handler_nothing_is_written() -> None:
    program = "import logging, ttun; logging.getLogger('ttun').error('unasked')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr == ""
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("ttun").handlers)
