#define _GNU_SOURCE /* SO_PROTOCOL */
#include "connection.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

#include "lane.h"

enum {
    EVERY = 10000, /* microseconds between two looks */
    /* Microseconds. The socket takes more when half of what may wait unsent is left. Measured
     * (docs/performance.md): less of it runs dry, more of it is only waited for. */
    UNSENT = 4000,
    SEALED = 2000,
    UNSENT_LEAST = 4096, /* bytes */
    UNSENT_MOST = 256 * 1024,
    SEALED_LEAST = 1024, /* one packet of the usual MTU is more */
    WHOLE = 4000,        /* microseconds */
    WHOLE_LEAST = 1500,
    /* Microseconds. A bulk flow whose congestion control halves its window needs a queue of about
     * its round trip to keep the link busy; what is small does not wait behind it. And a lost
     * segment outside holds all back for a round trip, which is no reason to lose one inside. */
    TARGET_LEAST = 5000, /* RFC 8289, 4.3 */
    TARGET_MOST = 200000,
    INTERVAL_LEAST = 100000,
    INTERVAL_MOST = 1000000,
    /* linux/tcp.h. glibc's own header has a shorter struct, and musl-gcc does not see the kernel's.
     */
    INFO_RTT = 68,          /* u32, microseconds, smoothed */
    INFO_PACING_RATE = 104, /* u64, bytes per second */
    INFO_SIZE = 112,
    OPTION_INFO = 11,
    OPTION_NOTSENT_LOWAT = 25
};

static const uint64_t RATE_MOST = 1ull << 40; /* bytes per second; the kernel says all ones */

static uint64_t clamp(uint64_t value, uint64_t least, uint64_t most) {
    return value < least ? least : value > most ? most : value;
}

void connection_init(struct connection *c, int socket, unsigned slots) {
    *c = (struct connection){.socket = socket,
                             .batch = SLOT_SIZE,
                             .whole = SLOT_SIZE,
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
    c->look_at = now + EVERY;
    uint8_t info[INFO_SIZE];
    socklen_t size = sizeof info;
    if (getsockopt(c->socket, IPPROTO_TCP, OPTION_INFO, info, &size) < 0 || size < sizeof info) {
        c->look_at = UINT64_MAX; /* a kernel before 3.15 */
        return;
    }
    uint64_t rate;
    uint32_t rtt;
    memcpy(&rate, info + INFO_PACING_RATE, sizeof rate);
    memcpy(&rtt, info + INFO_RTT, sizeof rtt);
    rate = clamp(rate, 0, RATE_MOST);
    uint64_t sealed = rate * SEALED / 1000000;
    c->limited = sealed < (uint64_t)slots * SLOT_SIZE;
    c->batch = (size_t)clamp(sealed, SEALED_LEAST, SLOT_SIZE);
    c->whole = (size_t)clamp(rate * WHOLE / 1000000, WHOLE_LEAST, SLOT_SIZE);
    c->slots = (unsigned)clamp(sealed / SLOT_SIZE, 1, slots);
    c->pace.target = clamp(rtt, TARGET_LEAST, TARGET_MOST);
    c->pace.interval = clamp(3 * (uint64_t)rtt, INTERVAL_LEAST, INTERVAL_MOST);
    uint32_t unsent = (uint32_t)clamp(rate * UNSENT / 1000000, UNSENT_LEAST, UNSENT_MOST);
    uint32_t slack = c->unsent / 4;
    if ((unsent < c->unsent - slack || unsent > c->unsent + slack) &&
        setsockopt(c->socket, IPPROTO_TCP, OPTION_NOTSENT_LOWAT, &unsent, sizeof unsent) == 0)
        c->unsent = unsent;
}
