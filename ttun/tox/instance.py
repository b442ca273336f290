"""One Tox instance, opened at free ports with a saved identity.

iterate() returns what toxcore's callbacks reported as a list of events, so no callback calls back
into toxcore. A Tox instance is not thread-safe: only the thread that iterates it may use it.
"""

from __future__ import annotations

import logging
import random
import stat
from pathlib import Path
from typing import Any, NamedTuple, Union

from ttun.errors import TtunError
from ttun.tox import identity, toxcore

log = logging.getLogger("ttun")
core_log = logging.getLogger("ttun.toxcore")

ATTEMPTS = 20  # to find a free port
# toxcore's local discovery probes ten ports every ten seconds, from 33445 on.
LAN_PORTS = 33445, 33456  # bounds of the first port of a range


class BadIdentity(TtunError):
    """toxcore cannot use a saved identity. The message gives the reason but not the path."""


class NoPort(TtunError):
    """No port of the requested range is free."""


class Proxy(NamedTuple):
    """The proxy for all Tox traffic: a PROXY_ constant, a host and a port."""

    kind: int
    host: str
    port: int


class SelfStatus(NamedTuple):
    """Our connection to the Tox network changed."""

    connection: int


class FriendStatus(NamedTuple):
    """A friend came online, went offline, or is reached over another transport."""

    friend: int
    connection: int


class FriendRequest(NamedTuple):
    """The owner of a key, who knows our address, asks to become a friend."""

    key: bytes
    message: bytes


class FriendPacket(NamedTuple):
    """A friend sent a lossless packet."""

    friend: int
    data: bytes


Event = Union[SelfStatus, FriendStatus, FriendRequest, FriendPacket]


