"""From where a client dials, to which of several servers, and several addresses of one server."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import time
from collections.abc import Iterator

import pytest
from tunnel import CLIENT, SERVER, SERVER_ADDRESS, Bench, eventually

import ttun
from ttun import binding, tcp
from ttun.binding import Binding
from ttun.errors import TtunError, UsageError
from ttun.flag import Flag
from ttun.lab import netns
from ttun.lab.netns import LinkEnd

hosts = pytest.mark.hosts
SERVER6 = netns.IPV6[SERVER]
OURS4, OURS6 = "192.0.2.77", "2001:db8::77"  # of the client's host, besides the usual ones
ELSEWHERE = "192.0.2.99"  # where nobody is


@pytest.fixture
def more(plain: Bench) -> Iterator[Bench]:
    """The client's host has two more addresses."""
    given = [f"{OURS4}/24", f"{OURS6}/64"]
    for address in given:
        change(plain, "replace", address)
    yield plain
    for address in given:
        change(plain, "replace", address)
        change(plain, "del", address)


def change(bench: Bench, what: str, address: str) -> None:
    name = bench.pair.names[CLIENT]
    netns.ip("-n", name, "address", what, address, "dev", bench.pair.links[CLIENT])


# ---- --bind ----


@pytest.mark.parametrize(
    ("text", "family", "device"),
    [
        ("192.0.2.7", socket.AF_INET, None),
        ("2001:db8::7", socket.AF_INET6, None),
        ("[2001:db8::7]", socket.AF_INET6, None),
        ("fe80::1%eth0", socket.AF_INET6, None),
        ("%eth1", None, b"eth1"),
        ("%\udcff", None, b"\xff"),
    ],
)
def test_an_address_leaves_one_family_and_a_device_both(
    text: str, family: int | None, device: bytes | None
) -> None:
    found = Binding(text)
    assert (found.family, found.device, str(found)) == (family, device, f"--bind {text}")


