#include "bbr.h"

#include <netinet/in.h>
#include <stddef.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    OPTION_CONGESTION = 13, /* linux/tcp.h */
    OPTION_CC_INFO = 26,
    OPTION_MAX_PACING_RATE = 47,
    STARTUP = 2 * 256,      /* the gain is 2.89 in startup and at most 1.25 later */
    BUSY = 8,               /* segments in flight */
    QUEUED = 5000,          /* microseconds above the minimum RTT that show a queue */
    FIRST_GAIN = 286,       /* percent; of the first pacing rate (bbr_init_pacing_rate_from_rtt) */
    MUCH = 8,               /* more than one in so many of those in flight */
    BURST = 16,             /* segments that chance may lose */
    RECOVERY = 3,           /* states of linux/tcp.h: segments were lost */
    LOSS = 4,               /* after a timeout: all of them count as lost */
    SHORT = 20000,          /* microseconds of RTT up to which window and pace drive each other */
    FULL_FOR = 3,           /* round trips without bandwidth growth */
    IDLE = 50000,           /* microseconds: no two looks at a busy flow are farther apart, except
                             * where the flow inside waits for a lost segment: some round trips */
    HELD_FOR = 10,          /* round trips */
    VALID_FOR = 10000000,   /* microseconds: bbr_min_rtt_win_sec */
    FEW = 16 * 1448,        /* bytes in flight of which four packets are enough for a while */
    CRAWL = 200000,         /* microseconds that a pause avoids: bbr_probe_rtt_mode_ms */
    SLOW = 150000,          /* bytes per second; up to here bbr sends one segment at a time */
    QUEUE_MOST = 4 * 1448,  /* bytes in flight that the link does not hold */
    QUEUE_LEAST = 2 * 1448, /* of which the link is never idle */
    SLOWED_FOR = 2,         /* round trips, if the queue is that of others */
    /* Microseconds by which bbr's time of the measurement may differ from ours: it was up to a
     * query earlier, or somewhat more on a busy machine, and is in jiffies. As much is needed
     * again until the query that begins the pause. */
    EARLIER = 30000,
    LATER = 5000
};

/* struct tcp_bbr_info */
struct info {
    uint32_t bandwidth_low, bandwidth_high; /* bytes per second */
    uint32_t min_rtt;                       /* microseconds */
    uint32_t pacing_gain, cwnd_gain;        /* in 256ths */
    uint32_t more;                          /* bbr2 and bbr3 have the same fields, and more */
};

enum { INFO_SIZE = offsetof(struct info, more) };

static void limit_pacing(int socket, uint32_t rate) {
    setsockopt(socket, SOL_SOCKET, OPTION_MAX_PACING_RATE, &rate, sizeof rate);
}

/* Paces below the rate. On a slow link bbr may take it for a sixth more than it is. */
static void slow_down(int socket, uint64_t bandwidth) {
    limit_pacing(socket, (uint32_t)(bandwidth - bandwidth / (bandwidth < SLOW ? 4 : 10)));
}

/* What shows a queue in the network. */
static bool is_queued(const struct tcp *tcp) {
    return tcp->rtt > tcp->min_rtt + (tcp->min_rtt / 4 > QUEUED ? tcp->min_rtt / 4 : QUEUED);
}

/* What a queue that is full, but too short to see, loses: not a link with five percent. */
static bool loses_much(const struct tcp *tcp) {
    return tcp->state != LOSS && tcp->lost > BURST + tcp->unacked / MUCH;
}

static bool choose(int socket, const char *name, socklen_t size) {
    return setsockopt(socket, IPPROTO_TCP, OPTION_CONGESTION, name, size) == 0;
}

/* Makes bbr start up again, if it may: an administrator's route may have chosen it. */
static void restart(struct bbr *bbr, int connection, uint64_t now) {
    int scratch = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool may = scratch >= 0 && choose(scratch, "bbr", 3);
    if (scratch >= 0)
        close(scratch);
    if (may && bbr->slowed_until != 0) { /* else it would start up at that rate */
        limit_pacing(connection, UINT32_MAX);
        bbr->slowed_until = 0;
    }
    if (may && choose(connection, "reno", 4) && choose(connection, "bbr", 3)) {
        bbr->full_since = 0;
        bbr->measured_at = now;
        bbr->paused = false;
    }
}

static void watch_startup(struct bbr *bbr, int socket, uint64_t now, const struct tcp *tcp,
                          uint64_t bandwidth, uint32_t gain) {
    bool busy = gain >= STARTUP && tcp->unacked >= BUSY && bandwidth < UINT32_MAX;
    uint64_t three = FULL_FOR * (uint64_t)tcp->rtt;
    bool silent = now - bbr->looked_at > (three > IDLE ? three : IDLE);
    bbr->looked_at = now;
    if (bbr->held_until != 0) {
        if (gain >= STARTUP && now < bbr->held_until)
            return;
        limit_pacing(socket, UINT32_MAX);
        bbr->held_until = 0;
        bbr->full_since = now;
    } else if (!busy || silent) {
        bbr->full_since = 0;
        bbr->may_be_full = false;
        bbr->pace = 0;
    } else if (bbr->full_since == 0 || bandwidth > bbr->most_bandwidth + bbr->most_bandwidth / 8) {
        bbr->most_bandwidth = bandwidth;
        bbr->full_since = now;
    } else if ((now - bbr->full_since > three && is_queued(tcp)) ||
               (now - bbr->full_since > tcp->rtt && loses_much(tcp))) {
        slow_down(socket, bandwidth);
        bbr->held_until = now + HELD_FOR * (uint64_t)tcp->rtt;
        bbr->may_be_full = true;
    }
}

