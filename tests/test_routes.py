"""Custom device names, addresses and routes; a route that would capture the tunnel's connection."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import subprocess
import sys

import pytest
from tunnel import CLIENT, PROGRAM, SERVER, Bench, eventually

from ttun import Client
from ttun.cli import main
from ttun.errors import TtunError, UsageError
from ttun.lab import netns
from ttun.network import routes
from ttun.settings import SERVER as USUAL
from ttun.settings import Addresses, parse_network

ONCE = pytest.mark.parametrize("bench", ["x1"], indirect=True)


def test_addresses_that_are_given_replace_the_usual_ones() -> None:
    parsed = Addresses.parse(USUAL, local4="10.9.0.1")
    assert str(parsed.ipv4) == "10.9.0.1/30" and parsed.ipv6 == USUAL.ipv6
    parsed = Addresses.parse(USUAL, "10.9.0.1", "fd00::1/64", "10.8.0.2", "fd01::2")
    assert (str(parsed.ipv4), str(parsed.peer4)) == ("10.9.0.1/32", "10.8.0.2")
    assert (str(parsed.ipv6), str(parsed.peer6)) == ("fd00::1/64", "fd01::2")
    for wrong in ("10.9.0", "fd00::1", "10.9.0.1/33", ""):
        with pytest.raises(UsageError, match="invalid tunnel address"):
            Addresses.parse(USUAL, local4=wrong)


def test_a_network_with_host_bits_is_refused() -> None:
    assert str(parse_network("198.51.100.0/24")) == "198.51.100.0/24"
    with pytest.raises(UsageError, match="has host bits set"):
        parse_network("198.51.100.1/24")


@pytest.mark.hosts
@pytest.mark.parametrize(
    ("network", "peer", "caught"),
    [
        ("192.0.2.0/24", "192.0.2.1", True),  # as long as the link's own
        ("192.0.2.0/25", "192.0.2.1", True),
        ("192.0.2.0/25", "::ffff:192.0.2.1", True),
        ("0.0.0.0/0", "192.0.2.1", False),  # the link's own is longer
        ("0.0.0.0/0", "203.0.113.1", True),
        ("0.0.0.0/1", "198.51.100.1", False),
        ("198.51.100.0/24", "198.51.100.1", True),
        ("198.51.100.0/24", "203.0.113.1", False),
        ("10.0.0.0/8", "10.1.1.1", True),  # by the link's own route
        ("2001:db8::/65", "2001:db8::1", True),
        ("2000::/3", "2001:db8::1", False),
        ("2000::/3", "2001:db9::1", True),
        ("127.0.0.0/8", "127.0.0.1", False),
        ("::/0", "fe80::1%lo", False),
        ("0.0.0.0/0", "", False),
        ("0.0.0.0/0", "a.name", False),
    ],
)
def test_the_kernel_says_which_way_the_connection_would_go(
    plain: Bench, network: str, peer: str, caught: bool
) -> None:
    client = Client(b"key", server="192.0.2.1", routes=[parse_network(network)])

    def ask() -> TtunError | None:
        client.open()
        try:
            return client._why_not(peer)
        finally:
            client.stop()

    client._open = lambda: None  # type: ignore[method-assign]  # it would refuse 192.0.2.1
    why = plain.on(CLIENT, ask)
    said = f"--route {network} would route the tunnel's own connection to {peer} into the tunnel"
    assert why is None if not caught else str(why) == said


@pytest.mark.hosts
def test_a_route_of_another_program_is_not_called_an_option(plain: Bench) -> None:
    """As a routing daemon on the tunnel may add one."""
    client = plain.client()
    client.says("Connection refused")
    plain.run(CLIENT, "ip", "route", "add", "192.0.2.1", "dev", "ttun0")
    client.says(
        "cannot connect to 192.0.2.1:20203: a route of ttun0 (ip route get 192.0.2.1) would route "
        "the tunnel's own connection to 192.0.2.1 into the tunnel"
    )


@pytest.mark.hosts
def test_a_route_is_as_ip_route_makes_it(plain: Bench) -> None:
    networks = {"-4": "203.0.113.0/24", "-6": "2001:db8:f::/48"}
    server = plain.server(*(word for each in networks.values() for word in ("--route", each)))
    server.says("listening")
    for family, network in networks.items():
        shown = []
        for _ in range(2):
            (found,) = json.loads(plain.run(SERVER, "ip", "-j", family, "route", "show", network))
            shown.append({**found, "protocol": None})
            plain.run(SERVER, "ip", family, "route", "del", network, "dev", "ttun0")
            plain.run(SERVER, "ip", family, "route", "add", network, "dev", "ttun0")
        assert shown[0] == shown[1]


CLASHES = [
    ("192.0.2.0/24", "ttun0", "vclient"),
    ("192.0.2.128/25", "ttun0", None),  # this one is longer
    ("192.0.0.0/16", "ttun0", None),
    ("192.0.2.0/24", "vclient", None),  # its own
    ("10.1.1.0/30", "ttun0", None),
    ("2001:db8::/64", "ttun0", "vclient"),
    ("2001:db8::/64", "vclient", None),
    ("2001:db8::/65", "ttun0", None),
    ("fc11::/126", "ttun0", None),
]


@pytest.mark.hosts
def test_a_network_of_another_device_is_a_clash(plain: Bench) -> None:
    code = (
        "import sys; from ttun.network.routes import clash;"
        "from ttun.settings import parse_network;"
        "asked = zip(sys.argv[1::2], sys.argv[2::2]);"
        "print(*(clash(parse_network(network), device) for network, device in asked))"
    )
    asked = [word for network, device, _ in CLASHES for word in (network, device)]
    found = plain.run(CLIENT, sys.executable, "-c", code, *asked).split()
    assert found == [str(other) for _, _, other in CLASHES]


@pytest.mark.hosts
@ONCE
def test_two_tunnels_with_other_addresses_side_by_side(bench: Bench) -> None:
    """Each with its own name, addresses and route; all are removed when it stops."""
    ends = []
    for n in (1, 2):
        port = str(20300 + n)
        first, second = f"10.9.{n}.1", f"10.9.{n}.2"
        ours = ["--dev", f"site{n}", "--local4", first, "--peer4", second]
        ours += ["--local6", f"fd0{n}::1", "--peer6", f"fd0{n}::2"]
        ends.append(bench.server("-l", f":{port}", *ours, "--route", f"198.51.{n}.0/24"))
        theirs = ["--dev", f"site{n}", "--local4", second, "--peer4", first]
        theirs += ["--local6", f"fd0{n}::2", "--peer6", f"fd0{n}::1"]
        netns.ip("-n", bench.pair.names[CLIENT], "address", "add", f"198.51.{n}.1/32", "dev", "lo")
        ends.append(bench.client(*theirs, to=f"192.0.2.1:{port}"))
        ends[-1].says("authenticated")
        for address in (second, f"fd0{n}::2", f"198.51.{n}.1"):
            eventually(lambda to=address: bench.ping(SERVER, to) == 1, f"ping {address}")
        netns.ip("-n", bench.pair.names[CLIENT], "address", "del", f"198.51.{n}.1/32", "dev", "lo")
    for end in ends:
        assert end.stop() == 0
    for host in (SERVER, CLIENT):
        table = json.loads(netns.ip("-n", bench.pair.names[host], "-json", "route", "show"))
        assert [route["dst"] for route in table] == ["192.0.2.0/24"]


def test_the_last_address_alone_is_a_clash_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    only = [routes.Route(ipaddress.IPv4Network("10.1.1.3/32"), "eth9")]
    monkeypatch.setattr(routes, "ipv4_routes", lambda: only)
    assert routes.clash(ipaddress.IPv4Network("10.1.1.0/30"), "ttun0") == "eth9"
    assert routes.clash(ipaddress.IPv4Network("10.1.1.4/30"), "ttun0") is None


@pytest.mark.parametrize(
    ("flags", "advertised"),
    [("00450003", True), ("00040001", True), ("00000001", False), ("80200001", False)],
)
def test_a_route_of_an_advertisement_is_told_by_its_flags(
    flags: str, advertised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of /proc/net/ipv6_route."""
    line = f"20010db8{'0' * 24} 40 {'0' * 32} 00 {'0' * 32} 00000400 00000001 00000000 {flags} eth0"
    monkeypatch.setattr(routes, "_table", lambda _: [line.split()])
    network = ipaddress.IPv6Network("2001:db8::/64")
    assert routes.ipv6_routes() == [routes.Route(network, "eth0", advertised)]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EMSGSIZE, "the MTU is below 1280"),
        (errno.EACCES, "disabled (sysctl net.ipv6.conf.a/b.disable_ipv6=0; then restart ttun)"),
        (errno.ENODEV, "No such device"),
    ],
)
def test_why_a_device_has_no_ipv6(number: int, said: str) -> None:
    assert routes.why_no_ipv6(OSError(number, os.strerror(number)), "a.b") == said


