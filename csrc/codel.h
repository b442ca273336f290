/* CoDel, RFC 8289: when to drop a packet so that no queue stands for long.
 *
 * A queue that empties now and then only evens out bursts. One whose delay stays above TARGET for
 * an INTERVAL is of no use to anybody: one packet is dropped, then further ones in ever shorter
 * intervals, until senders have slowed down. */
#ifndef TTUN_CODEL_H
#define TTUN_CODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    TTUN_CODEL_COUNT = 10000, /* drops after which they come no faster: one in a millisecond */
    TTUN_CODEL_SPARED = 256   /* bytes of a packet that is not dropped */
};

/* What is long: microseconds. */
struct ttun_codel_pace {
    uint64_t target;   /* a delay above it, */
    uint64_t interval; /* and all the time for so long */
};

/* All zero to begin with. */
struct ttun_codel {
    uint64_t above; /* when the delay has been above the target for an interval; 0: it is not */
    uint64_t next;  /* the next drop */
    uint32_t count; /* of drops in this episode, TTUN_CODEL_COUNT at most */
    bool dropping;
    bool due; /* the next packet that is not small is to be dropped */
};

/* Looks at the queue. now, delay: microseconds; delay: how long a packet that comes now has to
 * wait. */
void ttun_codel_watch(struct ttun_codel *codel, uint64_t now, uint64_t delay,
                      const struct ttun_codel_pace *pace);

/* Returns whether a packet of so many bytes is the one to drop. A ping, a key press, an
 * acknowledgement or a look-up does not fill a queue, and they are many beside packets of 64 KiB:
 * it is not one of these. */
bool ttun_codel_drops(struct ttun_codel *codel, size_t size);

#endif
