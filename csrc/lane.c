#include "lane.h"

#include <assert.h>
#include <errno.h>

int lane_init(struct lane *lane, uint8_t *memory, unsigned count) {
    if ((errno = pthread_mutex_init(&lane->lock, NULL)) != 0)
        return -1;
    if ((errno = pthread_cond_init(&lane->work, NULL)) != 0) {
        pthread_mutex_destroy(&lane->lock);
        return -1;
    }
    if ((errno = pthread_cond_init(&lane->room, NULL)) != 0) {
        pthread_cond_destroy(&lane->work);
        pthread_mutex_destroy(&lane->lock);
        return -1;
    }
    lane->count = count;
    for (unsigned i = 0; i < count; i++)
        lane->slots[i].bytes = memory + (size_t)i * SLOT_SIZE;
    return 0;
}

void lane_destroy(struct lane *lane) {
    pthread_cond_destroy(&lane->room);
    pthread_cond_destroy(&lane->work);
    pthread_mutex_destroy(&lane->lock);
}

void lane_close(struct lane *lane) {
    pthread_mutex_lock(&lane->lock);
    lane->closed = true;
    pthread_cond_signal(&lane->work);
    pthread_cond_signal(&lane->room);
    pthread_mutex_unlock(&lane->lock);
}

struct slot *lane_free_slot(struct lane *lane) {
    pthread_mutex_lock(&lane->lock);
    while (lane->filled == lane->count && !lane->closed)
        pthread_cond_wait(&lane->room, &lane->lock);
    unsigned next = (lane->first + lane->filled) % lane->count;
    struct slot *slot = lane->closed ? NULL : &lane->slots[next];
    pthread_mutex_unlock(&lane->lock);
    return slot;
}

bool lane_push(struct lane *lane, bool direct) {
    pthread_mutex_lock(&lane->lock);
    direct = direct && lane->filled == 0 && !lane->closed;
    lane->filled++;
    lane->emptying = lane->emptying || direct;
    if (!direct)
        pthread_cond_signal(&lane->work);
    pthread_mutex_unlock(&lane->lock);
    return direct;
}

struct slot *lane_take(struct lane *lane) {
    pthread_mutex_lock(&lane->lock);
    while ((lane->filled == 0 || lane->emptying) && !lane->closed)
        pthread_cond_wait(&lane->work, &lane->lock);
    struct slot *slot = NULL;
    if (!lane->closed) {
        slot = &lane->slots[lane->first];
        lane->emptying = true;
    }
    pthread_mutex_unlock(&lane->lock);
    return slot;
}

void lane_release(struct lane *lane) {
    pthread_mutex_lock(&lane->lock);
    assert(lane->filled > 0);
    lane->emptying = false;
    lane->first = (lane->first + 1) % lane->count;
    lane->filled--;
    pthread_cond_signal(&lane->room); /* costs nothing while nobody waits */
    pthread_mutex_unlock(&lane->lock);
}

void lane_return(struct lane *lane, bool unfinished) {
    pthread_mutex_lock(&lane->lock);
    assert(lane->filled == 1);
    lane->emptying = false;
    if (unfinished)
        pthread_cond_signal(&lane->work);
    else
        lane->filled = 0;
    pthread_mutex_unlock(&lane->lock);
}

unsigned lane_filled(struct lane *lane) {
    pthread_mutex_lock(&lane->lock);
    unsigned filled = lane->filled;
    pthread_mutex_unlock(&lane->lock);
    return filled;
}

uint64_t lane_waits_since(struct lane *lane) {
    pthread_mutex_lock(&lane->lock);
    uint64_t since = lane->filled > 0 ? lane->slots[lane->first].since : 0;
    pthread_mutex_unlock(&lane->lock);
    return since;
}

void lane_finish(struct lane *lane) {
    pthread_mutex_lock(&lane->lock);
    while (lane->filled > 0 && !lane->closed)
        pthread_cond_wait(&lane->room, &lane->lock);
    pthread_mutex_unlock(&lane->lock);
}
