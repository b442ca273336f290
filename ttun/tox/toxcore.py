"""The system's libtoxcore, loaded when it is used: a typed layer over the functions ttun needs.

cffi's ABI mode: no compiler, no header, no Tox until somebody asks for it. What toxcore reports
inside iterate() becomes a list of events, so nobody calls toxcore from within a callback.

A Tox is not thread-safe: the thread that iterates is the only one to call it. Source: tox/tox.h
of toxcore 0.2.18.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple, Union

from cffi import FFI

from ttun.errors import TtunError
from ttun.tox import INSTALL, LIBRARY

log = logging.getLogger("ttun")
core_log = logging.getLogger("ttun.toxcore")

PUBLIC_KEY_SIZE, ADDRESS_SIZE = 32, 38  # bytes; an address is the public key, 4 nospam, 2 checksum
OFFLINE, TCP, UDP = 0, 1, 2  # TOX_CONNECTION
TRANSPORTS = {OFFLINE: "offline", TCP: "a TCP relay", UDP: "UDP"}

CDEF = """
typedef struct Tox Tox;
struct Tox_Options;
typedef void log_cb(Tox *, int, const char *, uint32_t, const char *, const char *, void *);
typedef void self_connection_status_cb(Tox *, int, void *);
typedef void friend_connection_status_cb(Tox *, uint32_t, int, void *);
typedef void friend_request_cb(Tox *, const uint8_t *, const uint8_t *, size_t, void *);
typedef void friend_lossless_packet_cb(Tox *, uint32_t, const uint8_t *, size_t, void *);

uint32_t tox_version_major(void);
uint32_t tox_version_minor(void);
uint32_t tox_version_patch(void);

struct Tox_Options *tox_options_new(int *error);
void tox_options_free(struct Tox_Options *);
void tox_options_set_ipv6_enabled(struct Tox_Options *, bool);
void tox_options_set_udp_enabled(struct Tox_Options *, bool);
void tox_options_set_local_discovery_enabled(struct Tox_Options *, bool);
void tox_options_set_proxy_type(struct Tox_Options *, int);
void tox_options_set_proxy_host(struct Tox_Options *, const char *);
void tox_options_set_proxy_port(struct Tox_Options *, uint16_t);
void tox_options_set_start_port(struct Tox_Options *, uint16_t);
void tox_options_set_end_port(struct Tox_Options *, uint16_t);
void tox_options_set_tcp_port(struct Tox_Options *, uint16_t);
void tox_options_set_savedata_type(struct Tox_Options *, int);
void tox_options_set_savedata_data(struct Tox_Options *, const uint8_t *, size_t);
void tox_options_set_savedata_length(struct Tox_Options *, size_t);
void tox_options_set_log_callback(struct Tox_Options *, log_cb *);

Tox *tox_new(const struct Tox_Options *, int *error);
void tox_kill(Tox *);
size_t tox_get_savedata_size(const Tox *);
void tox_get_savedata(const Tox *, uint8_t *);
bool tox_bootstrap(Tox *, const char *, uint16_t, const uint8_t *, int *error);
bool tox_add_tcp_relay(Tox *, const char *, uint16_t, const uint8_t *, int *error);
void tox_self_get_address(const Tox *, uint8_t *);
uint32_t tox_iteration_interval(const Tox *);
void tox_iterate(Tox *, void *);

uint32_t tox_friend_add(Tox *, const uint8_t *, const uint8_t *, size_t, int *error);
uint32_t tox_friend_add_norequest(Tox *, const uint8_t *, int *error);
bool tox_friend_delete(Tox *, uint32_t, int *error);
bool tox_friend_get_public_key(const Tox *, uint32_t, uint8_t *, int *error);
size_t tox_self_get_friend_list_size(const Tox *);
void tox_self_get_friend_list(const Tox *, uint32_t *);
bool tox_friend_send_lossless_packet(Tox *, uint32_t, const uint8_t *, size_t, int *error);

void tox_callback_self_connection_status(Tox *, self_connection_status_cb *);
void tox_callback_friend_connection_status(Tox *, friend_connection_status_cb *);
void tox_callback_friend_request(Tox *, friend_request_cb *);
void tox_callback_friend_lossless_packet(Tox *, friend_lossless_packet_cb *);
"""

NEW_ERRORS = {  # Tox_Err_New: why there is none
    2: "not enough memory",
    3: "no UDP port of the range is free: choose another with -u",
    4: "this proxy type is unknown",
    5: "the proxy's host is not valid",
    6: "the proxy's port is not valid",
    7: "the proxy's name cannot be resolved",
    8: "it is encrypted (save it without a password in the program that encrypted it)",
    9: "it is damaged (restore it from a copy, or move it away to get a new Tox ID)",
}
NO_MEMORY, PORT_ALLOC, LOAD_ENCRYPTED, LOAD_BAD_FORMAT = 2, 3, 8, 9
ADD_ERRORS = {  # Tox_Err_Friend_Add
    2: "the secret is too long",
    4: "it is our own",
    6: "its checksum is wrong, was it typed by hand?",
}
PROXY_HTTP, PROXY_SOCKS5 = 1, 2  # Tox_Proxy_Type
SAVEDATA_TOX_SAVE = 1


class BadIdentity(TtunError):
    """A saved identity that toxcore cannot use. It says why, but not where that identity is."""


class NoPort(TtunError):
    """The ports that Tox may have are others'."""