class Tox:
    """One Tox instance. It stays offline until it is iterated.

    savedata: a saved identity, None for a new one. udp_ports: first and last, None to disable UDP.
    tcp_port: port of a TCP relay for others, 0 for none. Raises TtunError; BadIdentity for bad
    savedata; NoPort if no port is free.
    """

    def __init__(
        self,
        *,
        savedata: bytes | None = None,
        udp_ports: tuple[int, int] | None = (0, 0),
        tcp_port: int = 0,
        proxy: Proxy | None = None,
        ipv6: bool = True,
        verbose: bool = False,
    ) -> None:
        self._ffi, self._lib = toxcore.load()
        ffi, lib = self._ffi, self._lib
        self._events: list[Event] = []
        self._error = ffi.new("int *")
        options = lib.tox_options_new(ffi.NULL)
        if options == ffi.NULL:
            raise _start_error(toxcore.NO_MEMORY)
        alive = []  # the options hold pointers to these until tox_new() has returned
        try:
            lib.tox_options_set_ipv6_enabled(options, ipv6)
            lib.tox_options_set_udp_enabled(options, udp_ports is not None and proxy is None)
            lib.tox_options_set_local_discovery_enabled(options, True)
            if udp_ports is not None:
                lib.tox_options_set_start_port(options, udp_ports[0])
                lib.tox_options_set_end_port(options, udp_ports[1])
            lib.tox_options_set_tcp_port(options, tcp_port)
            if proxy is not None:
                alive.append(ffi.new("char[]", proxy.host.encode()))
                lib.tox_options_set_proxy_type(options, proxy.kind)
                lib.tox_options_set_proxy_host(options, alive[-1])
                lib.tox_options_set_proxy_port(options, proxy.port)
            if savedata is not None:
                alive.append(ffi.new("uint8_t[]", savedata))
                lib.tox_options_set_savedata_type(options, toxcore.SAVEDATA_TOX_SAVE)
                lib.tox_options_set_savedata_data(options, alive[-1], len(savedata))
                lib.tox_options_set_savedata_length(options, len(savedata))
            if verbose:
                self._log_callback = ffi.callback("log_cb", self._on_log)
                lib.tox_options_set_log_callback(options, self._log_callback)
            self._tox = lib.tox_new(options, self._error)
        finally:
            lib.tox_options_free(options)
        # For malformed savedata, tox_new() returns an error and a Tox with a new identity.
        code = self._error[0]
        if self._tox != ffi.NULL and (code or not self._is_identity_in(savedata)):
            self.close()
            raise _start_error(code or toxcore.LOAD_BAD_FORMAT)
        if self._tox == ffi.NULL:
            raise _start_error(code)
        self._set_callbacks()

    def _is_identity_in(self, savedata: bytes | None) -> bool:
        """Return whether our identity is the saved one.

        toxcore skips sections of unknown type without an error. If a flipped bit hides the section
        with the keys, it generates a new identity.
        """
        return savedata is None or self.address()[: toxcore.PUBLIC_KEY_SIZE] in savedata

    def _set_callbacks(self) -> None:
        ffi, lib = self._ffi, self._lib
        self._callbacks = {
            name: ffi.callback(f"{name}_cb", function)
            for name, function in {
                "self_connection_status": self._on_self_status,
                "friend_connection_status": self._on_friend_status,
                "friend_request": self._on_friend_request,
                "friend_lossless_packet": self._on_packet,
            }.items()
        }
        for name, callback in self._callbacks.items():
            getattr(lib, f"tox_callback_{name}")(self._tox, callback)

    def close(self) -> None:
        """Go offline and free the instance."""
        if self._tox is not None:
            self._lib.tox_kill(self._tox)
            self._tox = None

    def iterate(self) -> list[Event]:
        """Let toxcore receive, send and run its timers; return the events in order."""
        self._lib.tox_iterate(self._tox, self._ffi.NULL)
        events = self._events
        if events:
            self._events = []
        return events

    def interval(self) -> float:
        """Return the seconds until toxcore must be iterated again."""
        return int(self._lib.tox_iteration_interval(self._tox)) / 1000

    def address(self) -> bytes:
        """Return our address, the 38 bytes of the Tox ID."""
        address = self._ffi.new("uint8_t[]", toxcore.ADDRESS_SIZE)
        self._lib.tox_self_get_address(self._tox, address)
        return bytes(address)

    def savedata(self) -> bytes:
        """Return our identity for saving, including the secret key."""
        data = self._ffi.new("uint8_t[]", self._lib.tox_get_savedata_size(self._tox))
        self._lib.tox_get_savedata(self._tox, data)
        return bytes(data)

    def bootstrap(self, host: str, port: int, key: bytes, relay_ports: tuple[int, ...]) -> None:
        """Bootstrap from a node at its UDP port, and use its TCP ports as relays."""
        name = host.encode()
        self._lib.tox_bootstrap(self._tox, name, port, key, self._error)
        for relay_port in relay_ports:
            self._lib.tox_add_tcp_relay(self._tox, name, relay_port, key, self._error)

    def add_friend(self, address: bytes, message: bytes) -> int:
        """Send a friend request and return the friend's number. Raises TtunError."""
        friend = self._lib.tox_friend_add(self._tox, address, message, len(message), self._error)
        if self._error[0]:
            code = self._error[0]
            why = toxcore.ADD_ERRORS.get(code, f"toxcore error {code}")
            raise TtunError(f"cannot use this Tox ID: {why}")
        return int(friend)

    def accept_friend(self, key: bytes) -> int | None:
        """Add the owner of a key as a friend; return the number, or None if toxcore refuses."""
        friend = self._lib.tox_friend_add_norequest(self._tox, key, self._error)
        return None if self._error[0] else int(friend)

    def delete_friend(self, friend: int) -> None:
        """Remove a friend and close the connection."""
        self._lib.tox_friend_delete(self._tox, friend, self._error)

    def forget_request(self, key: bytes) -> None:
        """Have toxcore report the next friend request of a key that is no friend.

        It drops the requests of a key that it has reported, until that friend is removed.
        """
        friend = self.accept_friend(key)
        if friend is not None:
            self.delete_friend(friend)

    def friends(self) -> list[int]:
        """Return the numbers of all friends."""
        friends = self._ffi.new("uint32_t[]", self._lib.tox_self_get_friend_list_size(self._tox))
        self._lib.tox_self_get_friend_list(self._tox, friends)
        return list(friends)

    def friend_key(self, friend: int) -> bytes:
        """Return the 32-byte public key of a friend."""
        key = self._ffi.new("uint8_t[]", toxcore.PUBLIC_KEY_SIZE)
        self._lib.tox_friend_get_public_key(self._tox, friend, key, self._error)
        return bytes(key)

    def send(self, friend: int, data: bytes) -> bool:
        """Send a packet; return False if toxcore's queue is full or the friend is offline."""
        return bool(
            self._lib.tox_friend_send_lossless_packet(
                self._tox, friend, data, len(data), self._error
            )
        )

    def _on_self_status(self, _tox: Any, connection: int, _data: Any) -> None:
        self._events.append(SelfStatus(connection))

    def _on_friend_status(self, _tox: Any, friend: int, connection: int, _data: Any) -> None:
        self._events.append(FriendStatus(friend, connection))

    def _on_friend_request(self, _tox: Any, key: Any, message: Any, size: int, _data: Any) -> None:
        unpack = self._ffi.unpack
        text = bytes(self._ffi.buffer(message, size))
        self._events.append(FriendRequest(bytes(unpack(key, toxcore.PUBLIC_KEY_SIZE)), text))

    def _on_packet(self, _tox: Any, friend: int, data: Any, size: int, _data: Any) -> None:
        self._events.append(FriendPacket(friend, self._ffi.buffer(data, size)[:]))

    def _on_log(
        self, _tox: Any, level: int, file: Any, line: int, _function: Any, message: Any, _data: Any
    ) -> None:
        name = self._ffi.string(file).decode(errors="replace").rpartition("/")[2]
        text = self._ffi.string(message).decode(errors="replace")
        core_log.debug("toxcore %s:%d: %s", name, line, text)


