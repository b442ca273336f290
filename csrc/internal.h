/* Internals of a session, for uplink.c, downlink.c and session.c; session.h is the interface. */
#ifndef TTUN_INTERNAL_H
#define TTUN_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "codel.h"
#include "connection.h"
#include "control_queue.h"
#include "fq.h"
#include "offload.h"
#include "ring.h"
#include "session.h"

enum {
    FRAME_MAX = TTUN_PREFIX + TTUN_LENGTH_MAX,
    /* The vnet header is right before the packet, which starts at a multiple of 16. */
    SCRATCH_PACKET = 16,
    /* Also a multiple of 16, to align what follows. */
    SCRATCH_SIZE = (SCRATCH_PACKET + TTUN_PACKET_MAX + 15) / 16 * 16,
    ENDING = -1 /* as reason: a thread is about to store it */
};

/* The current and the next keys of one direction. */
struct keys {
    struct ttun_cipher_state now, next;
    bool ready; /* next is valid */
};

struct ttun_session {
    int tun, socket;
    int wake; /* eventfd that wakes the uplink from its poll */
    bool direct;
    size_t vnet_size;  /* of the header before each packet at the device, or 0 */
    int wire;          /* 0: v1; else TTUN_X1 and the peer's offload bits */
    uint32_t tag_size; /* of received frames, under any key */
    struct keys tx, rx;
    pthread_mutex_t keys_lock; /* protects next and ready of both */
    struct control_queue inbox, outbox;
    _Atomic uint64_t last_received; /* when a frame was last received, in milliseconds */
    struct ttun_segmenter segmenter;
    struct ttun_coalescer coalescer;
    struct ring uplink, downlink;
    struct connection connection;      /* limits of the uplink */
    struct ttun_fq queue;              /* the uplink's */
    atomic_bool wants_room;            /* the uplink waits for a slot of its ring to be sent */
    struct ttun_codel codel;           /* drops at the device */
    _Atomic uint64_t send_end, waited; /* of the last slot: time, and delay of its first frame */
    pthread_mutex_t delivery_lock;
    pthread_cond_t delivered;
    bool delivering;     /* the downlink is writing a large batch to the device */
    unsigned deliveries; /* number of such batches */
    atomic_int reason, reason_detail;
    _Atomic uint64_t counters[TTUN_COUNTERS];
    uint8_t *memory;    /* slots, two packet buffers, the queue */
    size_t memory_size; /* excluding the queue */
    uint8_t *scratch;   /* packet read from the device */
    uint8_t *taken;     /* packet taken from the queue */
};

/* Each counter has one writer at a time, so a load and a store suffice, without a bus lock. */
static inline void count(struct ttun_session *s, enum ttun_counter which, uint64_t n) {
    _Atomic uint64_t *counter = &s->counters[which];
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n,
                          memory_order_relaxed);
}

/* Ends the session and wakes all threads. Only the first reason is kept. */
void end_session(struct ttun_session *s, enum ttun_reason why, int detail);

static inline bool is_ip(const uint8_t *packet) {
    return packet[0] >> 4 == 4 || packet[0] >> 4 == 6;
}

static inline bool is_over(struct ttun_session *s) {
    return atomic_load(&s->reason) != TTUN_RUNNING;
}

void wake_uplink(struct ttun_session *s);

/* Switches a direction to its next key. Returns false if there is none. */
bool next_key(struct ttun_session *s, struct keys *keys);

/* Monotonic time; now_ms is accurate to a few milliseconds. */
uint64_t now_ms(void), now_us(void);

#endif
