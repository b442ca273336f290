/* One session: four threads that carry packets between a TUN device and a stream socket.
 * The flow is told at the head of pump.c. */
#ifndef TTUN_PUMP_H
#define TTUN_PUMP_H

#include <stdint.h>

#include "codec.h"

struct ttun_session;

/* Why a session ended; the first reason stays. detail: see each. */
enum ttun_end {
    TTUN_RUNNING = 0,
    TTUN_END_STOPPED,   /* ttun_session_stop was called */
    TTUN_END_CLOSED,    /* the peer closed the connection between two frames */
    TTUN_END_TRUNCATED, /* ... in the middle of a frame; detail: bytes of it that came */
    TTUN_END_LENGTH,    /* a frame shorter than its tag; detail: its length */
    TTUN_END_TAG,       /* a frame failed authentication; detail: its length */
    TTUN_END_SOCKET,    /* detail: errno of send or recv */
    TTUN_END_DEVICE,    /* detail: errno of the TUN device */
    TTUN_END_NONCES     /* the counter of a direction ran out */
};

/* What a session carried so far. Packets as they stand in frames, and their bytes. */
struct ttun_counters {
    uint64_t uplink_packets, uplink_bytes;
    uint64_t downlink_packets, downlink_bytes;
    uint64_t refused;    /* packets of the peer that the kernel did not take */
    uint64_t empty;      /* frames without a packet, ignored */
    uint64_t unsendable; /* packets of ours that fit no frame or contradict their vnet header */
};

/* What a TUN device can do. */
enum ttun_offload {
    TTUN_OFFLOAD_VNET = 1, /* packets have a vnet header in front */
    TTUN_OFFLOAD_TCP = 2,  /* it takes merged TCP packets */
    TTUN_OFFLOAD_UDP = 4   /* ... and UDP */
};

/* Makes a session. tun: read and written, made non-blocking by the caller. socket: a connected,
 * blocking stream socket. Both stay the caller's and must outlive the session. offload:
 * ttun_offload bits. uplink, downlink: copied. direct: let the first thread of a direction do the
 * second one's work while that one is idle (right where cores are scarce). Returns NULL with errno
 * set. */
struct ttun_session *ttun_session_new(int tun, int socket, int offload,
                                      const struct ttun_cipher_state *uplink,
                                      const struct ttun_cipher_state *downlink, int direct);

/* The four thread bodies. Each is called once, on a thread of its own, and returns when the
 * session is over. */
void ttun_uplink_seal(struct ttun_session *s);
void ttun_uplink_send(struct ttun_session *s);
void ttun_downlink_receive(struct ttun_session *s);
void ttun_downlink_open(struct ttun_session *s);

/* Ends the session from any thread: all four bodies return soon. */
void ttun_session_stop(struct ttun_session *s);

/* Why it ended, or TTUN_RUNNING. detail may be NULL. */
int ttun_session_end(struct ttun_session *s, int *detail);

/* A snapshot, from any thread at any time. */
void ttun_session_counters(struct ttun_session *s, struct ttun_counters *out);

/* Wipes the keys and frees all. Only after the four bodies returned. NULL is fine. */
void ttun_session_free(struct ttun_session *s);

/* Reads away what waits in a device, at most `most` packets, and returns how many those were. */
long ttun_drain(int tun, long most);

/* Forbids core dumps and ptrace of this process by others, so that keys stay in it. 0, or -1. */
int ttun_forbid_dumps(void);

#endif