@pytest.mark.parametrize("text", ["", "eth1", "%", "%sixteen-bytes-xx", "192.0.2.7:80", "%a\0b"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--bind"):
        Binding(text)
    with pytest.raises(UsageError, match="--bind"):
        ttun.Client(b"secret", server="192.0.2.1", bind=text)


@pytest.mark.parametrize("text", ["192.0.2.7", "fe80::1%nowhere0", "%nowhere0"])
def test_an_address_or_a_device_that_is_not_here_is_one_line(text: str) -> None:
    found = Binding(text)
    with socket.socket(found.family or socket.AF_INET) as sock, pytest.raises(OSError) as raised:
        found.apply(sock)
    number = raised.value.errno
    assert number in (errno.EADDRNOTAVAIL, errno.ENODEV)
    assert raised.value.strerror == f"--bind {text}: {binding.WHY[number]}"


def test_a_kernel_that_wants_root_for_a_device_says_so_in_one_line() -> None:
    class Old:
        def setsockopt(self, *_: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    with pytest.raises(PermissionError, match=r"--bind %eth1: Linux before 5\.7") as raised:
        Binding("%eth1").apply(Old())  # type: ignore[arg-type]
    assert binding.WHY[errno.EPERM] in str(raised.value)
    assert "--user root" not in str(raised.value), "root has no capability then either"


@pytest.mark.parametrize(
    ("bind", "tried"),
    [
        ("127.0.0.9", ["127.0.0.1"]),
        ("::1", ["::1"]),
        ("%lo", ["::1", "127.0.0.1"]),
        (None, ["::1", "127.0.0.1"]),
    ],
)
def test_only_addresses_of_the_family_are_tried(
    bind: str | None, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def both(host: str, port: int, *rest: object, **more: object) -> object:
        if host != "both.test":
            return real(host, port, *rest, **more)  # type: ignore[arg-type]
        return real("::1", port, type=socket.SOCK_STREAM) + real(
            "127.0.0.1", port, type=socket.SOCK_STREAM
        )

    monkeypatch.setattr(socket, "getaddrinfo", both)
    dialer = tcp.Dialer("both.test:1", None, "auto", bind)
    assert [each.address for each in dialer.candidates(Flag())] == tried
    assert dialer.look_up(Flag()) == tried


@pytest.mark.parametrize(
    ("to", "bind", "family"), [("::1", "127.0.0.1", 4), ("127.0.0.1", "::", 6)]
)
def test_a_server_without_an_address_of_the_family_is_one_line(
    to: str, bind: str, family: int
) -> None:
    dialer = tcp.Dialer(str(tcp.Address(to, 1)), None, "auto", bind)
    for find in (dialer.candidates, dialer.look_up):
        with pytest.raises(OSError, match=f"^{to} has no IPv{family} address .--bind {bind}.$"):
            find(Flag())


@hosts
@pytest.mark.parametrize("wire", ["x1", "v1"])
@pytest.mark.parametrize(
    ("bind", "to", "seen"),
    [
        (OURS4, SERVER_ADDRESS, OURS4),
        (OURS6, f"[{SERVER6}]:20203", f"[{OURS6}]"),
        ("%vclient", SERVER_ADDRESS, netns.IPV4[CLIENT]),
    ],
)
def test_a_client_dials_from_where_it_is_told(
    more: Bench, bind: str, to: str, seen: str, wire: str
) -> None:
    """After privileges are dropped, too: it is back after its session ended."""
    server = more.server("--takeover", "--wire", wire)
    client = more.client("--bind", bind, "--wire", wire, to=to)
    client.says("authenticated")
    server.says(f"peer {seen}:")
    more.answers()
    server.stop()
    server = more.server("--wire", wire)
    client.says("authenticated", 2)
    server.says(f"peer {seen}:")


@hosts
def test_an_address_that_goes_away_is_a_line_and_the_client_waits_for_it(more: Bench) -> None:
    more.server("--takeover")
    client = more.client("--bind", OURS4)
    client.says("authenticated")
    change(more, "del", f"{OURS4}/24")
    log = client.says(f"--bind {OURS4}: not an address of this machine", 2)
    assert "reconnecting in" in log
    change(more, "replace", f"{OURS4}/24")
    client.says("authenticated", 2)
    more.answers()


@hosts
def test_a_device_that_comes_late_is_a_line_and_the_client_waits_for_it(plain: Bench) -> None:
    name = plain.pair.names[CLIENT]
    plain.server()
    client = plain.client("--bind", "%late0")
    client.says("cannot connect to 192.0.2.1:20203: --bind %late0: no such device")
    netns.ip("-n", name, "link", "set", "vclient", "down")
    netns.ip("-n", name, "link", "set", "vclient", "name", "late0", "up")
    try:
        client.says("authenticated")
        plain.answers()
    finally:
        netns.ip("-n", name, "link", "set", "late0", "down")
        netns.ip("-n", name, "link", "set", "late0", "name", "vclient", "up")
        address = f"{netns.IPV6[CLIENT]}/64"
        netns.ip("-n", name, "address", "replace", address, "dev", "vclient", "nodad")


@hosts
def test_a_device_that_goes_away_and_returns_is_used_again(plain: Bench) -> None:
    server, name = plain.server("--takeover"), plain.pair.names[CLIENT]

    def link() -> None:
        plain.pair.link(
            LinkEnd(SERVER, "wserver", ["198.51.100.1/24"]),
            LinkEnd(CLIENT, "wclient", ["198.51.100.2/24"]),
        )

    link()
    client = plain.client("--bind", "%wclient", to="198.51.100.1")
    try:
        for times in (1, 2):
            client.says("authenticated", times, seconds=60)
            plain.answers()
            netns.ip("-n", name, "link", "delete", "wclient")
            client.says("--bind %wclient: no such device", times)
            link()
        client.says("authenticated", 3, seconds=60)
        plain.answers()
        assert server.log().count("peer 198.51.100.2:") >= 3
        assert client.stop() == 0
    finally:
        netns.ip("-n", name, "link", "delete", "wclient")


@hosts
def test_a_device_is_outside_of_every_route_of_ours(plain: Bench) -> None:
    """The connection cannot go into the tunnel: it may be the way to everywhere."""
    plain.server()
    client = plain.client("--bind", "%vclient", "--route", "192.0.2.0/25")
    client.says("authenticated")
    client.stop()
    client = plain.client("--bind", netns.IPV4[CLIENT], "--route", "192.0.2.1/32")
    assert client.ended() == 2


@hosts
def test_binding_is_for_tcp(plain: Bench) -> None:
    client = plain.start(CLIENT, "client", "-k", "secret", "-s", f"tox:{'A' * 76}", "--bind", "%lo")
    assert client.ended() == 2
    assert "--bind do not work with tox:" in client.log()


# ---- several servers ----


@hosts
def test_the_next_server_is_dialled_when_one_fails_and_the_first_again_after_the_last(
    plain: Bench,
) -> None:
    """A dial that fails, a name that is unknown, a handshake that fails: each is a reason."""
    wrong = plain.server("-l", ":1", key="another")
    right = plain.server("-l", ":3", "--dev", "other0")
    client = plain.client(
        "-s", "none.invalid", "-s", "192.0.2.1:1", "-s", "192.0.2.1:3", to="192.0.2.1:2"
    )
    log = client.says("peer 192.0.2.1:3 authenticated", 1, 60)
    places = [
        log.index("cannot connect to 192.0.2.1:2: Connection refused"),
        log.index("cannot connect to none.invalid:20203: "),
        log.index("handshake with 192.0.2.1:1 failed"),
        log.index("peer 192.0.2.1:3 authenticated"),
    ]
    assert places == sorted(places)
    assert "reconnecting" not in log, "a round is whole before there is a wait"
    eventually(lambda: client.status()["peer"] == "192.0.2.1:3", "its session is recorded")
    right.stop()
    wrong.stop()
    # It begins with the last one, and goes round.
    log = client.says("cannot connect to 192.0.2.1:1:")[len(log) :]
    assert log.index("to 192.0.2.1:3:") < log.index("to 192.0.2.1:2:") < log.index("to none.inv")
    plain.server("-l", ":2")
    client.says("peer 192.0.2.1:2 authenticated", 1, 60)
    plain.answers()


@hosts
def test_a_round_of_servers_is_whole_and_only_then_is_there_a_wait(plain: Bench) -> None:
    """It once broke off after each server with «deque mutated during iteration; retrying in 1 s»,
    so the back-off began anew each time and never exceeded four seconds."""
    client = plain.client("-s", "192.0.2.1:1", "-s", "192.0.2.1:3", to="192.0.2.1:2")
    log = client.says("reconnecting in", times=3)
    assert "retrying" not in log
    for number, rounds in enumerate(log.split("reconnecting in")[:3]):
        assert rounds.count("cannot connect to 192.0.2.1:") == 3, number


@hosts
def test_a_client_with_routes_starts_when_one_of_its_names_is_known(plain: Bench) -> None:
    plain.server()
    client = plain.client("-s", SERVER_ADDRESS, "--route", "203.0.113.0/24", to="none.invalid")
    client.says(f"peer {SERVER_ADDRESS}:20203 authenticated", 1, 60)


@pytest.mark.parametrize("given", [[], ()])
def test_no_server_and_no_address_to_listen_on_are_refused(given: object) -> None:
    with pytest.raises(UsageError, match="server is empty"):
        ttun.Client(b"secret", server=given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="listen is empty"):
        ttun.Server(b"secret", listen=given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [["h", 1], [b"h"], [None]])
def test_each_of_several_has_to_be_one(given: list[object]) -> None:
    with pytest.raises(UsageError, match="server must be str or Dialer, not"):
        ttun.Client(b"secret", server=given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="listen must be str"):
        ttun.Server(b"secret", listen=given)  # type: ignore[arg-type]


# ---- several addresses to listen on ----


def opened(*addresses: str) -> tcp.Listener:
    listener = tcp.Listener(addresses, None, "auto")
    try:
        listener.open(Flag())
    except BaseException:
        listener.close()
        raise
    return listener


def test_a_listener_takes_all_of_its_addresses_in_turn_at_one_descriptor() -> None:
    listener = opened("127.0.0.1:0", "127.0.0.2:0", "127.0.0.1:0", "[::1]:0")
    with contextlib.closing(listener):
        ports = [int(port) for port in re.findall(r":(\d+) ", listener.name)]
        places = list(zip(("127.0.0.1", "127.0.0.2", "::1"), ports))
        assert listener.port == ports[0]
        assert len(places) == len(ports) == 3, "one that is named twice is one"
        with contextlib.ExitStack() as stack:
            dialled = [stack.enter_context(socket.create_connection(x)) for x in places * 3]
            taken = [stack.enter_context(listener.accept().sock) for _ in dialled]
            first = [sock.getsockname()[:2] for sock in taken[:3]]
            assert sorted(first) == sorted(places), "none is served before the others"
            with pytest.raises(BlockingIOError):
                listener.accept()


def test_a_port_that_is_taken_is_one_line_that_says_which() -> None:
    with socket.create_server(("127.0.0.2", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(TtunError, match=f"^cannot listen on 127.0.0.2:{port}: ") as raised:
            opened("127.0.0.1:0", f"127.0.0.2:{port}")
        assert len(str(raised.value).splitlines()) == 1


@hosts
@pytest.mark.parametrize(
    ("given", "left"),
    [
        ([":7", "127.0.0.1:7", "[::1]:7", "0.0.0.0:7", "[::]:7"], "[::]:7"),
        (["192.0.2.1:7", ":7", "[::1]:8"], "[::]:7, [::1]:8"),
        (["[::]:7", "0.0.0.0:7", ":8"], "[::]:7, 0.0.0.0:7, [::]:8"),
    ],
)
def test_an_address_that_another_one_includes_is_not_taken_twice(
    plain: Bench, given: list[str], left: str
) -> None:
    """The kernel would say that the port is in use: by this server itself."""
    with contextlib.closing(plain.on(SERVER, lambda: opened(*given))) as listener:
        assert re.sub(r" \([^)]*\)", "", listener.name) == left


@hosts
def test_a_server_lets_clients_in_at_each_of_its_addresses(plain: Bench) -> None:
    arguments = ["-l", f"{SERVER_ADDRESS}:1", "-l", f"[{SERVER6}]:2"]
    server = plain.server(*arguments)
    assert f"listening on {SERVER_ADDRESS}:1 (tcp" in server.log()
    assert f", [{SERVER6}]:2 (tcp" in server.log()
    for to in (f"{SERVER_ADDRESS}:1", f"[{SERVER6}]:2"):
        client = plain.client(to=to)
        client.says("authenticated")
        plain.answers()
        client.stop()
        eventually(lambda: server.status()["peer"] is None, "it left")
    second = plain.start(
        SERVER, "server", "-k", "secret", "--dev", "other0", "-l", ":3", *arguments
    )
    assert second.ended() == 1
    assert f"cannot listen on {SERVER_ADDRESS}:1: " in second.log()


@hosts
def test_a_server_embedded_in_a_program_takes_several_too(plain: Bench) -> None:
    program = (
        "import ttun, sys\n"
        "with ttun.Server(b'secret', listen=['192.0.2.1:1', '192.0.2.1:2']) as server:\n"
        "    print(server.port, flush=True)\n"
        "    server.wait()\n"
    )
    plain.helper(SERVER, *netns.python("ttun.lab")[:1], "-c", program, says="1")
    client = plain.client(to="192.0.2.1:2")
    client.says("authenticated")
    began = time.monotonic()
    client.stop()
    assert time.monotonic() - began < 4
