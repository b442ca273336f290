/* Creates and ends a session, and gives Python access to its counters, control frames and keys.
 *
 * ttun_session_new allocates all memory and the one descriptor: mutexes and condition variables
 * need neither in glibc and musl, so making them cannot fail. */
#define _GNU_SOURCE
#include "internal.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { NONBLOCK = 1 }; /* GRND_NONBLOCK of linux/random.h, which musl-gcc does not find */

uint64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

struct ttun_session *ttun_session_new(int tun, int socket, int offload, int wire,
                                      const struct ttun_cipher_state *uplink,
                                      const struct ttun_cipher_state *downlink, int direct,
                                      unsigned slots, size_t queue) {
    if (slots < 1 || slots > SLOTS || queue % FQ_CELL != 0 || queue < 2 * SCRATCH_SIZE ||
        queue / FQ_CELL > FQ_CELLS_MAX) {
        errno = EINVAL;
        return NULL;
    }
    struct ttun_session *s = aligned_alloc(_Alignof(struct ttun_session), sizeof *s);
    if (s == NULL)
        return NULL;
    *s = (struct ttun_session){
        .tun = tun,
        .socket = socket,
        .direct = direct,
        .wire = wire,
        .vnet_size = offload & TTUN_OFFLOAD_VNET ? sizeof(struct ttun_vnet) : 0,
        .tag_size = downlink->tag_size,
        .last_received = now_ms(),
        .keys_lock = PTHREAD_MUTEX_INITIALIZER,
        .delivery_lock = PTHREAD_MUTEX_INITIALIZER,
        .delivered = PTHREAD_COND_INITIALIZER,
    };
    ttun_coalescer_init(&s->coalescer, offload & TTUN_OFFLOAD_TCP, offload & TTUN_OFFLOAD_UDP);
    size_t ring_size = (size_t)slots * SLOT_SIZE;
    s->memory_size = 2 * ring_size + 2 * SCRATCH_SIZE;
    s->memory = malloc(s->memory_size + queue); /* the kernel commits only what is used */
    if (s->memory == NULL)
        goto no_memory;
    s->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->wake < 0)
        goto no_eventfd;
    ring_init(&s->uplink, s->memory, slots);
    ring_init(&s->downlink, s->memory + ring_size, slots);
    control_queue_init(&s->inbox);
    control_queue_init(&s->outbox);
    s->scratch = s->memory + 2 * ring_size;
    s->taken = s->scratch + SCRATCH_SIZE;
    uint64_t salt = now_us(); /* stays if random numbers are not available yet, at boot */
    syscall(SYS_getrandom, &salt, sizeof salt, NONBLOCK); /* glibc 2.17 has no getrandom() */
    ttun_fq_init(&s->queue, s->memory + s->memory_size, queue, salt);
    connection_init(&s->connection, socket, slots);
    s->tx.now = *uplink;
    s->rx.now = *downlink;
    return s;
no_eventfd:
    free(s->memory);
no_memory:
    free(s);
    return NULL;
}

void ttun_session_free(struct ttun_session *s) {
    if (s == NULL)
        return;
    explicit_bzero(&s->tx, sizeof s->tx);
    explicit_bzero(&s->rx, sizeof s->rx);
    ring_destroy(&s->uplink);
    ring_destroy(&s->downlink);
    control_queue_destroy(&s->inbox);
    control_queue_destroy(&s->outbox);
    pthread_mutex_destroy(&s->keys_lock);
    pthread_cond_destroy(&s->delivered);
    pthread_mutex_destroy(&s->delivery_lock);
    close(s->wake);
    explicit_bzero(s->memory, s->memory_size); /* packets are secret too */
    ttun_fq_wipe(&s->queue);
    free(s->memory);
    free(s);
}

void wake_uplink(struct ttun_session *s) {
    if (eventfd_write(s->wake, 1) < 0)
        assert(errno == EAGAIN); /* already set */
}

void end_session(struct ttun_session *s, enum ttun_reason why, int detail) {
    int running = TTUN_RUNNING;
    /* The store to `reason` publishes the detail, so write the detail first, by one thread only. */
    if (!atomic_compare_exchange_strong(&s->reason, &running, ENDING))
        return;
    atomic_store(&s->reason_detail, detail);
    atomic_store(&s->reason, (int)why);
    ring_close(&s->uplink);
    ring_close(&s->downlink);
    control_queue_close(&s->inbox);
    wake_uplink(s);
    shutdown(s->socket, SHUT_RDWR);
}

void ttun_session_stop(struct ttun_session *s) {
    end_session(s, TTUN_END_STOPPED, 0);
}

int ttun_session_reason(struct ttun_session *s, int *detail) {
    int reason = atomic_load(&s->reason);
    if (detail != NULL)
        *detail = atomic_load(&s->reason_detail);
    return reason == ENDING ? TTUN_RUNNING : reason;
}

uint64_t ttun_session_counter(struct ttun_session *s, enum ttun_counter which) {
    return atomic_load(&s->counters[which]);
}

uint64_t ttun_session_silence(struct ttun_session *s) {
    uint64_t last_received = atomic_load(&s->last_received), now = now_ms();
    return now > last_received ? now - last_received : 0; /* two processors, two views of it */
}

/* ---- control frames and keys ---------------------------------------------------------------- */

int ttun_session_take(struct ttun_session *s, struct ttun_control *frame, long milliseconds) {
    return control_queue_take(&s->inbox, frame, milliseconds);
}

void ttun_session_post(struct ttun_session *s, const struct ttun_control *frame) {
    control_queue_post(&s->outbox, frame);
    wake_uplink(s);
}

bool ttun_session_rekey(struct ttun_session *s, const struct ttun_cipher_state *uplink,
                        const struct ttun_cipher_state *downlink) {
    pthread_mutex_lock(&s->keys_lock);
    bool free = !s->tx.ready && !s->rx.ready && downlink->tag_size == s->tag_size;
    if (free) {
        s->tx.next = *uplink;
        s->rx.next = *downlink;
        s->tx.ready = s->rx.ready = true;
    }
    pthread_mutex_unlock(&s->keys_lock);
    return free;
}

bool next_key(struct ttun_session *s, struct keys *keys) {
    pthread_mutex_lock(&s->keys_lock);
    bool ready = keys->ready;
    if (ready) {
        keys->now = keys->next;
        keys->ready = false;
    }
    pthread_mutex_unlock(&s->keys_lock);
    return ready;
}

/* ---- device --------------------------------------------------------------------------------- */

long ttun_drain(int tun, long most) {
    uint8_t first[sizeof(struct ttun_vnet) + 1]; /* a TUN read truncates the packet */
    long drained = 0;
    while (drained < most && (read(tun, first, sizeof first) > 0 || errno == EINTR))
        drained++;
    return drained;
}
