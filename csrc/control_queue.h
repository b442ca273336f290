/* A control queue: one slot for each type of control frame, between the packet path and Python.
 *
 *     Python --post--> outbox --> [uplink seal]          [downlink open] --> inbox --take--> Python
 *
 * Posting never blocks: a newer frame replaces an older one of its type. So a flood of PINGs gets
 * one answer, and two full directions cannot deadlock. */
#ifndef TTUN_CONTROL_QUEUE_H
#define TTUN_CONTROL_QUEUE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "wire.h"

struct control_queue {
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    atomic_uint filled; /* bit TYPE: the slot of this type is full */
    bool closed;
    uint8_t bodies[TTUN_TYPES][TTUN_BODY_MAX];
};

/* Returns the size of the body of a control frame, or -1 for another type. */
int ttun_body_size(unsigned type);

/* Initializes an empty queue. */
void control_queue_init(struct control_queue *q);

/* Wipes and destroys it. No thread may use it any more. */
void control_queue_destroy(struct control_queue *q);

/* Closes it: control_queue_take returns -1. */
void control_queue_close(struct control_queue *q);

/* Stores a frame of a valid type in its slot. Returns whether the slot was empty. */
bool control_queue_post(struct control_queue *q, const struct ttun_control *frame);

/* Returns whether it holds a frame, with a single load. */
static inline bool control_queue_has(struct control_queue *q) {
    return atomic_load_explicit(&q->filled, memory_order_acquire) != 0;
}

/* As ttun_session_take; the lowest type comes first. */
int control_queue_take(struct control_queue *q, struct ttun_control *frame, long milliseconds);

#endif
