/* A ring buffer: slots between the two threads of one direction.
 *
 *  1. The first thread (producer) gets a free slot, fills it, and pushes it.
 *  2. The second thread (consumer) takes the oldest slot, empties it, and releases it.
 *
 * Waking a thread for each slot is expensive with few cores. With `direct`, the producer may empty
 * the slot itself if the ring is otherwise empty and the consumer idle. It then returns the slot
 * emptied, or unfinished for the consumer to continue. */
#ifndef TTUN_RING_H
#define TTUN_RING_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    SLOTS = 4,             /* per ring, at most */
    SLOT_SIZE = 260 * 1024 /* bytes: four of the largest frames */
};

struct slot {
    uint8_t *bytes;    /* SLOT_SIZE bytes */
    size_t begin, end; /* offsets of the remaining data: complete frames */
    uint64_t since;    /* start of its first frame, microseconds; uplink only */
};

struct ring {
    pthread_mutex_t lock;
    pthread_cond_t work; /* the consumer waits for a filled slot */
    pthread_cond_t room; /* the producer waits for a free slot, or an empty ring */
    struct slot slots[SLOTS];
    unsigned count;  /* of slots, 1 to SLOTS */
    unsigned first;  /* index of the oldest filled slot */
    unsigned filled; /* number of filled slots */
    bool emptying;   /* a thread is emptying the oldest slot */
    bool closed;
};

/* Initializes an empty ring on count * SLOT_SIZE bytes. */
void ring_init(struct ring *ring, uint8_t *memory, unsigned count);

/* Destroys it. No thread may use it any more. */
void ring_destroy(struct ring *ring);

/* Closes it: waiting threads return without a slot. */
void ring_close(struct ring *ring);

/* Producer: returns the next slot to fill, or NULL if closed. Waits for a free one. */
struct slot *ring_free_slot(struct ring *ring);

/* Producer: pushes the filled slot. With `direct`, returns true if the ring was empty: the caller
 * then empties the slot itself and calls ring_return. */
bool ring_push(struct ring *ring, bool direct);

/* Consumer: returns the oldest filled slot, or NULL if closed. Waits for one. */
struct slot *ring_take(struct ring *ring);

/* Consumer: frees the emptied slot. */
void ring_release(struct ring *ring);

/* Producer, after ring_push returned true: an emptied slot is the next one to fill, as it is in the
 * cache; an `unfinished` one is left to the consumer. */
void ring_return(struct ring *ring, bool unfinished);

/* Producer: returns the number of filled slots. */
unsigned ring_filled(struct ring *ring);

/* Producer: returns `since` of the oldest filled slot, or 0 if there is none. */
uint64_t ring_waits_since(struct ring *ring);

/* Producer: waits until all slots are empty. */
void ring_finish(struct ring *ring);

#endif
