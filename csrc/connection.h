/* How far the uplink may be ahead of its connection.
 *
 * What is sealed has its nonce and with it its place: whatever comes later stands behind it. So no
 * more is sealed, and no more handed to the kernel, than the connection carries in a few
 * milliseconds; the rest waits in a queue where what is small may overtake (fq.h). Much less would
 * let the connection run dry between two wake-ups, and bbr would take that for the end of what
 * there is to send, and not measure the link.
 *
 * The kernel knows how fast the connection is: its pacing rate, which it also keeps for a
 * congestion control that does not pace. Where it knows nothing, for Multipath TCP and a Unix
 * socket, and where the connection is faster than all there is room for, nothing is limited.
 *
 * Sources: struct tcp_info of linux/tcp.h; TCP_NOTSENT_LOWAT in tcp(7); net/ipv4/tcp_rate.c. */
#ifndef TTUN_CONNECTION_H
#define TTUN_CONNECTION_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "codel.h"

struct connection {
    int socket;
    uint64_t look_at;            /* when the kernel is asked next; microseconds */
    uint32_t unsent;             /* bytes of TCP_NOTSENT_LOWAT, as they were set last; 0: not yet */
    atomic_bool limited;         /* read by the thread that sends, too */
    size_t whole;                /* bytes of a packet that is not cut */
    size_t batch;                /* bytes to seal at once, about */
    unsigned slots;              /* sealed ones that may wait for the socket */
    uint64_t most_bandwidth;     /* of bbr while it starts up; bytes per second */
    uint64_t full_since;         /* the link has carried no more; microseconds */
    uint64_t held_until;         /* its pacing is limited; 0: it is not */
    struct ttun_codel_pace pace; /* of each flow in the queue */
};

/* Begins without limits. slots: how many there are. */
void connection_init(struct connection *c, int socket, unsigned slots);

/* Asks the kernel, when it was not asked for a while. now: microseconds. slots: as before. */
void connection_look(struct connection *c, uint64_t now, unsigned slots);

#endif