/* Raises the pace of startup to that of the window. */
static void watch_pace(struct bbr *bbr, int socket, uint64_t now, const struct tcp *tcp,
                       uint32_t min_rtt, uint32_t gain) {
    if (min_rtt == 0 || gain < STARTUP || tcp->unacked < BUSY)
        return;
    if (tcp->state >= RECOVERY)
        bbr->may_be_full = true;
    if (bbr->may_be_full || tcp->rtt < SHORT || is_queued(tcp))
        return;
    uint64_t first = (uint64_t)tcp->window * tcp->segment_size * FIRST_GAIN * 10000 / tcp->rtt;
    uint64_t least = first - first / 5;
    if (least > tcp->pacing_rate && least > bbr->pace) {
        bbr->pace = first;
        restart(bbr, socket, now);
    }
}

static void watch_bandwidth(struct bbr *bbr, int socket, uint64_t now, const struct tcp *tcp,
                            uint64_t bandwidth, uint32_t min_rtt, uint32_t gain) {
    if (min_rtt == 0 || gain >= STARTUP)
        bbr->known = 0;
    else if (bandwidth > bbr->known)
        bbr->known = bandwidth;
    bool collapsed = bandwidth < bbr->known / 2 && bbr->known > SLOW && tcp->unsent > 0;
    if (!collapsed || is_queued(tcp)) {
        bbr->collapsed_since = 0;
    } else if (bbr->collapsed_since == 0) {
        bbr->collapsed_since = now;
    } else if (now - bbr->collapsed_since >= tcp->rtt) {
        bbr->known = bbr->collapsed_since = 0;
        restart(bbr, socket, now);
    }
}

static void watch_min_rtt(struct bbr *bbr, uint64_t now, const struct tcp *tcp, uint64_t bandwidth,
                          uint32_t min_rtt) {
    if (min_rtt != bbr->min_rtt) {
        bbr->min_rtt = min_rtt;
        bbr->measured_at = now;
        bbr->paused = false;
    }
    uint64_t age = now - bbr->measured_at;
    if (bbr->paused) /* the first acknowledgement after the pause must come when it is invalid */
        bbr->paused = age < VALID_FOR + (uint64_t)tcp->rtt &&
                      (tcp->unacked > 0 || age + min_rtt < VALID_FOR + LATER);
    else /* the last acknowledgement before it, when it is valid */
        bbr->paused = tcp->unacked >= BUSY && bandwidth * min_rtt / 1000000 > FEW &&
                      tcp->rtt < 2 * (uint64_t)min_rtt + CRAWL && /* see bbr.h */
                      age + tcp->rtt > VALID_FOR - EARLIER && age < VALID_FOR - EARLIER;
}

static void watch_queue(struct bbr *bbr, int socket, uint64_t now, const struct tcp *tcp,
                        uint64_t bandwidth, uint32_t min_rtt, uint32_t gain) {
    uint64_t held = bandwidth * min_rtt / 1000000; /* by the link */
    if (bbr->slowed_until != 0) {
        bool drained = tcp->in_flight <= held + QUEUE_LEAST;
        if (!drained && now < bbr->slowed_until)
            return;
        limit_pacing(socket, UINT32_MAX);
        bbr->slowed_until = 0;
        bbr->free_until = drained ? now : now + SLOWED_FOR * (uint64_t)tcp->rtt;
    } else if (min_rtt > 0 && gain < STARTUP && bandwidth < SLOW && now >= bbr->free_until &&
               tcp->in_flight > held + QUEUE_MOST) {
        slow_down(socket, bandwidth);
        bbr->slowed_until = now + SLOWED_FOR * (uint64_t)tcp->rtt;
    }
}

void bbr_look(struct bbr *bbr, int socket, uint64_t now, const struct tcp *tcp) {
    struct info info;
    socklen_t size = sizeof info;
    if (getsockopt(socket, IPPROTO_TCP, OPTION_CC_INFO, &info, &size) < 0 || size < INFO_SIZE)
        info = (struct info){0}; /* another congestion control */
    if (size != INFO_SIZE)
        info.min_rtt = 0; /* bbr2 and bbr3 measure more often, with half of the window: no pause */
    uint64_t bandwidth = (uint64_t)info.bandwidth_high << 32 | info.bandwidth_low;
    watch_min_rtt(bbr, now, tcp, bandwidth, info.min_rtt);
    if (size == INFO_SIZE && bandwidth == 0)
        return; /* it has just started, and nothing was acknowledged since: its gain is 0, too */
    watch_queue(bbr, socket, now, tcp, bandwidth, info.min_rtt, info.pacing_gain);
    watch_startup(bbr, socket, now, tcp, bandwidth, info.pacing_gain);
    watch_pace(bbr, socket, now, tcp, info.min_rtt, info.pacing_gain);
    watch_bandwidth(bbr, socket, now, tcp, bandwidth, info.min_rtt, info.pacing_gain);
}
