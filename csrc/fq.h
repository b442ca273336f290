/* The uplink's queue: FQ-CoDel (RFC 8290). Packets wait here while the connection is busy. They
 * have no nonce yet, so flows may overtake each other; the order within a flow is kept.
 *
 *  1. ttun_fq_put appends a packet to the flow of its addresses, protocol and ports. A flow without
 *     queued packets counts as new: a ping, keystroke, DNS query or acknowledgement.
 *  2. ttun_fq_take serves new flows before old ones, by deficit round robin over bytes. CoDel drops
 *     a packet of a flow whose delay is too high for too long (codel.h).
 *  3. When the queue is full, the largest flow loses its oldest packets. */
#ifndef TTUN_FQ_H
#define TTUN_FQ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "codel.h"

enum {
    FQ_FLOWS = 256,
    FQ_CELL = 512,          /* bytes; a packet takes one or more cells */
    FQ_CELLS_MAX = 1 << 15, /* cell indices have 16 bits; one value means none */
    FQ_QUANTUM = 1514       /* bytes per turn of a flow */
};

struct fq_flow {
    uint16_t head, tail; /* packets, as indices of their first cells */
    uint16_t next;       /* in the same list */
    bool listed;
    int32_t deficit;
    uint32_t bytes; /* queued */
    uint32_t cells;
    struct ttun_codel codel;
};

struct fq_list {
    uint16_t first, last;
};

struct ttun_fq {
    uint8_t *memory;
    unsigned cells;      /* in memory */
    unsigned fresh;      /* index of the first cell never used */
    unsigned free_cells; /* number, including fresh ones */
    uint16_t first_free; /* of those used before */
    uint64_t salt;       /* makes hash collisions unpredictable */
    unsigned packets;    /* queued */
    uint64_t dropped;    /* packets, so far */
    struct fq_list new_flows, old_flows;
    struct fq_flow flows[FQ_FLOWS];
};

/* Initializes an empty queue in `size` bytes of memory, a multiple of FQ_CELL. */
void ttun_fq_init(struct ttun_fq *fq, uint8_t *memory, size_t size, uint64_t salt);

/* Appends a packet to its flow. ip: offset of its IP header. now: microseconds. */
void ttun_fq_put(struct ttun_fq *fq, const uint8_t *packet, size_t size, size_t ip, uint64_t now);

/* Removes the next packet and returns its size, or 0 if the queue is empty. out: room for
 * TTUN_PACKET_MAX bytes and a prefix. now: microseconds. */
size_t ttun_fq_take(struct ttun_fq *fq, uint8_t *out, uint64_t now,
                    const struct ttun_codel_pace *pace);

/* Overwrites all memory ever used. */
void ttun_fq_wipe(struct ttun_fq *fq);

#endif