def open_tox(
    directory: Path | None,
    relay_port: int | None,
    udp_ports: tuple[int, int] | None,
    proxy: Proxy | None = None,
    *,
    server: bool,
    verbose: bool = False,
) -> Tox:
    """Open a Tox at the given ports, None for any. Raises TtunError.

    directory: where to load the identity from, or save a new one; None for a temporary identity.
    A server uses LAN_PORTS, where local discovery by other hosts finds it. A client uses random
    ports: it does the searching, and must not reuse the port of an earlier client that a server may
    still be looking for (a Tuntox server does so as long as it runs).
    """
    saved = None if directory is None else identity.load(directory)
    attempts = ATTEMPTS if relay_port is None or udp_ports is None else 1
    for attempt in range(attempts):
        anywhere = not server or attempt > 1
        for ipv6 in (True, False):
            try:
                tox = Tox(
                    savedata=saved,
                    tcp_port=random.randrange(1024, 65536) if relay_port is None else relay_port,
                    udp_ports=udp_ports or any_udp_ports(anywhere=anywhere),
                    proxy=proxy,
                    ipv6=ipv6,
                    verbose=verbose,
                )
            except BadIdentity as error:
                assert directory is not None
                raise TtunError(f"cannot use {directory / identity.SAVE}: {error}") from None
            except TtunError as error:  # may differ without IPv6
                is_last = attempt == attempts - 1 or not isinstance(error, NoPort)
                if is_last and not ipv6:
                    raise
            else:
                if directory is not None:
                    keep(tox, directory, saved)
                return tox
    raise AssertionError


def any_udp_ports(*, anywhere: bool) -> tuple[int, int]:
    """Return a random port range to try, from LAN_PORTS unless anywhere."""
    first = random.randrange(*((1024, 65500) if anywhere else LAN_PORTS))
    return first, first + 10


def keep(tox: Tox, directory: Path, saved: bytes | None) -> None:
    """Save the identity of tox, unless it was loaded; a saved identity is never written to. Raises
    TtunError if another program has just saved one.

    Remove other users' permission to read it. Remove saved friends from tox: they would be let in
    without the secret.
    """
    for friend in tox.friends():
        tox.delete_friend(friend)
    path = directory / identity.SAVE
    if saved is None:
        try:
            identity.save(directory, tox.savedata())
        except OSError as error:
            why = error.strerror
            log.warning("cannot save %s: %s (the next start gets a new Tox ID)", path, why)
        return
    try:
        if stat.S_IMODE(path.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
            path.chmod(0o600)
    except OSError as error:
        log.warning("other users can read %s: chmod failed: %s", path, error.strerror)


def _start_error(code: int) -> TtunError:
    """Return the exception for a Tox_Err_New."""
    why = toxcore.NEW_ERRORS.get(code, f"toxcore error {code}")
    if code in (toxcore.LOAD_ENCRYPTED, toxcore.LOAD_BAD_FORMAT):
        return BadIdentity(why)
    return (NoPort if code == toxcore.PORT_ALLOC else TtunError)(f"cannot start Tox: {why}")
