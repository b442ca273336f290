/* The queue of the uplink: FQ-CoDel, RFC 8290. Packets wait here while the connection is busy,
 * still without a nonce, so they may leave in another order than they came; within a flow none
 * does.
 *
 *  1. ttun_fq_put sorts a packet into the flow that its addresses, protocol and ports belong to. A
 * flow that had nothing waiting is a new one: a ping, a key press, a look-up, an acknowledgement.
 *  2. ttun_fq_take serves new flows before old ones and each in its turn, by bytes (deficit round
 * robin). A flow whose packets have waited too long for too long loses one (codel.h).
 *  3. When there is no room, the flow that takes most of it loses its oldest packets. */
#ifndef TTUN_FQ_H
#define TTUN_FQ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "codel.h"

enum {
    FQ_FLOWS = 256,
    FQ_CELL = 512,          /* bytes of memory; a packet takes one or more */
    FQ_CELLS_MAX = 1 << 15, /* numbers of cells have 16 bits, and one is none of them */
    FQ_QUANTUM = 1514       /* bytes of a flow's turn */
};

struct fq_flow {
    uint16_t head, tail; /* packets, by their first cell */
    uint16_t next;       /* flow of the same list */
    bool listed;
    bool is_new;
    int32_t deficit;
    uint32_t bytes; /* that wait */
    uint32_t cells;
    struct ttun_codel codel;
};

struct fq_list {
    uint16_t first, last;
};

struct ttun_fq {
    uint8_t *memory;
    unsigned cells;      /* in it */
    unsigned fresh;      /* cells from here on were never used */
    unsigned free_cells; /* how many, the fresh ones included */
    uint16_t first_free; /* of those that were used */
    uint64_t salt;       /* nobody can tell which flows share their turn */
    unsigned packets;    /* that wait */
    uint64_t dropped;    /* so far */
    struct fq_list new_flows, old_flows;
    struct fq_flow flows[FQ_FLOWS];
};

/* Makes an empty one on `size` bytes of memory, a multiple of FQ_CELL. */
void ttun_fq_init(struct ttun_fq *fq, uint8_t *memory, size_t size, uint64_t salt);

/* Puts a packet at the end of its flow. ip: where its IP header starts. now: microseconds. */
void ttun_fq_put(struct ttun_fq *fq, const uint8_t *packet, size_t size, size_t ip, uint64_t now);

/* Takes the packet whose turn it is and returns its size, 0 when none waits. out: TTUN_PACKET_MAX
 * bytes and what may be in front. */
size_t ttun_fq_take(struct ttun_fq *fq, uint8_t *out, uint64_t now,
                    const struct ttun_codel_pace *pace);

/* Overwrites all that was ever put into it. */
void ttun_fq_wipe(struct ttun_fq *fq);

#endif
