/* A ring buffer: slots between the two threads of one direction.
 *
 *  1. The first thread takes a free slot, fills it, and pushes it behind the others.
 *  2. The second one takes the oldest, empties it, and releases it.
 *
 * Waking a thread for a slot is dear where cores are scarce. So the first thread may ask to empty
 * the slot by itself (`direct`): it may when nothing is before it and nobody works, and it returns
 * the slot emptied, or unfinished for the second thread to go on. */
#ifndef TTUN_RING_H
#define TTUN_RING_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    SLOTS = 4,             /* of each ring, at most */
    SLOT_SIZE = 260 * 1024 /* bytes: four of the largest frames */
};

struct slot {
    uint8_t *bytes;    /* SLOT_SIZE of them */
    size_t begin, end; /* what is left to do: whole frames */
    uint64_t since;    /* when its first frame came, in microseconds; the uplink's only */
};

struct ring {
    pthread_mutex_t lock;
    pthread_cond_t work; /* the second thread waits for a filled slot */
    pthread_cond_t room; /* the first one for a free slot, or for all to be done */
    struct slot slots[SLOTS];
    unsigned count;  /* of slots in use, 1 to SLOTS */
    unsigned first;  /* the oldest filled slot, below count */
    unsigned filled; /* how many are filled, 0 to count */
    bool emptying;   /* some thread works on the oldest one: there is one then */
    bool closed;
};

/* Makes an empty one on count * SLOT_SIZE bytes of memory. Returns 0, or -1 with errno set. */
int ring_init(struct ring *ring, uint8_t *memory, unsigned count);

/* Only when no thread uses it any more. */
void ring_destroy(struct ring *ring);

/* Ends it: whoever waits comes back with nothing. */
void ring_close(struct ring *ring);

/* First thread: the next slot to fill, or NULL when the session is over. Waits for a free one. */
struct slot *ring_free_slot(struct ring *ring);

/* First thread: puts the slot that it filled behind the others. With `direct`, true when nothing
 * was before it, so that nobody works: the caller then empties it and calls ring_return. */
bool ring_push(struct ring *ring, bool direct);

/* Second thread: the oldest filled slot, or NULL when the session is over. */
struct slot *ring_take(struct ring *ring);

/* Second thread: gives the emptied slot back. */
void ring_release(struct ring *ring);

/* First thread, when ring_push left the slot to it: emptied, the slot is the next one to fill,
 * while it is in the cache; `unfinished`, the second thread goes on with it. */
void ring_return(struct ring *ring, bool unfinished);

/* First thread: how many are filled. */
unsigned ring_filled(struct ring *ring);

/* First thread: since when the oldest filled slot has waited, or 0 when none is filled. */
uint64_t ring_waits_since(struct ring *ring);

/* First thread: waits until all that it handed over is done. */
void ring_finish(struct ring *ring);

#endif