@pytest.mark.hosts
@ONCE
def test_a_route_over_the_own_connection_is_refused(bench: Bench) -> None:
    client = bench.client("--route", "192.0.2.0/25")
    assert client.ended() == 2
    assert (
        "--route 192.0.2.0/25 would route the tunnel's own connection to 192.0.2.1" in client.log()
    )
    assert bench.devices(CLIENT) == []
    bench.server()
    client = bench.client("--route", "0.0.0.0/0")  # the link's own route is longer
    client.says("authenticated")
    client.stop()


def test_a_route_of_ipv6_takes_an_mtu_that_ipv6_takes() -> None:
    """Reported before privileges are checked."""
    import ttun

    why = "--route 2001:db8::/64: IPv6 requires an MTU of 1280 or more, not 1279"
    with pytest.raises(UsageError, match=why):
        ttun.Server(b"key", mtu=1279, routes=[parse_network("2001:db8::/64")])


def test_what_is_wrong_with_such_a_route_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["client", "-k", "x", "-s", "h:1", "--route", "2001:db8::/64", "-mtu", "1000"]
    assert main(line) == 2
    said = "--route 2001:db8::/64: IPv6 requires an MTU of 1280 or more, not 1000"
    assert capsys.readouterr().err == f"ttun: {said}; see ttun client -h\n"


