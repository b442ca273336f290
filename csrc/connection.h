/* Limits how much data the uplink seals and sends ahead of the connection.
 *
 * A sealed packet has its nonce, and so a fixed position: later packets cannot overtake it. So only
 * as much is sealed and passed to the kernel as the connection carries in a few milliseconds; the
 * rest waits in a queue where small packets can overtake (fq.h).
 *
 * The rate comes from the kernel: its pacing rate, which it maintains even for a congestion control
 * that does not pace. If there is none (Multipath TCP, Unix sockets) or the connection is faster
 * than the slots can hold, nothing is limited.
 *
 * Sources: struct tcp_info of linux/tcp.h; TCP_NOTSENT_LOWAT in tcp(7); net/ipv4/tcp_rate.c. */
#ifndef TTUN_CONNECTION_H
#define TTUN_CONNECTION_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bbr.h"
#include "codel.h"

enum { CONNECTION_PAUSE = 2 /* milliseconds between queries in a pause */ };

struct connection {
    int socket;
    uint64_t look_at;    /* next query of the kernel; microseconds */
    uint32_t unsent;     /* current TCP_NOTSENT_LOWAT, bytes; 0: not set */
    atomic_bool limited; /* the sending thread reads it too */
    size_t gso_max;      /* bytes; larger packets are segmented */
    size_t batch;        /* bytes to seal at once, roughly */
    unsigned slots;      /* sealed slots that may wait for the socket */
    struct bbr bbr;
    struct ttun_codel_pace pace; /* CoDel parameters of the flows in the queue */
};

/* Starts without limits. slots: of the uplink's ring. */
void connection_init(struct connection *c, int socket, unsigned slots);

/* Updates the limits from the kernel, every 10 ms. now: microseconds. slots: as above. */
void connection_look(struct connection *c, uint64_t now, unsigned slots);

#endif
