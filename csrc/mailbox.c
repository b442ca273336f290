#define _DEFAULT_SOURCE /* explicit_bzero */
#include "mailbox.h"

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

int mailbox_init(struct mailbox *m) {
    pthread_condattr_t clock;
    memset(m, 0, sizeof *m);
    if ((errno = pthread_condattr_init(&clock)) != 0)
        return -1;
    errno = pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    if (errno == 0)
        errno = pthread_cond_init(&m->arrived, &clock);
    pthread_condattr_destroy(&clock);
    if (errno != 0)
        return -1;
    if ((errno = pthread_mutex_init(&m->lock, NULL)) != 0) {
        pthread_cond_destroy(&m->arrived);
        return -1;
    }
    return 0;
}

void mailbox_destroy(struct mailbox *m) {
    pthread_cond_destroy(&m->arrived);
    pthread_mutex_destroy(&m->lock);
    explicit_bzero(m->bodies, sizeof m->bodies);
}

void mailbox_close(struct mailbox *m) {
    pthread_mutex_lock(&m->lock);
    m->closed = true;
    pthread_cond_broadcast(&m->arrived);
    pthread_mutex_unlock(&m->lock);
}

bool mailbox_post(struct mailbox *m, const struct ttun_control *frame) {
    int size = ttun_body_size(frame->type);
    assert(size >= 0);
    unsigned bit = 1u << frame->type;
    pthread_mutex_lock(&m->lock);
    memcpy(m->bodies[frame->type], frame->body, (size_t)size);
    bool was_empty = !(atomic_fetch_or(&m->filled, bit) & bit);
    pthread_cond_signal(&m->arrived);
    pthread_mutex_unlock(&m->lock);
    return was_empty;
}

int mailbox_take(struct mailbox *m, struct ttun_control *frame, long milliseconds) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += milliseconds / 1000;
    until.tv_nsec += milliseconds % 1000 * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    int taken = 0;
    pthread_mutex_lock(&m->lock);
    while (!m->closed && !mailbox_has(m) && milliseconds > 0)
        if (pthread_cond_timedwait(&m->arrived, &m->lock, &until) == ETIMEDOUT)
            break;
    if (m->closed)
        taken = -1;
    for (unsigned type = 0; type < TTUN_TYPES && taken == 0; type++) {
        if (!(m->filled & 1u << type))
            continue;
        frame->type = (uint8_t)type;
        memcpy(frame->body, m->bodies[type], sizeof frame->body);
        atomic_fetch_and(&m->filled, ~(1u << type));
        taken = 1;
    }
    pthread_mutex_unlock(&m->lock);
    return taken;
}
