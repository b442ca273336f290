/* The control law of RFC 8289, section 5. */
#include "codel.h"

/* Returns interval / sqrt(n). */
static uint64_t gap(uint64_t interval, uint32_t n) {
    uint64_t root = 16; /* 16 * sqrt(n), rounded down; at most 1,600, so a loop is fine */
    while ((root + 1) * (root + 1) <= (uint64_t)n * 256)
        root++;
    return interval * 16 / root;
}

void ttun_codel_watch(struct ttun_codel *codel, uint64_t now, uint64_t delay,
                      const struct ttun_codel_pace *pace) {
    if (delay < pace->target) {
        codel->above = 0;
        codel->dropping = codel->due = false;
        return;
    }
    if (codel->above == 0)
        codel->above = now + pace->interval;
    if (now < codel->above || (codel->dropping && now < codel->next))
        return;
    if (codel->dropping) {
        if (codel->count < TTUN_CODEL_COUNT)
            codel->count++;
        codel->next += gap(pace->interval, codel->count);
    } else {
        /* Soon after the last episode, resume near its drop rate. */
        bool soon = now < codel->next + 16 * pace->interval && codel->count > 2;
        codel->count = soon ? codel->count - 2 : 1;
        codel->next = now + gap(pace->interval, codel->count);
        codel->dropping = true;
    }
    codel->due = true;
}

bool ttun_codel_drops(struct ttun_codel *codel, size_t size) {
    if (!codel->due || size <= TTUN_CODEL_SPARED)
        return false;
    codel->due = false;
    return true;
}
