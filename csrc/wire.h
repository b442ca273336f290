/* What both ends have to agree on: docs/protocol.md has it in words. Python sees this file as it
 * is, so there is nothing in it but constants and plain structs. */
#ifndef TTUN_WIRE_H
#define TTUN_WIRE_H

#include <stdint.h>

enum {
    TTUN_KEY_SIZE = 32,
    TTUN_PREFIX = 2,           /* bytes of a frame's length */
    TTUN_LENGTH_MAX = 65535,   /* the largest length that the prefix can say */
    TTUN_OFFLOADED_PREFIX = 3, /* bytes in front of an offloaded packet: its type, its gso_size */
    TTUN_PING_SIZE = 8,        /* of the body of a PING, and of the PONG that repeats it */
    TTUN_BODY_MAX = 32         /* of the body of a REKEY: an X25519 public key */
};

/* The first byte of a plaintext of wire x1; 0x4_ and 0x6_ are IP packets. */
enum ttun_type {
    TTUN_OFFLOADED = 1, /* a packet as the kernel gave it */
    TTUN_PING = 2,
    TTUN_PONG = 3,
    TTUN_REKEY = 4,
    TTUN_SWITCH = 5,
    TTUN_TYPES = 6 /* one more than the last */
};

/* A control frame: any type but TTUN_OFFLOADED. */
struct ttun_control {
    uint8_t type; /* enum ttun_type */
    uint8_t body[TTUN_BODY_MAX];
};

#endif
