/* A mailbox: one slot for each type of control frame, between the packet path and Python.
 *
 *     Python --post--> outbox --> [uplink seal]          [downlink open] --> inbox --take--> Python
 *
 * Posting never waits: a newer frame takes the place of an older one of its type. So a peer that
 * asks a thousand times gets one answer, and two full directions cannot lock each other up. */
#ifndef TTUN_MAILBOX_H
#define TTUN_MAILBOX_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "wire.h"

struct mailbox {
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    atomic_uint filled; /* bit TYPE: that slot holds a frame */
    bool closed;
    uint8_t bodies[TTUN_TYPES][TTUN_BODY_MAX];
};

/* How many bytes follow the type, or -1 when it is not that of a control frame. */
int ttun_body_size(unsigned type);

/* Makes an empty one. Returns 0, or -1 with errno set. */
int mailbox_init(struct mailbox *m);

/* Only when no thread uses it any more. What was in it is wiped. */
void mailbox_destroy(struct mailbox *m);

/* Ends it: whoever waits comes back with nothing. */
void mailbox_close(struct mailbox *m);

/* Puts a frame into the slot of its type, which ttun_body_size knows. Returns whether that was
 * empty. */
bool mailbox_post(struct mailbox *m, const struct ttun_control *frame);

/* Is anything in it? Costs one load. */
static inline bool mailbox_has(struct mailbox *m) {
    return atomic_load_explicit(&m->filled, memory_order_acquire) != 0;
}

/* Takes the frame with the lowest type. Waits for one, `milliseconds` at most. Returns 1 with a
 * frame, 0 when none came, -1 when the mailbox is closed. */
int mailbox_take(struct mailbox *m, struct ttun_control *frame, long milliseconds);

#endif
