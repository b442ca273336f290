"""The options of a tunnel: each with its default, its bounds and its check, once.

Server and Client take them as keywords, the command line takes its defaults from here, and an
Endpoint gets them whole. What is wrong is said when Settings are made, before anything is opened.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar, Union

from ttun import congestion
from ttun.errors import UsageError

DEFAULT_PORT = 20203
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
WIRES = ("auto", "v1", "x1")
MIN_MTU, MAX_MTU = 576, 65519  # RFC 791's least that every host takes; what fits one frame
MIN_IPV6_MTU = 1280  # RFC 8200, section 5
MAX_KEY_LIFE = 120.0  # seconds; a server of wire x1 ends a session after twice as much


@dataclass(frozen=True)
class Limits:
    """How long a key is used, from the first packet on: whichever comes first."""

    seconds: float = MAX_KEY_LIFE
    bytes: float = 64 * 2**30  # in either direction


DEFAULT_LIMITS = Limits()


class Buffers(NamedTuple):
    """How much memory a tunnel may take for what is under way.

    A slot (csrc/ring.h) holds 260 KiB of frames, so the largest one always. The socket's own
    buffers are the kernel's to size: a bound set here would bound what goes through the connection
    in a round trip. docs/performance.md has the figures.
    """

    slots: int  # for each direction, 1 to 4
    queue: int  # packets of up to 64 KiB that the device keeps while the uplink is busy
    waiting: int  # bytes of packets that wait in the uplink's queue, in steps of 512
    nonces: int  # of clients that a server remembers to have answered, 8 bytes each


# The queue was measured (docs/performance.md): 500, the kernel's own, loses some of 100,000 small
# datagrams per second when a core is away for 5 ms; more than this only adds waiting.
NORMAL = Buffers(slots=4, queue=1000, waiting=4 << 20, nonces=65536)
SMALL = Buffers(slots=1, queue=100, waiting=512 << 10, nonces=4096)
BUFFERS = {"normal": NORMAL, "small": SMALL}


@dataclass(frozen=True)
class Addresses:
    """The addresses of one end, with their prefix lengths, and of its peer where those do not
    cover it.
    """

    ipv4: ipaddress.IPv4Interface
    ipv6: ipaddress.IPv6Interface
    peer4: ipaddress.IPv4Address | None = None
    peer6: ipaddress.IPv6Address | None = None

    @classmethod
    def parse(
        cls,
        usual: Addresses,
        local4: str | None = None,
        local6: str | None = None,
        peer4: str | None = None,
        peer6: str | None = None,
    ) -> Addresses:
        """Return the usual ones with some of them changed. Raises UsageError.

        A local address without a length has the usual one; with a peer's it stands alone.
        """
        try:
            if any("%" in text for text in (local4, local6, peer4, peer6) if text):
                raise ValueError("it has no zone")
            ipv4 = _interface(ipaddress.IPv4Interface, local4, usual.ipv4, peer4 is not None)
            ipv6 = _interface(ipaddress.IPv6Interface, local6, usual.ipv6, peer6 is not None)
            return cls(
                ipv4,
                ipv6,
                None if peer4 is None else ipaddress.IPv4Address(peer4),
                None if peer6 is None else ipaddress.IPv6Address(peer6),
            )
        except ValueError as error:
            raise UsageError(f"an address of the tunnel: {error}") from None


_I = TypeVar("_I", ipaddress.IPv4Interface, ipaddress.IPv6Interface)


def _interface(kind: type[_I], text: str | None, usual: _I, alone: bool) -> _I:
    if text is None:
        text = str(usual.ip)
    if "/" in text:
        return kind(text)
    return kind(f"{text}/{usual.max_prefixlen if alone else usual.network.prefixlen}")


SERVER = Addresses(ipaddress.IPv4Interface("10.1.1.1/30"), ipaddress.IPv6Interface("fc11::1/126"))
CLIENT = Addresses(ipaddress.IPv4Interface("10.1.1.2/30"), ipaddress.IPv6Interface("fc11::2/126"))


@dataclass(frozen=True)
class Settings:
    """What both ends of a tunnel can be told. Raises UsageError for a value that makes no sense."""

    cipher: str | None = None  # the only one that may carry packets; None: the best of both ends
    wire: str = "auto"  # x1 with a peer that has it, else v1; or "v1", "x1"
    mtu: int = 1280  # bytes, of the device
    mptcp: bool | None = None  # None: a server takes Multipath TCP and TCP, a client dials TCP
    offload: bool = True  # use what the kernel has of it at the device
    congestion_control: str = congestion.AUTO  # as congestion.choose() takes it
    buffers: str = "normal"  # or "small", where memory is scarce
    device: str = "ttun%d"  # its name; the kernel fills in the first free number
    addresses: Addresses | None = None  # in the tunnel; None: the usual ones of that end
    routes: Sequence[Network] = ()  # networks to be reached through the tunnel
    limits: Limits = DEFAULT_LIMITS  # how long keys of wire x1 live

    KINDS: ClassVar[dict[str, tuple[type, ...]]] = {
        "cipher": (str, type(None)),
        "wire": (str,),
        "mtu": (int,),
        "mptcp": (bool, type(None)),
        "offload": (bool,),
        "congestion_control": (str,),
        "buffers": (str,),
        "device": (str,),
        "addresses": (Addresses, type(None)),
        "routes": (Sequence,),
        "limits": (Limits,),
    }

    def __post_init__(self) -> None:
        """Check every value."""
        for name, kinds in self.KINDS.items():
            check_type(name, getattr(self, name), *kinds)
        if self.wire not in WIRES:
            raise UsageError(f"unknown wire {self.wire!r}: choose {', '.join(WIRES)}")
        if not MIN_MTU <= self.mtu <= MAX_MTU:
            raise UsageError(f"an MTU of {self.mtu}: it goes from {MIN_MTU} to {MAX_MTU}")
        if self.buffers not in BUFFERS:
            raise UsageError(f"unknown buffers {self.buffers!r}: choose {' or '.join(BUFFERS)}")
        if not 0 < self.limits.seconds <= MAX_KEY_LIFE:
            most = f"more than 0, and {MAX_KEY_LIFE:.0f} seconds at most"
            raise UsageError(f"--rekey {self.limits.seconds:g}: {most}")
        congestion.checked(self.congestion_control)
        check_device_name(self.device)
        for network in self.routes:
            check_type("a route", network, ipaddress.IPv4Network, ipaddress.IPv6Network)
            if network.version == 6 and self.mtu < MIN_IPV6_MTU:
                least = f"IPv6 takes an MTU of {MIN_IPV6_MTU} or more"
                raise UsageError(f"--route {network}: {least}, and it is {self.mtu}")


def parse_network(text: str) -> Network:
    """Read NET/LENGTH. Raises UsageError."""
    try:
        if "%" in text:
            raise ValueError("a network has no zone")
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise UsageError(f"--route {text}: {error}") from None


def several(name: str, value: Any, *kinds: type) -> Sequence[Any]:
    """Return the values of an option that takes one or several. Raises UsageError."""
    found = value if isinstance(value, (list, tuple)) else [value]
    if not found:
        raise UsageError(f"{name} is empty")
    for each in found:
        check_type(name, each, *kinds)
    return found


def check_type(name: str, value: Any, *kinds: type) -> None:
    """Raise UsageError, without the value, if that is of none of these kinds."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UsageError(f"{name} has to be {wanted}, not {type(value).__name__}")


def check_device_name(name: str) -> None:
    """Raise UsageError for a name that not the kernel and every reader takes.

    The kernel wants 1 to 15 bytes, one %d at most, and none of what its isspace() knows, the byte
    0xA0 among it: dev_valid_name() and __dev_alloc_name() in net/core/dev.c. Quotes, backslashes
    and what does not print are refused too: the name goes into logs, terminals and metrics.
    """
    encoded = name.encode(errors="surrogatepass")
    if (
        not 0 < len(encoded) <= 15
        or name in (".", "..", "all", "default")  # directories of sysctl
        or set(name) & set("/: \"'`\\")
        or "%" in name.replace("%d", "", 1)
        or b"\xa0" in encoded
        or not name.isprintable()  # control and format characters; bytes that are no UTF-8
    ):
        raise UsageError(
            f"{name!r} is not a valid device name: 1 to 15 bytes of UTF-8, no blank, slash, colon, "
            "quote, backslash, control character or %, but for one %d"
        )
