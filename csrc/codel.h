/* CoDel (RFC 8289): decides when to drop a packet, to avoid a standing queue.
 *
 * A queue that drains now and then absorbs bursts. If its delay stays above the target for an
 * interval, one packet is dropped, then further ones at decreasing intervals, until the senders
 * have slowed down. */
#ifndef TTUN_CODEL_H
#define TTUN_CODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    TTUN_CODEL_COUNT = 10000, /* of drops; limits the rate to one per ms */
    TTUN_CODEL_SPARED = 256   /* bytes; packets up to this size are never dropped */
};

/* Parameters, in microseconds. */
struct ttun_codel_pace {
    uint64_t target;   /* acceptable delay */
    uint64_t interval; /* how long the delay may exceed it */
};

/* Initially all zero. Times: microseconds. */
struct ttun_codel {
    uint64_t above; /* end of the interval above the target; 0: below it */
    uint64_t next;  /* time of the next drop */
    uint32_t count; /* drops in this episode, up to TTUN_CODEL_COUNT */
    bool dropping;
    bool due; /* drop the next packet that is not small */
};

/* Updates the state. now, delay: microseconds; delay: the current queueing delay. */
void ttun_codel_watch(struct ttun_codel *codel, uint64_t now, uint64_t delay,
                      const struct ttun_codel_pace *pace);

/* Returns whether to drop a packet of size bytes. Small packets (pings, keystrokes,
 * acknowledgements, DNS queries) are spared: they do not fill the queue, and next to packets of
 * 64 KiB most packets are small. */
bool ttun_codel_drops(struct ttun_codel *codel, size_t size);

#endif
