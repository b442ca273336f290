#include "ring.h"

#include <assert.h>

void ring_init(struct ring *ring, uint8_t *memory, unsigned count) {
    pthread_mutex_init(&ring->lock, NULL);
    pthread_cond_init(&ring->work, NULL);
    pthread_cond_init(&ring->room, NULL);
    ring->count = count;
    for (unsigned i = 0; i < count; i++)
        ring->slots[i].bytes = memory + (size_t)i * SLOT_SIZE;
}

void ring_destroy(struct ring *ring) {
    pthread_cond_destroy(&ring->room);
    pthread_cond_destroy(&ring->work);
    pthread_mutex_destroy(&ring->lock);
}

void ring_close(struct ring *ring) {
    pthread_mutex_lock(&ring->lock);
    ring->closed = true;
    pthread_cond_signal(&ring->work);
    pthread_cond_signal(&ring->room);
    pthread_mutex_unlock(&ring->lock);
}

struct slot *ring_free_slot(struct ring *ring) {
    pthread_mutex_lock(&ring->lock);
    while (ring->filled == ring->count && !ring->closed)
        pthread_cond_wait(&ring->room, &ring->lock);
    unsigned next = (ring->first + ring->filled) % ring->count;
    struct slot *slot = ring->closed ? NULL : &ring->slots[next];
    pthread_mutex_unlock(&ring->lock);
    return slot;
}

bool ring_push(struct ring *ring, bool direct) {
    pthread_mutex_lock(&ring->lock);
    direct = direct && ring->filled == 0 && !ring->closed;
    ring->filled++;
    ring->emptying = ring->emptying || direct;
    if (!direct)
        pthread_cond_signal(&ring->work);
    pthread_mutex_unlock(&ring->lock);
    return direct;
}

struct slot *ring_take(struct ring *ring) {
    pthread_mutex_lock(&ring->lock);
    while ((ring->filled == 0 || ring->emptying) && !ring->closed)
        pthread_cond_wait(&ring->work, &ring->lock);
    struct slot *slot = NULL;
    if (!ring->closed) {
        slot = &ring->slots[ring->first];
        ring->emptying = true;
    }
    pthread_mutex_unlock(&ring->lock);
    return slot;
}

void ring_release(struct ring *ring) {
    pthread_mutex_lock(&ring->lock);
    assert(ring->filled > 0);
    ring->emptying = false;
    ring->first = (ring->first + 1) % ring->count;
    ring->filled--;
    pthread_cond_signal(&ring->room); /* free if no thread waits */
    pthread_mutex_unlock(&ring->lock);
}

void ring_return(struct ring *ring, bool unfinished) {
    pthread_mutex_lock(&ring->lock);
    assert(ring->filled == 1);
    ring->emptying = false;
    if (unfinished)
        pthread_cond_signal(&ring->work);
    else
        ring->filled = 0;
    pthread_mutex_unlock(&ring->lock);
}

unsigned ring_filled(struct ring *ring) {
    pthread_mutex_lock(&ring->lock);
    unsigned filled = ring->filled;
    pthread_mutex_unlock(&ring->lock);
    return filled;
}

uint64_t ring_waits_since(struct ring *ring) {
    pthread_mutex_lock(&ring->lock);
    uint64_t since = ring->filled > 0 ? ring->slots[ring->first].since : 0;
    pthread_mutex_unlock(&ring->lock);
    return since;
}

void ring_finish(struct ring *ring) {
    pthread_mutex_lock(&ring->lock);
    while (ring->filled > 0 && !ring->closed)
        pthread_cond_wait(&ring->room, &ring->lock);
    pthread_mutex_unlock(&ring->lock);
}
