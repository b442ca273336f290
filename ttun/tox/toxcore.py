"""The system's libtoxcore, loaded on first use: declarations and constants of tox/tox.h.

cffi's ABI mode needs no compiler or header, and no toxcore on machines that do not use Tox.
Source: tox/tox.h of toxcore 0.2.18.
"""

from __future__ import annotations

import functools
from typing import Any

from cffi import FFI

from ttun.errors import TtunError
from ttun.tox import INSTALL, LIBRARY

PUBLIC_KEY_SIZE, ADDRESS_SIZE = 32, 38  # bytes; an address is public key, nospam (4), checksum (2)
OFFLINE, TCP, UDP = 0, 1, 2  # TOX_CONNECTION
TRANSPORTS = {OFFLINE: "offline", TCP: "a TCP relay", UDP: "UDP"}
PROXY_HTTP, PROXY_SOCKS5 = 1, 2  # Tox_Proxy_Type
SAVEDATA_TOX_SAVE = 1  # Tox_Savedata_Type
NO_MEMORY, PORT_ALLOC, LOAD_ENCRYPTED, LOAD_BAD_FORMAT = 2, 3, 8, 9  # Tox_Err_New
NEW_ERRORS = {
    NO_MEMORY: "not enough memory",
    PORT_ALLOC: "no UDP port in the range is free (choose another range with -u)",
    4: "unknown proxy type",
    5: "invalid proxy host",
    6: "invalid proxy port",
    7: "the proxy's name cannot be resolved",
    LOAD_ENCRYPTED: "it is encrypted (save it without a password in the program that encrypted it)",
    LOAD_BAD_FORMAT: "it is damaged (restore a backup, or move it away to get a new Tox ID)",
}
ADD_ERRORS = {  # Tox_Err_Friend_Add
    2: "the secret is too long",
    4: "it is our own",
    6: "wrong checksum",
}

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


@functools.cache
def load() -> tuple[Any, Any]:
    """Return cffi's FFI and the library. Raises TtunError with the package to install."""
    ffi = FFI()
    ffi.cdef(CDEF)
    try:
        lib = ffi.dlopen(LIBRARY)
    except OSError:
        raise TtunError(f"cannot load {LIBRARY}, which Tox needs: {INSTALL}") from None
    return ffi, lib


def version() -> str:
    """Return the library's version."""
    _, lib = load()
    return f"{lib.tox_version_major()}.{lib.tox_version_minor()}.{lib.tox_version_patch()}"
