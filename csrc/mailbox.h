/* A control queue: one slot for each type of control frame, between the packet path and Python.
 *
 *     Python --post--> outbox --> [uplink seal]          [downlink open] --> inbox --take--> Python
 *
 * Posting never blocks: a newer frame replaces an older one of its type. So a flood of PINGs gets
 * one answer, and two full directions cannot deadlock. */
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
    atomic_uint filled; /* bit TYPE: the slot of this type is full */
    bool closed;
    uint8_t bodies[TTUN_TYPES][TTUN_BODY_MAX];
};

/* Returns the size of the body of a control frame, or -1 for another type. */
int ttun_body_size(unsigned type);

/* Initializes an empty queue. Returns 0, or -1 with errno set. */
int mailbox_init(struct mailbox *m);

/* Wipes and destroys it. No thread may use it any more. */
void mailbox_destroy(struct mailbox *m);

/* Closes it: mailbox_take returns -1. */
void mailbox_close(struct mailbox *m);

/* Stores a frame of a valid type in its slot. Returns whether the slot was empty. */
bool mailbox_post(struct mailbox *m, const struct ttun_control *frame);

/* Returns whether it holds a frame, with a single load. */
static inline bool mailbox_has(struct mailbox *m) {
    return atomic_load_explicit(&m->filled, memory_order_acquire) != 0;
}

/* Takes the frame of the lowest type; waits for at most `milliseconds`. Returns 1 with a frame, 0
 * after the timeout, -1 if the queue is closed. */
int mailbox_take(struct mailbox *m, struct ttun_control *frame, long milliseconds);

#endif
