"""The options of a tunnel, with defaults and validation.

Server and Client take them as keywords, the command line uses the same defaults, and an Endpoint
gets the whole object. Creating Settings validates them, before anything is opened.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar, Union

from ttun import congestion
from ttun.errors import UsageError

DEFAULT_PORT = 20203
DEFAULT = "default"  # the route to everything
Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
Interface = Union[ipaddress.IPv4Interface, ipaddress.IPv6Interface]
WIRES = ("auto", "v1", "x1")
MIN_MTU, MAX_MTU = 576, 65519  # least that RFC 791 requires of hosts; largest that fits a frame
MIN_IPV6_MTU = 1280  # RFC 8200, section 5
MAX_KEYS = 4  # of a server: a stranger's first frame is tried with each
MAX_KEY_LIFE = 120.0  # seconds; a server ends an x1 session after twice as much


def check_type(name: str, value: Any, *kinds: type) -> None:
    """Raise UsageError, without showing the value, if it has none of these types, or cannot be
    printed: an integer of thousands of digits, text that is not Unicode.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UsageError(f"{name} must be {wanted}, not {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > 64:
        raise UsageError(f"{name} is out of range")
    if isinstance(value, str):
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            raise UsageError(f"{name} is not valid Unicode text") from None


@dataclass(frozen=True)
class Limits:
    """When to rekey, counted from the first packet under a key: whichever comes first."""

    seconds: float = MAX_KEY_LIFE
    bytes: float = 64 * 2**30  # in either direction


DEFAULT_LIMITS = Limits()


class Buffers(NamedTuple):
    """Sizes of the buffers of a tunnel.

    A slot (csrc/ring.h) holds 260 KiB of frames, enough for the largest one. The kernel sizes the
    socket buffers: a limit there would limit the data in flight. Figures: docs/performance.md.
    """

    slots: int  # for each direction, 1 to 4
    queue: int  # length of the device's transmit queue, in packets of up to 64 KiB
    waiting: int  # bytes of the uplink's queue, a multiple of 512
    nonces: int  # client nonces that a server remembers against replay, 8 bytes each


# Measured (docs/performance.md): the kernel's default queue of 500 loses some of 100,000 small
# datagrams per second when a core is busy for 5 ms; more than 1000 only adds latency.
NORMAL = Buffers(slots=4, queue=1000, waiting=4 << 20, nonces=65536)
SMALL = Buffers(slots=1, queue=100, waiting=512 << 10, nonces=4096)
BUFFERS = {"normal": NORMAL, "small": SMALL}


@dataclass(frozen=True)
class Addresses:
    """The tunnel addresses of one end, with prefix lengths, and the peer's if outside of them."""

    ipv4: ipaddress.IPv4Interface
    ipv6: ipaddress.IPv6Interface
    peer4: ipaddress.IPv4Address | None = None
    peer6: ipaddress.IPv6Address | None = None

    def __post_init__(self) -> None:
        """Check the types. Raises UsageError."""
        check_type("ipv4", self.ipv4, ipaddress.IPv4Interface)
        check_type("ipv6", self.ipv6, ipaddress.IPv6Interface)
        check_type("peer4", self.peer4, ipaddress.IPv4Address, type(None))
        check_type("peer6", self.peer6, ipaddress.IPv6Address, type(None))
        for each in (self.ipv4.ip, self.ipv6.ip, self.peer4, self.peer6):
            if each and (each.is_multicast or each.is_unspecified):
                raise UsageError(f"invalid tunnel address: {each} is not that of a host")

    @classmethod
    def parse(
        cls,
        usual: Addresses,
        local4: str | None = None,
        local6: str | None = None,
        peer4: str | None = None,
        peer6: str | None = None,
    ) -> Addresses:
        """Return the default addresses with some replaced. Raises UsageError.

        A local address without a prefix length gets the default one, or with a peer address /32
        or /128.
        """
        try:
            if any("%" in text for text in (local4, local6, peer4, peer6) if text):
                raise ValueError("a zone is not allowed")
            ipv4 = _interface(ipaddress.IPv4Interface, local4, usual.ipv4, peer4 is not None)
            ipv6 = _interface(ipaddress.IPv6Interface, local6, usual.ipv6, peer6 is not None)
            found = cls(
                ipv4,
                ipv6,
                None if peer4 is None else ipaddress.IPv4Address(peer4),
                None if peer6 is None else ipaddress.IPv6Address(peer6),
            )
            if ipv4.ip == found.peer4 or ipv6.ip == found.peer6:
                raise ValueError("both ends have the same")
            return found
        except ValueError as error:
            raise UsageError(f"invalid tunnel address: {error}") from None


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
    """Options of both ends. Raises UsageError for an invalid value."""

    cipher: str | None = None  # use only this one; None: the best that both ends support
    wire: str = "auto"  # protocol x1 if the peer supports it, else v1; or "v1", "x1"
    mtu: int = 1280  # bytes, of the device
    mptcp: bool | None = None  # None: a server accepts Multipath TCP and TCP, a client uses TCP
    offload: bool = True  # use checksum offload, GSO and GRO at the device
    congestion_control: str = congestion.AUTO  # see congestion.choose()
    buffers: str = "normal"  # or "small", to save memory
    device: str = "ttun%d"  # name; the kernel replaces %d by the first free number
    addresses: Addresses | None = None  # in the tunnel; None: the defaults of that end
    routes: Sequence[Network] = ()  # networks to route through the tunnel
    limits: Limits = DEFAULT_LIMITS  # when to rekey, in protocol x1
    default_route: bool = False  # client: route all packets but those of users into the tunnel
    users: Sequence[int] = ()  # IDs of the users that dial, the program's own first; (): only that

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
        "default_route": (bool,),
        "users": (Sequence,),
    }

    def __post_init__(self) -> None:
        """Validate every option."""
        for name, kinds in self.KINDS.items():
            check_type(name, getattr(self, name), *kinds)
        for name in ("routes", "users"):  # a list could change later, unchecked
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.wire not in WIRES:
            raise UsageError(f"unknown wire {self.wire!r}: choose {', '.join(WIRES)}")
        if not MIN_MTU <= self.mtu <= MAX_MTU:
            raise UsageError(f"MTU {self.mtu} is out of range ({MIN_MTU} to {MAX_MTU})")
        if self.buffers not in BUFFERS:
            raise UsageError(f"unknown buffers {self.buffers!r}: choose {' or '.join(BUFFERS)}")
        for limit in (self.limits.seconds, self.limits.bytes):
            check_type("a limit", limit, int, float)
        if not self.limits.bytes > 0:
            raise UsageError(f"a limit of {self.limits.bytes} bytes must be above 0")
        if not 0 < self.limits.seconds <= MAX_KEY_LIFE:
            most = f"must be above 0 and at most {MAX_KEY_LIFE:.0f} seconds"
            raise UsageError(f"--rekey {self.limits.seconds:g}: {most}")
        congestion.checked(self.congestion_control)
        check_device_name(self.device)
        for user in self.users:
            check_type("a user", user, int)
            if not 0 <= user < 2**32 - 1:
                raise UsageError(f"{user} is not a user's number")
        for network in self.routes:
            check_type("a route", network, ipaddress.IPv4Network, ipaddress.IPv6Network)
            if network.version == 6 and self.mtu < MIN_IPV6_MTU:
                least = f"IPv6 requires an MTU of {MIN_IPV6_MTU} or more"
                raise UsageError(f"--route {network}: {least}, not {self.mtu}")


def parse_network(text: str) -> Network:
    """Parse NET/LENGTH. Raises UsageError."""
    try:
        if "%" in text:
            raise ValueError("a zone is not allowed")
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


def check_device_name(name: str) -> None:
    """Raise UsageError for a device name that the kernel would reject or that is unsafe to print.

    The kernel requires 1 to 15 bytes, at most one %d, and no byte for which its isspace() is true,
    0xA0 included: dev_valid_name() and __dev_alloc_name() in net/core/dev.c. Quotes, backslashes
    and unprintable characters are rejected too: the name goes into logs, terminals and metrics.
    """
    encoded = name.encode(errors="surrogatepass")
    if (
        not 0 < len(encoded) <= 15
        or name in (".", "..", "all", "default")  # names used by sysctl
        or set(name) & set("/: \"'`\\")
        or "%" in name.replace("%d", "", 1)
        or b"\xa0" in encoded
        or not name.isprintable()  # control and format characters, invalid UTF-8
    ):
        raise UsageError(
            f"{name!r} is not a valid device name: 1 to 15 bytes of UTF-8, no spaces, slashes, "
            "colons, quotes, backslashes, control characters, or % except in one %d"
        )