class Proxy(NamedTuple):
    """Where Tox traffic goes through: a PROXY_ constant, a host and a port."""

    kind: int
    host: str
    port: int


class SelfStatus(NamedTuple):
    """We are on the Tox network, or no longer."""

    connection: int


class FriendStatus(NamedTuple):
    """A friend came, went, or changed its way here."""

    friend: int
    connection: int


class FriendRequest(NamedTuple):
    """Somebody who has our address wants to be a friend."""

    key: bytes
    message: bytes


class Packet(NamedTuple):
    """A lossless packet of a friend."""

    friend: int
    data: bytes


Event = Union[SelfStatus, FriendStatus, FriendRequest, Packet]


def _start_error(code: int) -> TtunError:
    """Return what to raise for a Tox_Err_New."""
    why = NEW_ERRORS.get(code, f"error {code}")
    if code in (LOAD_ENCRYPTED, LOAD_BAD_FORMAT):
        return BadIdentity(why)
    return (NoPort if code == PORT_ALLOC else TtunError)(f"cannot start Tox: {why}")


@functools.cache
def load() -> tuple[Any, Any]:
    """Return cffi's FFI and the library. Raises TtunError naming the package if it is not here."""
    ffi = FFI()
    ffi.cdef(CDEF)
    try:
        lib = ffi.dlopen(LIBRARY)
    except OSError:
        raise TtunError(f"Tox needs {LIBRARY}: {INSTALL}") from None
    return ffi, lib


def version() -> str:
    """Return the library's version."""
    _, lib = load()
    return f"{lib.tox_version_major()}.{lib.tox_version_minor()}.{lib.tox_version_patch()}"


