"""Through a proxy: the client's side of HTTP CONNECT and of SOCKS5, and a dialer that uses them.

1. Proxy parses the URL and prepares all messages: bad values are reported before anything is open.
2. The dialer connects to an address of the proxy, as it would connect to the server.
3. A generator, driven by conversation.py, requests a connection to the server. The proxy resolves
   the server's name. Bytes after the proxy's answer stay in the socket: they belong to the tunnel.

No error contains the password: a proxy's reason that repeats it is left out.

Sources: RFC 9110 (CONNECT), RFC 9112 (messages), RFC 7617 (Basic), RFC 1928 (SOCKS5), RFC 1929.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import select
import socket
import time
from collections.abc import Generator, Sequence
from functools import partial
from typing import Optional
from urllib.parse import unquote_to_bytes

from ttun import tcp
from ttun.address import Address, parse_host_port
from ttun.conversation import Conversation
from ttun.errors import ProtocolError, UsageError, printable
from ttun.flag import Flag
from ttun.network.resolver import Target
from ttun.transport import Candidate

VARIABLE = "TTUN_PROXY"
TIMEOUT = 10.0  # seconds from the connection to the proxy to its answer
MAX_HEADER = 65536  # bytes
SHOWN = 200  # bytes of a proxy's status line
FORM = "http://[USER:PASSWORD@]HOST:PORT or socks5://[USER:PASSWORD@]HOST:PORT"

VERSION, CONNECT = 5, 1
NO_AUTHENTICATION, PASSWORD, NO_METHOD = 0, 2, 0xFF
IPV4, NAME, IPV6 = 1, 3, 4
REPLIES = (  # of SOCKS5, from 1 on
    "general SOCKS server failure",
    "connection not allowed by ruleset",
    "network unreachable",
    "host unreachable",
    "connection refused",
    "TTL expired",
    "command not supported",
    "address type not supported",
)

Login = Optional[tuple[bytes, bytes]]  # user and password
Steps = Generator[tuple[bytes, int], bytes, bool]  # returns True once the server is connected


class Proxy:
    """A proxy at an address, and the conversation with it: each call of steps() starts one."""

    def __init__(self, url: str, server: Address) -> None:
        """Parse a URL. Raises UsageError, without the URL."""
        scheme, _, rest = url.strip().partition("://")
        userinfo, at, host = rest.rstrip("/").rpartition("@")
        user, _, password = (unquote_to_bytes(os.fsencode(x)) for x in userinfo.partition(":"))
        start = {"http": http, "socks5": socks5, "socks5h": socks5}.get(scheme.lower())
        try:
            if start is None:
                raise UsageError("")
            self.address = parse_host_port(host, None)
        except UsageError:
            raise UsageError(f"a proxy is {FORM} (value not shown: may have a password)") from None
        login = (user, password) if at else None
        if login and start is http and b":" in user:
            raise UsageError("the user of an HTTP proxy must not contain a colon")
        if login and start is socks5 and not (0 < len(user) < 256 and len(password) < 256):
            raise UsageError(
                "a SOCKS5 proxy takes a user of 1 to 255 bytes and a password up to 255"
            )
        self.steps = partial(start, _ascii(server), login)


def _ascii(server: Address) -> Address:
    """Return a server with its name as proxies take it. Raises UsageError."""
    host = server.host
    try:
        ipaddress.ip_address(host)
        is_valid = "%" not in host  # the proxy has other zones
    except ValueError:
        try:
            host = host.encode("idna").decode()
        except UnicodeError:
            host = ""
        is_valid = re.fullmatch(r"[\w.-]{1,255}", host, re.ASCII) is not None
    if not is_valid:
        raise UsageError(f"{server.host!r} is not a name that a proxy can resolve")
    return server._replace(host=host)


def http(server: Address, login: Login) -> Steps:
    """Request a connection with CONNECT. Raises ProtocolError with the proxy's status line."""
    token = base64.b64encode(b"%b:%b" % login) if login else b""
    request = f"CONNECT {server} HTTP/1.1\r\nHost: {server}\r\n".encode()
    if login:
        request += b"Proxy-Authorization: Basic " + token + b"\r\n"
    status, left = b"1", MAX_HEADER
    while status.startswith(b"1"):  # interim responses
        header = yield from _header(request + b"\r\n" if request else b"", left)
        request, left = b"", left - len(header)
        line = header.splitlines()[0]
        found = re.match(rb"HTTP/1\.\d ([1-5]\d\d)(?: |$)", line)
        if found is None:
            raise ProtocolError("not an HTTP proxy: malformed status line")
        status = found[1]
    if status.startswith(b"2"):
        return True
    if login and any(secret and secret in line for secret in (token, login[1])):
        line = b"HTTP " + status
    why = f"refused: {printable(line[:SHOWN].decode(errors='replace').rstrip())}"
    if status == b"407":
        why += " (wrong user or password?)" if login else " (it requires USER:PASSWORD@)"
    raise ProtocolError(why)


