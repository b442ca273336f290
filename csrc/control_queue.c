#define _DEFAULT_SOURCE /* explicit_bzero */
#include "control_queue.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <time.h>

int ttun_body_size(unsigned type) {
    switch (type) {
    case TTUN_PING:
    case TTUN_PONG:
        return TTUN_PING_SIZE;
    case TTUN_REKEY:
        return TTUN_BODY_MAX;
    case TTUN_SWITCH:
        return 0;
    default:
        return -1;
    }
}

void control_queue_init(struct control_queue *q) {
    pthread_condattr_t clock;
    memset(q, 0, sizeof *q);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&q->arrived, &clock);
    pthread_condattr_destroy(&clock);
    pthread_mutex_init(&q->lock, NULL);
}

void control_queue_destroy(struct control_queue *q) {
    pthread_cond_destroy(&q->arrived);
    pthread_mutex_destroy(&q->lock);
    explicit_bzero(q->bodies, sizeof q->bodies);
}

void control_queue_close(struct control_queue *q) {
    pthread_mutex_lock(&q->lock);
    q->closed = true;
    pthread_cond_broadcast(&q->arrived);
    pthread_mutex_unlock(&q->lock);
}

bool control_queue_post(struct control_queue *q, const struct ttun_control *frame) {
    int size = ttun_body_size(frame->type);
    assert(size >= 0);
    unsigned bit = 1u << frame->type;
    pthread_mutex_lock(&q->lock);
    memcpy(q->bodies[frame->type], frame->body, (size_t)size);
    bool was_empty = !(atomic_fetch_or(&q->filled, bit) & bit);
    pthread_cond_signal(&q->arrived);
    pthread_mutex_unlock(&q->lock);
    return was_empty;
}

int control_queue_take(struct control_queue *q, struct ttun_control *frame, long milliseconds) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += milliseconds / 1000;
    until.tv_nsec += milliseconds % 1000 * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    int taken = 0;
    pthread_mutex_lock(&q->lock);
    while (!q->closed && !control_queue_has(q) && milliseconds > 0)
        if (pthread_cond_timedwait(&q->arrived, &q->lock, &until) == ETIMEDOUT)
            break;
    if (q->closed)
        taken = -1;
    for (unsigned type = 0; type < TTUN_TYPES && taken == 0; type++) {
        if (!(q->filled & 1u << type))
            continue;
        frame->type = (uint8_t)type;
        memcpy(frame->body, q->bodies[type], sizeof frame->body);
        atomic_fetch_and(&q->filled, ~(1u << type));
        taken = 1;
    }
    pthread_mutex_unlock(&q->lock);
    return taken;
}
