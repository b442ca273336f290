/* Constants of the protocol, as in docs/protocol.md. cffi parses this file, so it contains only
 * constants and plain structs. */
#ifndef TTUN_WIRE_H
#define TTUN_WIRE_H

#include <stdint.h>

enum {
    TTUN_KEY_SIZE = 32,
    TTUN_PREFIX = 2,           /* bytes of the length prefix of a frame */
    TTUN_LENGTH_MAX = 65535,   /* the largest length in a prefix */
    TTUN_OFFLOADED_PREFIX = 3, /* bytes before an offloaded packet: type, gso_size */
    TTUN_PING_SIZE = 8,        /* bytes of the body of PING and PONG */
    TTUN_BODY_MAX = 32         /* bytes of the body of REKEY: an X25519 public key */
};

/* The first byte of a plaintext in protocol x1; 0x4_ and 0x6_ are IP packets. */
enum ttun_type {
    TTUN_OFFLOADED = 1, /* an unsegmented packet from the kernel */
    TTUN_PING = 2,
    TTUN_PONG = 3,
    TTUN_REKEY = 4,
    TTUN_SWITCH = 5,
    TTUN_TYPES = 6 /* number of types */
};

/* A control frame: any type except TTUN_OFFLOADED. */
struct ttun_control {
    uint8_t type; /* enum ttun_type */
    uint8_t body[TTUN_BODY_MAX];
};

#endif