def _header(request: bytes, most: int) -> Generator[tuple[bytes, int], bytes, bytes]:
    """Send a request and return the header of the response, up to the empty line."""
    header = bytearray()
    while not header.endswith((b"\n\r\n", b"\n\n")):
        if len(header) >= most:
            raise ProtocolError(f"the header of its answer exceeds {MAX_HEADER >> 10} KiB")
        # No more than is missing to the next possible end.
        header += yield request, 1 if header.endswith((b"\n", b"\n\r")) else 2
        request = b""
        if not header.startswith(b"HTTP/"[: len(header)]):
            raise ProtocolError("not an HTTP proxy")
    return bytes(header)


def socks5(server: Address, login: Login) -> Steps:
    """Request a connection in SOCKS5. Raises ProtocolError with the meaning of the reply code."""
    methods = bytes([NO_AUTHENTICATION, PASSWORD] if login else [NO_AUTHENTICATION])
    version, method = yield bytes([VERSION, len(methods)]) + methods, 2
    if version != VERSION:
        raise ProtocolError("not a SOCKS5 proxy")
    if method == NO_METHOD:
        why = "it accepts no user and password" if login else "it requires USER:PASSWORD@ or GSSAPI"
        raise ProtocolError(f"refused: no acceptable authentication method ({why})")
    if method not in methods:
        raise ProtocolError(f"not a SOCKS5 proxy: authentication method {method}")
    if login and method == PASSWORD:
        version, code = yield b"\1" + b"".join(bytes([len(x)]) + x for x in login), 2
        if version != 1 or code != 0:
            raise ProtocolError("refused: authentication failed (wrong user or password?)")
    try:
        ip = ipaddress.ip_address(server.host)
        host = bytes([IPV4 if ip.version == 4 else IPV6]) + ip.packed
    except ValueError:
        host = bytes([NAME, len(server.host)]) + server.host.encode()
    request = bytes([VERSION, CONNECT, 0]) + host + server.port.to_bytes(2, "big")
    version, code, _, kind = yield request, 4
    if version != VERSION:
        raise ProtocolError("not a SOCKS5 proxy: malformed reply")
    if code:
        why = REPLIES[code - 1] if code <= len(REPLIES) else f"reply code {code}"
        raise ProtocolError(f"refused: {why}")
    size = {IPV4: 4, IPV6: 16}.get(kind)
    if kind == NAME:
        (size,) = yield b"", 1
    if size is None:
        raise ProtocolError(f"not a SOCKS5 proxy: address type {kind}")
    yield b"", size + 2  # the proxy's own address and port
    return True


class Dialer(tcp.Dialer):
    """Reaches a server through a proxy, at the addresses of the proxy's name."""

    def __init__(
        self, server: str, url: str, mptcp: bool | None, control: str, bind: str | None = None
    ) -> None:
        """server: HOST:PORT. url: of the proxy. The rest as in tcp.Dialer. Raises UsageError."""
        address = tcp.parse_address(server, listening=False)
        proxy = Proxy(url, address)
        super().__init__(str(proxy.address), mptcp, control, bind)
        self.name = str(address)
        self._through = f"through proxy {proxy.address}"
        self._steps = proxy.steps

    def look_up(self, stop: Flag) -> Sequence[str]:
        """Return the addresses of the proxy."""
        with tcp.naming(self._through):
            return super().look_up(stop)

    def candidates(self, stop: Flag) -> Sequence[Candidate]:
        """Return one for each address of the proxy."""
        with tcp.naming(self._through):
            found = super().candidates(stop)
        if len(found) == 1:
            return [found[0]._replace(name=self.name)]
        return [each._replace(name=f"{self.name} via {each.name}") for each in found]

    def kind(self, sock: socket.socket) -> str:
        """Return what the connection to the proxy is, and the proxy."""
        return f"{super().kind(sock)} {self._through}"

    def _dial(self, target: Target, stop: Flag) -> socket.socket:
        with tcp.naming(self._through):
            sock = super()._dial(target, stop)
            try:
                self._request(sock, stop)
            except BaseException:
                sock.close()
                raise
        return sock

    def _request(self, sock: socket.socket, stop: Flag) -> None:
        conversation = Conversation(sock, self._steps())
        end = time.monotonic() + TIMEOUT
        while not conversation.advance():
            left = end - time.monotonic()
            if left <= 0 or not stop.wait_for(sock.fileno(), select.POLLIN, left):
                raise TimeoutError(f"no answer within {TIMEOUT:.0f} s")