class Tox:
    """One Tox instance.

    savedata: a saved identity, None for a fresh one. udp_ports: first and last, None for no UDP.
    tcp_port: of a relay for others, 0 for none. Raises TtunError, BadIdentity for such savedata.
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
        """Open its sockets; it goes nowhere before it is iterated."""
        self._ffi, self._lib = load()
        ffi, lib = self._ffi, self._lib
        self._events: list[Event] = []
        self._error = ffi.new("int *")
        options = lib.tox_options_new(ffi.NULL)
        if options == ffi.NULL:
            raise _start_error(NO_MEMORY)
        keep = []  # toxcore keeps pointers, not copies, until tox_new has returned
        try:
            lib.tox_options_set_ipv6_enabled(options, ipv6)
            lib.tox_options_set_udp_enabled(options, udp_ports is not None and proxy is None)
            lib.tox_options_set_local_discovery_enabled(options, True)
            if udp_ports is not None:
                lib.tox_options_set_start_port(options, udp_ports[0])
                lib.tox_options_set_end_port(options, udp_ports[1])
            lib.tox_options_set_tcp_port(options, tcp_port)
            if proxy is not None:
                keep.append(ffi.new("char[]", proxy.host.encode()))
                lib.tox_options_set_proxy_type(options, proxy.kind)
                lib.tox_options_set_proxy_host(options, keep[-1])
                lib.tox_options_set_proxy_port(options, proxy.port)
            if savedata is not None:
                keep.append(ffi.new("uint8_t[]", savedata))
                lib.tox_options_set_savedata_type(options, SAVEDATA_TOX_SAVE)
                lib.tox_options_set_savedata_data(options, keep[-1], len(savedata))
                lib.tox_options_set_savedata_length(options, len(savedata))
            if verbose:
                self._log_callback = ffi.callback("log_cb", self._on_log)
                lib.tox_options_set_log_callback(options, self._log_callback)
            self._tox = lib.tox_new(options, self._error)
        finally:
            lib.tox_options_free(options)
        # With savedata of a bad format tox_new() returns an error, and a Tox of a fresh identity.
        code = self._error[0]
        if self._tox != ffi.NULL and (code or not self._is_identity_in(savedata)):
            self.close()
            raise _start_error(code or LOAD_BAD_FORMAT)
        if self._tox == ffi.NULL:
            raise _start_error(code)
        self._set_callbacks()

    def _is_identity_in(self, savedata: bytes | None) -> bool:
        """Return whether our identity is the saved one.

        toxcore leaves out sections of a type that it does not know. If that is the one with the
        keys, because a bit of its type changed, there is no error, and the identity is a fresh one.
        """
        return savedata is None or self.address()[:PUBLIC_KEY_SIZE] in savedata

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
        """Leave the network and free it."""
        if self._tox is not None:
            self._lib.tox_kill(self._tox)
            self._tox = None

    def iterate(self) -> list[Event]:
        """Let toxcore receive, send and keep its timers; return what happened, in order."""
        self._lib.tox_iterate(self._tox, self._ffi.NULL)
        events = self._events
        if events:
            self._events = []
        return events

    def interval(self) -> float:
        """Return the seconds after which toxcore wants to be iterated again."""
        return int(self._lib.tox_iteration_interval(self._tox)) / 1000

    def address(self) -> bytes:
        """Return our address, the 38 bytes that a Tox ID shows."""
        address = self._ffi.new("uint8_t[]", ADDRESS_SIZE)
        self._lib.tox_self_get_address(self._tox, address)
        return bytes(address)

    def savedata(self) -> bytes:
        """Return our identity, its secret key included, to be saved."""
        data = self._ffi.new("uint8_t[]", self._lib.tox_get_savedata_size(self._tox))
        self._lib.tox_get_savedata(self._tox, data)
        return bytes(data)

    def bootstrap(self, host: str, port: int, key: bytes, relay_ports: tuple[int, ...]) -> None:
        """Get to know a node of the network: over UDP, and as a TCP relay at its ports."""
        name = host.encode()
        self._lib.tox_bootstrap(self._tox, name, port, key, self._error)
        for relay_port in relay_ports:
            self._lib.tox_add_tcp_relay(self._tox, name, relay_port, key, self._error)

    def add_friend(self, address: bytes, message: bytes) -> int:
        """Send a friend request; return the friend's number. Raises TtunError."""
        friend = self._lib.tox_friend_add(self._tox, address, message, len(message), self._error)
        if self._error[0]:
            code = self._error[0]
            raise TtunError(f"cannot use this Tox ID: {ADD_ERRORS.get(code, f'error {code}')}")
        return int(friend)

    def accept_friend(self, key: bytes) -> int | None:
        """Take somebody as a friend; return the number, None if toxcore does not want to."""
        friend = self._lib.tox_friend_add_norequest(self._tox, key, self._error)
        return None if self._error[0] else int(friend)

    def delete_friend(self, friend: int) -> None:
        """Forget a friend and end its connection."""
        self._lib.tox_friend_delete(self._tox, friend, self._error)

    def friends(self) -> list[int]:
        """Return the numbers of all friends."""
        friends = self._ffi.new("uint32_t[]", self._lib.tox_self_get_friend_list_size(self._tox))
        self._lib.tox_self_get_friend_list(self._tox, friends)
        return list(friends)

    def friend_key(self, friend: int) -> bytes:
        """Return the 32-byte public key of a friend."""
        key = self._ffi.new("uint8_t[]", PUBLIC_KEY_SIZE)
        self._lib.tox_friend_get_public_key(self._tox, friend, key, self._error)
        return bytes(key)

    def send(self, friend: int, packet: bytes) -> bool:
        """Send a packet; False if toxcore takes none now: its queue is full or the friend gone."""
        return bool(
            self._lib.tox_friend_send_lossless_packet(
                self._tox, friend, packet, len(packet), self._error
            )
        )

    def _on_self_status(self, _tox: Any, connection: int, _data: Any) -> None:
        self._events.append(SelfStatus(connection))

    def _on_friend_status(self, _tox: Any, friend: int, connection: int, _data: Any) -> None:
        self._events.append(FriendStatus(friend, connection))

    def _on_friend_request(self, _tox: Any, key: Any, message: Any, size: int, _data: Any) -> None:
        unpack = self._ffi.unpack
        text = bytes(self._ffi.buffer(message, size))
        self._events.append(FriendRequest(bytes(unpack(key, PUBLIC_KEY_SIZE)), text))

    def _on_packet(self, _tox: Any, friend: int, data: Any, size: int, _data: Any) -> None:
        self._events.append(Packet(friend, self._ffi.buffer(data, size)[:]))

    def _on_log(
        self, _tox: Any, level: int, file: Any, line: int, _function: Any, message: Any, _data: Any
    ) -> None:
        name = self._ffi.string(file).decode(errors="replace").rpartition("/")[2]
        text = self._ffi.string(message).decode(errors="replace")
        core_log.debug("toxcore %s:%d: %s", name, line, text)
