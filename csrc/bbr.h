/* Helps bbr, the congestion control of a far peer's connection, where it misjudges a tunnel.
 *
 * Startup. It leaves startup after three round trips without bandwidth growth, not counting those
 * in which the socket ran dry (application-limited). In a tunnel that is all of them: TCP inside
 * sends at the rate of its acknowledgements, which is that of the link, while startup paces at 2.89
 * times that. So startup would last for ever, with a queue of two round trips in the network and
 * the losses of a full one. If the bandwidth stops growing and there is a queue, limit the pacing
 * to just below the rate until bbr notices. Where the network's queue is too short to see, one
 * round trip in which much was lost is enough. Count from when the connection got busy: after a
 * silence, bandwidth and RTT are those of little traffic and its delayed acknowledgements.
 *
 * Startup pace. It paces at 2.89 times the bandwidth of the round trip before, so TCP inside, whose
 * window doubles, has its packets spread over two thirds of a round trip. HyStart of cubic takes an
 * unbroken train of acknowledgements as long as half a round trip for a full link, and ends slow
 * start at a fraction of it. bbr's first pacing rate sends the congestion window, which grows with
 * the one inside, in a third of a round trip, and the rate does not fall in startup. So if the
 * window has outgrown the rate, let bbr start up again: the train gets short, as without a tunnel.
 * Not once the link may be full. Not on a short path either: bbr adds three milliseconds of its
 * pace to the window (bbr_quantization_budget()), so window and pace would drive each other.
 *
 * Bandwidth. bbr takes the most of the last ten round trips, not counting application-limited ones
 * with less. After a while of light traffic, the first that counts is often one with a fraction of
 * the link, above all where segments are lost. From there bbr grows by a quarter in eight round
 * trips: it would take seconds. So if it has less than half of what it had, for no reason such as a
 * queue, let it start up again.
 *
 * Minimum RTT. Ten seconds after it last measured it, bbr sends only four packets at a time, for
 * 200 ms and a round trip (BBR_PROBE_RTT), and all traffic inside waits. It does not if the flow
 * just restarts from idle: then the next round trip counts (idle_restart). So pause shortly before
 * until nothing is in flight, which takes one round trip. A slow link is left alone: there, four
 * packets are about what is in flight anyway. So is one whose smoothed RTT no queue of bbr's (up to
 * one round trip) explains: a link that stood still for seconds leaves such an RTT behind, and the
 * pause would last as long.
 *
 * Slow links. bbr wants three segments in flight beyond what the link holds, an even number, and
 * two more when it probes (bbr_quantization_budget()). At 1 Mbit/s each of them is 12 ms of queue.
 * So keep it at two to four: pace at three quarters of the rate until it is short. The link stays
 * busy, so bbr measures it as before. A queue of other traffic does not get short: then stop
 * slowing down for as long as it was tried. Count bytes: the acknowledgements of a download are
 * many segments, and no queue.
 *
 * Sources: net/ipv4/tcp_bbr.c; struct tcp_bbr_info of linux/inet_diag.h. */
#ifndef TTUN_BBR_H
#define TTUN_BBR_H

#include <stdbool.h>
#include <stdint.h>

struct bbr {
    uint64_t most_bandwidth;  /* in startup; bytes per second */
    uint64_t full_since;      /* busy and no bandwidth growth since; microseconds; 0: not busy */
    uint64_t held_until;      /* end of the pacing limit; 0: no limit */
    bool may_be_full;         /* busy, and a segment was lost since, or the pacing limited */
    uint64_t pace;            /* that the last new start was for; bytes per second; 0: not busy */
    uint64_t looked_at;       /* the last call; microseconds */
    uint64_t known;           /* most bandwidth since startup; bytes per second */
    uint64_t collapsed_since; /* less than half of that; microseconds; 0: not */
    uint32_t min_rtt;         /* microseconds */
    uint64_t measured_at;     /* when bbr measured it; microseconds */
    bool paused;              /* send nothing */
    uint64_t slowed_until;    /* end of pacing below the rate, at the latest; 0: not slowed down */
    uint64_t free_until;      /* do not slow down again before */
};

/* Fields of struct tcp_info. */
struct tcp {
    uint64_t pacing_rate;  /* bytes per second */
    uint64_t in_flight;    /* bytes */
    uint32_t unacked;      /* segments */
    uint32_t lost;         /* of these; they count until the retransmission is acknowledged */
    uint32_t unsent;       /* bytes */
    uint32_t rtt, min_rtt; /* microseconds */
    uint32_t window;       /* the congestion window; segments */
    uint32_t segment_size; /* bytes */
    uint8_t state;         /* enum tcp_ca_state */
};

/* Does all of this for a socket. Call it every 10 ms, or more often in a pause. now: microseconds.
 * Does nothing for a socket with another congestion control. */
void bbr_look(struct bbr *bbr, int socket, uint64_t now, const struct tcp *tcp);

#endif
