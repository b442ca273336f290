/* One session: four threads that carry packets between a TUN device and a stream socket. cffi
 * parses this file.
 *
 *     TUN --read--> [uplink seal] --ring--> [uplink send] --> TCP
 *     TUN <--write-- [downlink open] <--ring-- [downlink receive] <-- TCP
 *
 *  1. uplink seal: reads packets until the device is empty or the slot full, segments GSO packets,
 *     and seals each packet into the slot. While the connection is busy, packets wait in a queue in
 *     which small ones overtake (connection.h, fq.h).
 *  2. uplink send: writes a slot to the socket, many frames per system call.
 *  3. downlink receive: reads what is available, up to the last complete frame; the rest moves to
 *     the next slot.
 *  4. downlink open: opens each frame of a slot in place, coalesces consecutive packets, and writes
 *     them to the device.
 *
 * The two threads of a direction share a ring buffer (ring.h). In protocol x1 GSO packets are sent
 * unsegmented if the peer has offloads, and there are control frames (control_queue.h), which the
 * uplink seals before each batch. SWITCH is the last frame under the old key of its direction. The
 * next keys are set before, so no thread waits for them. */
#ifndef TTUN_SESSION_H
#define TTUN_SESSION_H

#include <stdbool.h>
#include <stdint.h>

#include "frame.h"

struct ttun_session;

/* Why a session ended: the first reason. detail: see each. */
enum ttun_reason {
    TTUN_RUNNING = 0,
    TTUN_END_STOPPED,   /* ttun_session_stop was called */
    TTUN_END_CLOSED,    /* the peer closed the connection, after a complete frame */
    TTUN_END_TRUNCATED, /* ... within a frame; detail: bytes of it received */
    TTUN_END_LENGTH,    /* a frame shorter than its tag; detail: its length */
    TTUN_END_TAG,       /* a frame failed authentication; detail: its length */
    TTUN_END_SOCKET,    /* detail: errno of send or recv */
    TTUN_END_DEVICE,    /* detail: errno of the TUN device */
    TTUN_END_NONCES,    /* the counter of a direction is exhausted */
    TTUN_END_CONTROL    /* a malformed or unexpected control frame; detail: its type */
};

/* Counters, of packets as in frames, and their bytes. ttun/session.py uses the same names. */
enum ttun_counter {
    TTUN_COUNT_UPLINK_PACKETS,
    TTUN_COUNT_UPLINK_BYTES,
    TTUN_COUNT_DOWNLINK_PACKETS,
    TTUN_COUNT_DOWNLINK_BYTES,
    TTUN_COUNT_REFUSED,    /* downlink packets rejected by the kernel */
    TTUN_COUNT_EMPTY,      /* empty frames, ignored */
    TTUN_COUNT_UNSENDABLE, /* uplink packets too large for a frame, or malformed */
    TTUN_COUNT_CONGESTED,  /* uplink packets dropped: queue full, or standing too long (codel.h) */
    TTUN_COUNT_IGNORED,    /* frames of unknown type */
    TTUN_COUNT_FORGED,     /* malformed offload packets of the peer, dropped */
    TTUN_COUNT_SENT,       /* bytes written to the socket */
    TTUN_COUNTERS          /* number of counters */
};

/* Offloads of a TUN device. */
enum ttun_offload {
    TTUN_OFFLOAD_VNET = 1, /* packets have a vnet header */
    TTUN_OFFLOAD_TCP = 2,  /* accepts TCP GSO packets */
    TTUN_OFFLOAD_UDP = 4,  /* ... and UDP */
    TTUN_X1 = 8            /* in the wire argument: protocol x1 */
};

/* Creates a session. tun: a non-blocking TUN descriptor. socket: a connected, blocking stream
 * socket; others that hold it may make it non-blocking. The caller owns both; they must outlive the
 * session. offload: ttun_offload bits of the device. wire: 0 for protocol v1, or TTUN_X1 with the
 * peer's offload bits. uplink, downlink: copied. direct: let the first thread of a direction do the
 * work of the second while that is idle (for few cores). slots: per direction, 1 to SLOTS (ring.h).
 * queue: bytes of the uplink's queue, a multiple of FQ_CELL (fq.h), at least two of the largest
 * packets. Returns NULL with errno set. */
struct ttun_session *ttun_session_new(int tun, int socket, int offload, int wire,
                                      const struct ttun_cipher_state *uplink,
                                      const struct ttun_cipher_state *downlink, int direct,
                                      unsigned slots, size_t queue);

/* The four thread bodies. Call each once, on its own thread; it returns when the session has ended.
 */
void ttun_uplink_seal(struct ttun_session *s);
void ttun_uplink_send(struct ttun_session *s);
void ttun_downlink_receive(struct ttun_session *s);
void ttun_downlink_open(struct ttun_session *s);

/* Ends the session, from any thread: all four bodies return soon. */
void ttun_session_stop(struct ttun_session *s);

/* Returns why it ended (enum ttun_reason), or TTUN_RUNNING. detail may be NULL. */
int ttun_session_reason(struct ttun_session *s, int *detail);

/* Returns a counter, from any thread at any time. */
uint64_t ttun_session_counter(struct ttun_session *s, enum ttun_counter which);

/* Returns the milliseconds since the last frame from the peer. */
uint64_t ttun_session_silence(struct ttun_session *s);

/* Takes the next control frame of the peer; waits for at most `milliseconds`. Returns 1 with a
 * frame, 0 after the timeout, -1 when the session has ended. */
int ttun_session_take(struct ttun_session *s, struct ttun_control *frame, long milliseconds);

/* Queues a control frame to be sealed before the next packet; never blocks. It replaces a frame of
 * the same type that is not sealed yet. */
void ttun_session_post(struct ttun_session *s, const struct ttun_control *frame);

/* Sets the next keys, which are copied: `uplink` is used after the SWITCH that is posted next,
 * `downlink` after the SWITCH of the peer. Returns false if the previous keys are not both in use
 * yet. */
bool ttun_session_rekey(struct ttun_session *s, const struct ttun_cipher_state *uplink,
                        const struct ttun_cipher_state *downlink);

/* Wipes the keys and frees the session. All four bodies must have returned. NULL is allowed. */
void ttun_session_free(struct ttun_session *s);

/* Discards packets queued in a device, at most `most`; returns their number. */
long ttun_drain(int tun, long most);

#endif
