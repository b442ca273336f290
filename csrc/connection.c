#define _GNU_SOURCE /* SO_PROTOCOL */
#include "connection.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

#include "ring.h"

enum {
    EVERY = 10000, /* microseconds between queries */
    EVERY_PAUSED = CONNECTION_PAUSE * 1000,
    /* Microseconds. The socket is writable when half of the unsent limit is left. Measured
     * (docs/performance.md): with less it runs dry between two wake-ups, more only adds latency. */
    UNSENT = 4000,
    SEALED = 2000,
    /* Bytes. When the socket becomes writable, a segment must still be unsent, or bbr considers the
     * flow application-limited: half of four segments, minus the one that was just sent. From
     * 1.2 Mbit/s on it sends two at once (bbr_min_tso_segs() in Linux). */
    UNSENT_LEAST = 6000,
    UNSENT_LEAST_PAIRS = 9000,
    PAIRS_FROM = 150000, /* bytes per second */
    UNSENT_MOST = 256 * 1024,
    SEALED_LEAST = 1024, /* less than one packet of the default MTU */
    GSO_TIME = 4000,     /* microseconds */
    GSO_LEAST = 1500,
    /* Microseconds. A bulk flow whose congestion control halves its window needs a queue of about
     * one round trip to keep the link busy, and of two where segments are lost outside the tunnel:
     * one of these delays everything by a round trip. Small packets do not wait behind it. */
    TARGET_LEAST = 5000, /* RFC 8289, 4.3 */
    TARGET_MOST = 200000,
    INTERVAL_LEAST = 100000,
    INTERVAL_MOST = 1000000,
    /* linux/tcp.h. glibc's struct is shorter, and musl-gcc does not find the kernel's header. */
    INFO_STATE = 1,         /* u8, enum tcp_ca_state */
    INFO_SEGMENT_SIZE = 16, /* u32, bytes */
    INFO_UNACKED = 24,      /* u32, segments */
    INFO_LOST = 32,         /* u32, segments */
    INFO_RTT = 68,          /* u32, microseconds, smoothed */
    INFO_WINDOW = 80,       /* u32, segments */
    INFO_PACING_RATE = 104, /* u64, bytes per second */
    INFO_ACKED = 120,       /* u64, bytes */
    INFO_UNSENT = 144,      /* u32, bytes */
    INFO_MIN_RTT = 148,     /* u32, microseconds */
    INFO_LEAST = 152,
    INFO_SENT = 200,          /* u64, bytes; since Linux 4.19 */
    INFO_RETRANSMITTED = 208, /* u64, bytes of those */
    INFO_SIZE = 216,
    OPTION_INFO = 11,
    OPTION_NOTSENT_LOWAT = 25
};

static const uint64_t RATE_MOST = 1ull << 40; /* bytes per second; unlimited is all ones */

static uint64_t clamp(uint64_t value, uint64_t least, uint64_t most) {
    return value < least ? least : value > most ? most : value;
}

void connection_init(struct connection *c, int socket, unsigned slots) {
    *c = (struct connection){.socket = socket,
                             .batch = SLOT_SIZE,
                             .gso_max = SLOT_SIZE,
                             .slots = slots,
                             .pace = {.target = TARGET_LEAST, .interval = INTERVAL_LEAST}};
    int protocol = 0;
    socklen_t size = sizeof protocol;
    if (getsockopt(socket, SOL_SOCKET, SO_PROTOCOL, &protocol, &size) < 0 ||
        protocol != IPPROTO_TCP)
        c->look_at = UINT64_MAX;
}

void connection_look(struct connection *c, uint64_t now, unsigned slots) {
    if (now < c->look_at)
        return;
    uint8_t info[INFO_SIZE] = {0};
    socklen_t size = sizeof info;
    if (getsockopt(c->socket, IPPROTO_TCP, OPTION_INFO, info, &size) < 0 || size < INFO_LEAST) {
        c->look_at = UINT64_MAX; /* before Linux 4.6 */
        return;
    }
    struct tcp tcp;
    memcpy(&tcp.pacing_rate, info + INFO_PACING_RATE, sizeof tcp.pacing_rate);
    memcpy(&tcp.unacked, info + INFO_UNACKED, sizeof tcp.unacked);
    uint64_t sent, retransmitted, acked;
    memcpy(&sent, info + INFO_SENT, sizeof sent);
    memcpy(&retransmitted, info + INFO_RETRANSMITTED, sizeof retransmitted);
    memcpy(&acked, info + INFO_ACKED, sizeof acked);
    tcp.in_flight = sent > retransmitted + acked ? sent - retransmitted - acked : 0;
    memcpy(&tcp.rtt, info + INFO_RTT, sizeof tcp.rtt);
    memcpy(&tcp.min_rtt, info + INFO_MIN_RTT, sizeof tcp.min_rtt);
    memcpy(&tcp.lost, info + INFO_LOST, sizeof tcp.lost);
    memcpy(&tcp.window, info + INFO_WINDOW, sizeof tcp.window);
    memcpy(&tcp.segment_size, info + INFO_SEGMENT_SIZE, sizeof tcp.segment_size);
    tcp.state = info[INFO_STATE];
    memcpy(&tcp.unsent, info + INFO_UNSENT, sizeof tcp.unsent);
    bbr_look(&c->bbr, c->socket, now, &tcp);
    c->look_at = now + (c->bbr.paused ? EVERY_PAUSED : EVERY);
    uint64_t rate = clamp(tcp.pacing_rate, 0, RATE_MOST);
    uint64_t sealed = rate * SEALED / 1000000;
    c->limited = sealed < (uint64_t)slots * SLOT_SIZE;
    c->batch = (size_t)clamp(sealed, SEALED_LEAST, SLOT_SIZE);
    c->gso_max = (size_t)clamp(rate * GSO_TIME / 1000000, GSO_LEAST, SLOT_SIZE);
    c->slots = (unsigned)clamp(sealed / SLOT_SIZE, 1, slots);
    uint64_t rtt = tcp.rtt;
    c->pace.target = clamp(2 * rtt, TARGET_LEAST, TARGET_MOST);
    c->pace.interval = clamp(6 * rtt, INTERVAL_LEAST, INTERVAL_MOST);
    unsigned least = rate < PAIRS_FROM ? UNSENT_LEAST : UNSENT_LEAST_PAIRS;
    uint32_t unsent = (uint32_t)clamp(rate * UNSENT / 1000000, least, UNSENT_MOST);
    uint32_t slack = c->unsent / 4;
    if ((unsent < c->unsent - slack || unsent > c->unsent + slack) &&
        setsockopt(c->socket, IPPROTO_TCP, OPTION_NOTSENT_LOWAT, &unsent, sizeof unsent) == 0)
        c->unsent = unsent;
}
