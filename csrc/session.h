/* One session: four threads that carry packets between a TUN device and a stream socket. Python
 * sees this file as it is.
 *
 *     TUN --read--> [uplink seal] --ring--> [uplink send] --> TCP
 *     TUN <--write-- [downlink open] <--ring-- [downlink receive] <-- TCP
 *
 *  1. uplink seal: reads packets until the device has no more or the slot is full, cuts large ones
 *     into segments, and seals each into the slot, frame behind frame. While the connection is busy
 *     they wait in a queue, where what is small overtakes (connection.h, fq.h).
 *  2. uplink send: writes a slot to the socket, many frames per system call.
 *  3. downlink receive: reads as much as there is, and cuts it behind the last whole frame; the
 *     rest moves to the next slot.
 *  4. downlink open: opens each frame of a slot in place, merges packets that follow each other,
 *     and writes them to the device.
 *
 * Between the two threads of a direction lies a ring buffer (ring.h). With `direct` the first one
 * empties a slot by itself whenever the second has nothing to do; a send that would block goes to
 * the second.
 *
 * On wire x1 a packet that the kernel left whole travels whole, and there are control frames. What
 * the peer sends goes to an inbox, what Python answers comes from an outbox: the uplink looks there
 * before each batch. The keys change with SWITCH, the last frame under the old key of its
 * direction; the next keys are there before, so nobody waits for them. */
#ifndef TTUN_SESSION_H
#define TTUN_SESSION_H

#include <stdint.h>

#include "frame.h"

struct ttun_session;

/* Why a session ended; the first reason stays. detail: see each. */
enum ttun_reason {
    TTUN_RUNNING = 0,
    TTUN_END_STOPPED,   /* ttun_session_stop was called */
    TTUN_END_CLOSED,    /* the peer closed the connection between two frames */
    TTUN_END_TRUNCATED, /* ... in the middle of a frame; detail: bytes of it that came */
    TTUN_END_LENGTH,    /* a frame shorter than its tag; detail: its length */
    TTUN_END_TAG,       /* a frame failed authentication; detail: its length */
    TTUN_END_SOCKET,    /* detail: errno of send or recv */
    TTUN_END_DEVICE,    /* detail: errno of the TUN device */
    TTUN_END_NONCES,    /* the counter of a direction ran out */
    TTUN_END_CONTROL    /* a control frame that is malformed or out of place; detail: its type */
};

/* What a session counts: packets as they stand in frames, and their bytes. ttun/session.py has the
 * same names for it, ttun/words.py the words. */
enum ttun_counter {
    TTUN_COUNT_UPLINK_PACKETS,
    TTUN_COUNT_UPLINK_BYTES,
    TTUN_COUNT_DOWNLINK_PACKETS,
    TTUN_COUNT_DOWNLINK_BYTES,
    TTUN_COUNT_REFUSED,    /* packets of the peer that the kernel did not take */
    TTUN_COUNT_EMPTY,      /* frames without a packet, ignored */
    TTUN_COUNT_UNSENDABLE, /* packets of ours that fit no frame or contradict their vnet header */
    TTUN_COUNT_CONGESTED,  /* packets of ours dropped because the queue stood too long (codel.h) */
    TTUN_COUNT_IGNORED,    /* frames of a type that is not known */
    TTUN_COUNT_FORGED,     /* malformed offload packets of the peer, dropped */
    TTUN_COUNT_SENT,       /* bytes handed to the socket */
    TTUN_COUNTERS          /* how many there are */
};

/* What a TUN device can do. */
enum ttun_offload {
    TTUN_OFFLOAD_VNET = 1, /* packets have a vnet header in front */
    TTUN_OFFLOAD_TCP = 2,  /* it takes merged TCP packets */
    TTUN_OFFLOAD_UDP = 4,  /* ... and UDP */
    TTUN_X1 = 8            /* of a wire: x1, not v1 */
};

/* Makes a session. tun: read and written, made non-blocking by the caller. socket: a connected,
 * blocking stream socket. Both stay the caller's and must outlive the session. offload:
 * ttun_offload bits of the device. wire: 0 for v1, or TTUN_X1 with the bits of what the peer's
 * device takes. uplink, downlink: copied. direct: let the first thread of a direction do the
 * second one's work while that one is idle (right where cores are scarce). slots: of each
 * direction, 1 to SLOTS of ring.h. queue: bytes of memory for packets that wait while the
 * connection is busy, a multiple of FQ_CELL of fq.h, at least for two of the largest. Returns NULL
 * with errno set. */
struct ttun_session *ttun_session_new(int tun, int socket, int offload, int wire,
                                      const struct ttun_cipher_state *uplink,
                                      const struct ttun_cipher_state *downlink, int direct,
                                      unsigned slots, size_t queue);

/* The four thread bodies. Each is called once, on a thread of its own, and returns when the
 * session is over. */
void ttun_uplink_seal(struct ttun_session *s);
void ttun_uplink_send(struct ttun_session *s);
void ttun_downlink_receive(struct ttun_session *s);
void ttun_downlink_open(struct ttun_session *s);

/* Ends the session from any thread: all four bodies return soon. */
void ttun_session_stop(struct ttun_session *s);

/* Why it ended, or TTUN_RUNNING. detail may be NULL. */
int ttun_session_reason(struct ttun_session *s, int *detail);

/* What was counted so far, from any thread at any time. */
uint64_t ttun_session_counter(struct ttun_session *s, enum ttun_counter which);

/* Milliseconds since a frame of the peer was opened last. */
uint64_t ttun_session_silence(struct ttun_session *s);

/* Takes the next control frame of the peer; waits for one, `milliseconds` at most. Returns 1 with a
 * frame, 0 when none came, -1 when the session is over. */
int ttun_session_take(struct ttun_session *s, struct ttun_control *frame, long milliseconds);

/* Has a control frame sealed before the next packet; never waits. A newer one takes the place of
 * one of the same type that is not sealed yet. */
void ttun_session_post(struct ttun_session *s, const struct ttun_control *frame);

/* Hands over the next keys, which are copied: `uplink` is used right behind the SWITCH that is
 * posted next, `downlink` right behind the SWITCH of the peer. Returns -1 when the keys handed over
 * before are not both in use yet. */
int ttun_session_rekey(struct ttun_session *s, const struct ttun_cipher_state *uplink,
                       const struct ttun_cipher_state *downlink);

/* Wipes the keys and frees all. Only after the four bodies returned. NULL is fine. */
void ttun_session_free(struct ttun_session *s);

/* Reads away what waits in a device, at most `most` packets, and returns how many those were. */
long ttun_drain(int tun, long most);

#endif