@pytest.mark.parametrize(
    ("option", "address"),
    [
        ("local4", "224.0.0.5"),  # the kernel says «Invalid argument»
        ("local4", "0.0.0.0/0"),  # and here it removes the address
        ("peer4", "239.0.0.1"),
        ("local6", "ff02::1/126"),
        ("peer6", "::"),
    ],
)
def test_an_address_that_no_host_has_is_bad_usage(option: str, address: str) -> None:
    said = f"^invalid tunnel address: {address.partition('/')[0]} is not that of a host$"
    with pytest.raises(UsageError, match=said):
        Addresses.parse(USUAL, **{option: address})


@pytest.mark.hosts
@ONCE
def test_without_ipv6_a_route_of_it_says_so(bench: Bench) -> None:
    off = 'sysctl -q net.ipv6.conf.default.disable_ipv6=1 && exec "$@"'
    command = ["unshare", "--net", "sh", "-c", off, "sh", *PROGRAM, "server", "-k", "x"]
    done = subprocess.run(
        [*command, "--route", "2001:db8::/64"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ttun: cannot add route 2001:db8::/64 through ttun0: ttun0 has no IPv6 "
        "(sysctl net.ipv6.conf.default.disable_ipv6=0)"
    )


@pytest.mark.hosts
@ONCE
def test_a_device_of_that_name_is_a_line(bench: Bench) -> None:
    end = bench.start(CLIENT, "client", "-k", "x", "-s", "192.0.2.1", "--dev", "lo")
    assert end.ended() == 1
    assert (
        "ttun: device lo is not a plain TUN device: tap, multi_queue or other (choose another name)"
        in end.log()
    )


@pytest.mark.hosts
@ONCE
def test_a_route_that_is_there_already_is_a_line(bench: Bench) -> None:
    end = bench.start(
        SERVER, "server", "-k", "x", "--route", "198.51.100.0/24", "--route", "198.51.100.0/24"
    )
    assert end.ended() == 1
    assert "cannot add route 198.51.100.0/24 through ttun0: it already exists" in end.log()


NO_NAMES = [
    "", ".", "..", "all", "a/b", "a:b", "with space", "sixteen-letters-", "\u0442\u0443\u043d" * 3,
    "a\xa0b", "\xe0", "tab\t", 'a"b', "a'b", "a`b", "a\\b", "a\x1b[2J", "a\x7f", "a\x9bb",
    "a\u202eb", "a%", "a%s", "a%%d", "%d%d", "a\udcff", "\ud800",
]  # fmt: skip
NAMES = ["ttun%d", "%d", "fifteen-letters", "\u0442\u0443\u043d0", "a.b+c=1"]


@pytest.mark.parametrize("name", NO_NAMES, ids=ascii)
def test_a_name_that_the_kernel_or_a_reader_cannot_take_is_refused(name: str) -> None:
    import ttun

    why = "valid Unicode text" if name == "\ud800" else "a valid device name"
    with pytest.raises(UsageError, match=f"is not {why}") as refused:
        ttun.Server(b"key", device=name)
    assert str(refused.value).isprintable()
    assert issubclass(UsageError, TtunError)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_the_kernel_takes_is_taken(name: str) -> None:
    import ttun

    ttun.Server(b"key", device=name)


@pytest.mark.parametrize("name", [b"a\xffb", b"\xc3", b"%", b"a\\b", b'a"b', b"a\nb", b"%d%d%d"])
def test_bytes_that_are_no_device_name_are_one_line_and_exit_code_2(name: bytes) -> None:
    done = subprocess.run(
        [*PROGRAM, "client", "-k", "x", "-s", "192.0.2.1", "--dev", name],
        capture_output=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"is not a valid device name" in done.stderr


@pytest.mark.hosts
def test_a_device_of_any_name_is_no_trouble(plain: Bench) -> None:
    """Kernel tables show names as they are: bytes that are no UTF-8, or a blank to Python."""
    host = plain.pair.names[SERVER]
    names = [os.fsdecode(each) for each in (b"a\x1cb", b"c\xe2\x80\x83d", b"\xff\x1b[1m")]
    for number, name in enumerate(names):
        netns.ip("-n", host, "tuntap", "add", "dev", name, "mode", "tun")
        netns.ip("-n", host, "link", "set", name, "up")
        netns.ip("-n", host, "address", "add", f"203.0.113.{number}/24", "dev", name)
        netns.ip("-n", host, "route", "add", "10.1.1.3/32", "dev", name, "metric", str(number))
    try:
        server = plain.server("--dev", "tün0")
        plain.client("--dev", "tün0")
        plain.answers()
        assert r"10.1.1.0/30 is also routed through \xff\x1b[1m" in server.log()
        assert "\x1b" not in server.log()
        assert server.status()["device"] == "tün0"
        report = plain.run(SERVER, *PROGRAM, "doctor")
        assert r"\xff\x1b[1m" in report and "\x1b" not in report
        server.stop()
    finally:
        for name in names:
            netns.ip("-n", host, "tuntap", "del", "dev", name, "mode", "tun")
