/* The inside of a session, for uplink.c, downlink.c and session.c; session.h is what others see. */
#ifndef TTUN_INTERNAL_H
#define TTUN_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "codel.h"
#include "connection.h"
#include "fq.h"
#include "mailbox.h"
#include "offload.h"
#include "ring.h"
#include "session.h"

enum {
    FRAME_MAX = TTUN_PREFIX + TTUN_LENGTH_MAX,
    /* The vnet header lies right before the packet, which starts on a multiple of 16. */
    SCRATCH_PACKET = 16,
    /* A multiple of 16, too: what lies behind it is aligned. */
    SCRATCH_SIZE = (SCRATCH_PACKET + TTUN_PACKET_MAX + 15) / 16 * 16
};

/* The keys of one direction, and those that follow them. */
struct keys {
    struct ttun_cipher_state now, next;
    bool ready; /* next is set */
};

struct ttun_session {
    int tun, socket;
    int wake; /* eventfd: the uplink is to look up from its device */
    bool direct;
    size_t vnet_size; /* of the header in front of each packet at the device, or 0 */
    int wire;         /* 0, or TTUN_X1 and what the peer's device takes */
    uint32_t tag_size;
    struct keys tx, rx;
    pthread_mutex_t keys_lock; /* over next and ready of both */
    struct mailbox inbox, outbox;
    _Atomic uint64_t heard; /* when a frame was opened last, in milliseconds */
    struct ttun_segmenter segmenter;
    struct ttun_coalescer coalescer;
    struct ring uplink, downlink;
    struct connection connection;      /* the uplink's side of it */
    struct ttun_fq queue;              /* of the uplink */
    atomic_bool wants_room;            /* the uplink waits for one slot less in its ring */
    struct ttun_codel codel;           /* of the device */
    _Atomic uint64_t send_end, waited; /* of the slot sent last: when, and since its first frame */
    pthread_mutex_t delivery_lock;
    pthread_cond_t delivered;
    bool delivering;     /* the downlink writes a large batch to the device */
    unsigned deliveries; /* such batches so far */
    atomic_int reason, reason_detail;
    _Atomic uint64_t counters[TTUN_COUNTERS];
    uint8_t *memory;    /* of all slots, two scratches, the queue */
    size_t memory_size; /* without the queue */
    uint8_t *scratch;   /* where the uplink reads to */
    uint8_t *taken;     /* where it takes packets from the queue to */
};

/* Each counter has one writer at a time, so a load and a store do and no bus lock is paid. */
static inline void count(struct ttun_session *s, enum ttun_counter which, uint64_t n) {
    _Atomic uint64_t *counter = &s->counters[which];
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n,
                          memory_order_relaxed);
}

/* Ends the session: the first reason stays. Every thread comes back from wherever it waits. */
void end_session(struct ttun_session *s, enum ttun_reason why, int detail);

static inline bool is_ip(const uint8_t *packet) {
    return packet[0] >> 4 == 4 || packet[0] >> 4 == 6;
}

static inline bool is_over(struct ttun_session *s) {
    return atomic_load(&s->reason) != TTUN_RUNNING;
}

/* Has the uplink look up from where it waits. */
void wake_uplink(struct ttun_session *s);

/* Puts the next key of a direction in the place of the one that saw its last frame. Returns false
 * when there is no next one. */
bool next_key(struct ttun_session *s, struct keys *keys);

/* Milliseconds on a clock that only goes forward, exact to a few. */
uint64_t now_ms(void);

/* Microseconds on the same clock, exactly. */
uint64_t now_us(void);

#endif
