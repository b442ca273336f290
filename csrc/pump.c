/* The way of a packet.
 *
 *     TUN --read--> [uplink seal] --lane--> [uplink send] --> TCP
 *     TUN <--write-- [downlink open] <--lane-- [downlink receive] <-- TCP
 *
 *  1. uplink seal: reads packets until the device has no more or the slot is full, cuts large ones
 *     into segments, and seals each into the slot, frame behind frame.
 *  2. uplink send: writes a slot to the socket, many frames per system call.
 *  3. downlink receive: reads as much as there is, and cuts it behind the last whole frame; the
 *     rest moves to the next slot.
 *  4. downlink open: opens each frame of a slot in place, merges packets that follow each other,
 *     and writes them to the device.
 *
 * Between the two threads of a direction lies a lane (lane.h). With `direct` the first one empties
 * a slot by itself whenever the second has nothing to do; a send that would block goes to the
 * second.
 *
 * The first end stays: session_end stores the reason once, closes both lanes, wakes the device's
 * poll and shuts the socket down, so that every thread comes back from wherever it waits.
 * All memory is taken in ttun_session_new. */
#define _GNU_SOURCE
#include "pump.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lane.h"
#include "offload.h"

enum {
    FRAME_MAX = TTUN_PREFIX + TTUN_LENGTH_MAX,
    /* The vnet header lies right before the packet, which starts on a multiple of 16. */
    SCRATCH_PACKET = 16,
    LARGE_BATCH = 64 * 1024, /* bytes of a slot from which on the uplink waits for its end */
    SCRATCH_SIZE = SCRATCH_PACKET + TTUN_PACKET_MAX,
    MEMORY_SIZE = 2 * SLOTS * SLOT_SIZE + SCRATCH_SIZE
};

static_assert(SLOT_SIZE >= 2 * FRAME_MAX,
              "a slot has room for the rest of a frame and a whole one");

struct ttun_session {
    int tun, socket;
    int wake; /* eventfd: the uplink is to look up from its device */
    bool direct;
    size_t vnet_size; /* of the header in front of each packet at the device, or 0 */
    struct ttun_cipher_state tx, rx;
    struct ttun_segmenter segmenter;
    struct ttun_coalescer coalescer;
    struct lane uplink, downlink;
    pthread_mutex_t delivery_lock;
    pthread_cond_t delivered;
    bool delivering;     /* the downlink writes a large batch to the device */
    unsigned deliveries; /* such batches so far */
    atomic_int end, end_detail;
    _Atomic uint64_t uplink_packets, uplink_bytes, downlink_packets, downlink_bytes;
    _Atomic uint64_t refused, empty, unsendable;
    uint8_t *memory;  /* of all slots, then the scratch */
    uint8_t *scratch; /* where the uplink reads to */
};

/* Each counter has one writer at a time, so a load and a store do and no bus lock is paid. */
static void count(_Atomic uint64_t *counter, uint64_t n) {
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n,
                          memory_order_relaxed);
}

/* ---- the session ---------------------------------------------------------------------------- */

struct ttun_session *ttun_session_new(int tun, int socket, int offload,
                                      const struct ttun_cipher_state *uplink,
                                      const struct ttun_cipher_state *downlink, int direct) {
    struct ttun_session *s = aligned_alloc(_Alignof(struct ttun_session), sizeof *s);
    if (s == NULL)
        return NULL;
    memset(s, 0, sizeof *s);
    s->tun = tun;
    s->socket = socket;
    s->direct = direct != 0;
    s->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->vnet_size = offload & TTUN_OFFLOAD_VNET ? sizeof(struct ttun_vnet) : 0;
    ttun_coalescer_init(&s->coalescer, offload & TTUN_OFFLOAD_TCP, offload & TTUN_OFFLOAD_UDP);
    s->memory = malloc(MEMORY_SIZE);
    if (s->wake < 0 || s->memory == NULL || lane_init(&s->uplink, s->memory) < 0)
        goto failed;
    if (lane_init(&s->downlink, s->memory + (size_t)SLOTS * SLOT_SIZE) < 0) {
        lane_destroy(&s->uplink);
        goto failed;
    }
    s->scratch = s->memory + (size_t)2 * SLOTS * SLOT_SIZE;
    pthread_mutex_init(&s->delivery_lock, NULL);
    pthread_cond_init(&s->delivered, NULL);
    s->tx = *uplink;
    s->rx = *downlink;
    return s;
failed:
    if (s->wake >= 0)
        close(s->wake);
    free(s->memory);
    free(s);
    return NULL;
}

void ttun_session_free(struct ttun_session *s) {
    if (s == NULL)
        return;
    ttun_cipher_wipe(&s->tx);
    ttun_cipher_wipe(&s->rx);
    lane_destroy(&s->uplink);
    lane_destroy(&s->downlink);
    pthread_cond_destroy(&s->delivered);
    pthread_mutex_destroy(&s->delivery_lock);
    close(s->wake);
    explicit_bzero(s->memory, MEMORY_SIZE); /* packets are secrets too */
    free(s->memory);
    free(s);
}

static void session_end(struct ttun_session *s, enum ttun_end why, int detail) {
    int running = TTUN_RUNNING;
    /* The detail is published by the store to `end`, so it is written first, by one thread only. */
    static const int claimed = -1;
    if (!atomic_compare_exchange_strong(&s->end, &running, claimed))
        return;
    atomic_store(&s->end_detail, detail);
    atomic_store(&s->end, (int)why);
    lane_close(&s->uplink);
    lane_close(&s->downlink);
    if (eventfd_write(s->wake, 1) < 0)
        assert(errno == EAGAIN); /* full is as good as written */
    shutdown(s->socket, SHUT_RDWR);
}

static bool is_over(struct ttun_session *s) {
    return atomic_load(&s->end) != TTUN_RUNNING;
}

void ttun_session_stop(struct ttun_session *s) {
    session_end(s, TTUN_END_STOPPED, 0);
}

int ttun_session_end(struct ttun_session *s, int *detail) {
    int end = atomic_load(&s->end);
    if (detail != NULL)
        *detail = atomic_load(&s->end_detail);
    return end < 0 ? TTUN_RUNNING : end; /* claimed, not yet told */
}

void ttun_session_counters(struct ttun_session *s, struct ttun_counters *out) {
    out->uplink_packets = atomic_load(&s->uplink_packets);
    out->uplink_bytes = atomic_load(&s->uplink_bytes);
    out->downlink_packets = atomic_load(&s->downlink_packets);
    out->downlink_bytes = atomic_load(&s->downlink_bytes);
    out->refused = atomic_load(&s->refused);
    out->empty = atomic_load(&s->empty);
    out->unsendable = atomic_load(&s->unsendable);
}

/* ---- uplink --------------------------------------------------------------------------------- */

/* Waits until the device has a packet or the session is over. */
static void await_device(struct ttun_session *s) {
    struct pollfd fds[] = {{.fd = s->tun, .events = POLLIN}, {.fd = s->wake, .events = POLLIN}};
    if (poll(fds, 2, -1) < 0 && errno != EINTR)
        session_end(s, TTUN_END_DEVICE, errno);
}

/* While the downlink delivers a batch, each packet of it may make the kernel answer with one of
 * ours (TCP's acknowledgements). Wait for the end of the batch and take them all at once: a
 * wake-up, a system call and a packet on the wire for each would cost more than the data. */
static void await_delivery(struct ttun_session *s) {
    pthread_mutex_lock(&s->delivery_lock);
    /* The end of this batch, not of all: the next may begin before this thread is awake. */
    unsigned seen = s->deliveries;
    while (s->delivering && s->deliveries == seen)
        pthread_cond_wait(&s->delivered, &s->delivery_lock);
    pthread_mutex_unlock(&s->delivery_lock);
}

static void set_delivering(struct ttun_session *s, bool delivering) {
    pthread_mutex_lock(&s->delivery_lock);
    s->delivering = delivering;
    if (!delivering) {
        s->deliveries++;
        pthread_cond_signal(&s->delivered);
    }
    pthread_mutex_unlock(&s->delivery_lock);
}

/* Reads the next packet of the device into the scratch and starts to segment it. Returns false when
 * there is none and `wait` is false, or when the session is over. */
static bool read_packet(struct ttun_session *s, bool wait) {
    uint8_t *packet = s->scratch + SCRATCH_PACKET;
    if (wait) {
        await_device(s);
        await_delivery(s);
    }
    while (!is_over(s)) {
        ssize_t size = read(s->tun, packet - s->vnet_size, s->vnet_size + TTUN_PACKET_MAX);
        if (size < 0 && errno == EAGAIN) {
            if (!wait)
                return false;
            await_device(s);
        } else if (size <= 0 && errno != EINTR) { /* 0: the end of a test's socketpair */
            session_end(s, TTUN_END_DEVICE, size < 0 ? errno : ENODEV);
        } else if (size >= (ssize_t)s->vnet_size) {
            struct ttun_vnet vnet = {0};
            memcpy(&vnet, packet - s->vnet_size, s->vnet_size);
            if (ttun_segment(&s->segmenter, &vnet, packet, (size_t)size - s->vnet_size))
                return true;
            count(&s->unsendable, 1);
        }
    }
    return false;
}

/* Fills the slot with at least one sealed packet; false when the session is over. A large packet
 * may go on in the next slot. */
static bool seal_batch(struct ttun_session *s, struct slot *slot) {
    uint64_t packets = 0, bytes = 0;
    slot->begin = slot->end = 0;
    while (SLOT_SIZE - slot->end >= FRAME_MAX) {
        size_t size;
        const uint8_t *packet = ttun_next_segment(&s->segmenter, &size);
        if (packet == NULL) {
            if (!read_packet(s, slot->end == 0))
                break;
            continue;
        }
        size_t framed = ttun_seal(&s->tx, slot->bytes + slot->end, packet, size);
        if (framed == 0 && s->tx.counter == UINT64_MAX) {
            session_end(s, TTUN_END_NONCES, 0);
            break;
        }
        if (framed == 0) {
            count(&s->unsendable, 1);
            continue;
        }
        slot->end += framed;
        packets++;
        bytes += size;
    }
    count(&s->uplink_packets, packets);
    count(&s->uplink_bytes, bytes);
    return !is_over(s);
}

/* Sends what is left of a slot. flags: MSG_DONTWAIT to stop when the socket is full. Returns
 * whether something is left. */
static bool send_slot(struct ttun_session *s, struct slot *slot, int flags) {
    while (slot->begin < slot->end && !is_over(s)) {
        ssize_t sent = send(s->socket, slot->bytes + slot->begin, slot->end - slot->begin,
                            flags | MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno == EAGAIN)
            return true;
        if (sent < 0) {
            session_end(s, TTUN_END_SOCKET, errno);
            return false;
        }
        slot->begin += (size_t)sent;
    }
    return false;
}

void ttun_uplink_seal(struct ttun_session *s) {
    prctl(PR_SET_NAME, "ttun-up-seal");
    struct slot *slot;
    while ((slot = lane_free_slot(&s->uplink)) != NULL && seal_batch(s, slot))
        if (lane_push(&s->uplink, s->direct))
            lane_return(&s->uplink, send_slot(s, slot, MSG_DONTWAIT));
}

void ttun_uplink_send(struct ttun_session *s) {
    prctl(PR_SET_NAME, "ttun-up-send");
    struct slot *slot;
    while ((slot = lane_take(&s->uplink)) != NULL) {
        send_slot(s, slot, 0);
        lane_release(&s->uplink);
    }
}

/* ---- downlink ------------------------------------------------------------------------------- */

/* Writes what the coalescer holds to the device; false when the device is gone. */
static bool write_merged(struct ttun_session *s) {
    uint64_t packets = s->coalescer.segments, bytes = 0;
    unsigned parts = ttun_flush(&s->coalescer);
    if (parts == 0)
        return true;
    unsigned skip = s->vnet_size == 0; /* the vnet header */
    ssize_t written;
    do
        written = writev(s->tun, s->coalescer.parts + skip, (int)(parts - skip));
    while (written < 0 && errno == EINTR);
    if (written < 0 && errno == EBADFD) { /* the device was removed */
        session_end(s, TTUN_END_DEVICE, errno);
        return false;
    }
    if (written < 0) {
        count(&s->refused, packets);
        return true;
    }
    for (unsigned i = 1; i < parts; i++)
        bytes += s->coalescer.parts[i].iov_len;
    bytes += (packets - 1) * s->coalescer.headers_size; /* as many as came in frames */
    count(&s->downlink_packets, packets);
    count(&s->downlink_bytes, bytes);
    return true;
}

/* Opens each frame of a slot and writes its packet to the device, merged with those before it where
 * they can be. */
static void open_frames(struct ttun_session *s, struct slot *slot) {
    while (slot->begin < slot->end && !is_over(s)) {
        uint8_t *packet = slot->bytes + slot->begin + TTUN_PREFIX;
        size_t length = ttun_frame_length(slot->bytes + slot->begin);
        slot->begin += TTUN_PREFIX + length;
        assert(slot->begin <= slot->end); /* a slot holds whole frames */
        ptrdiff_t size = ttun_open(&s->rx, packet, length);
        if (size < 0) {
            write_merged(s); /* what came before it counts */
            session_end(s, TTUN_END_TAG, (int)length);
            return;
        }
        if (size == 0) {
            count(&s->empty, 1);
            continue;
        }
        if (!ttun_coalesce(&s->coalescer, packet, (size_t)size)) {
            if (!write_merged(s))
                return;
            ttun_coalesce(&s->coalescer, packet, (size_t)size);
        }
    }
    write_merged(s); /* nothing waits for what may come later */
}

static void open_slot(struct ttun_session *s, struct slot *slot) {
    bool large = slot->end - slot->begin >= LARGE_BATCH;
    if (large)
        set_delivering(s, true);
    open_frames(s, slot);
    if (large)
        set_delivering(s, false);
}

void ttun_downlink_receive(struct ttun_session *s) {
    prctl(PR_SET_NAME, "ttun-down-recv");
    const uint8_t *rest = NULL; /* the beginning of a frame, in the slot before */
    size_t rest_size = 0;
    long bad = -1;
    struct slot *slot;
    while ((slot = lane_free_slot(&s->downlink)) != NULL) {
        if (rest_size > 0)
            memmove(slot->bytes, rest, rest_size);
        size_t size = rest_size, whole = 0;
        while (whole == 0 && bad < 0) {
            ssize_t got = recv(s->socket, slot->bytes + size, SLOT_SIZE - size, 0);
            if (got < 0 && errno == EINTR)
                continue;
            if (got <= 0) {
                int error = errno;
                lane_finish(&s->downlink); /* what came before the end still counts */
                if (got < 0)
                    session_end(s, TTUN_END_SOCKET, error);
                else
                    session_end(s, size > 0 ? TTUN_END_TRUNCATED : TTUN_END_CLOSED, (int)size);
                return;
            }
            size += (size_t)got;
            whole = ttun_whole_frames(slot->bytes, size, s->rx.tag_size, &bad);
        }
        slot->begin = 0;
        slot->end = whole;
        rest = slot->bytes + whole;
        rest_size = size - whole;
        if (whole > 0 && lane_push(&s->downlink, s->direct)) {
            open_slot(s, slot);
            lane_return(&s->downlink, false);
        }
        if (bad >= 0) { /* nothing behind it can be read; what came before it counts */
            lane_finish(&s->downlink);
            session_end(s, TTUN_END_LENGTH, (int)bad);
            return;
        }
    }
}

void ttun_downlink_open(struct ttun_session *s) {
    prctl(PR_SET_NAME, "ttun-down-open");
    struct slot *slot;
    while ((slot = lane_take(&s->downlink)) != NULL) {
        open_slot(s, slot);
        lane_release(&s->downlink);
    }
}

/* ---- beside the session --------------------------------------------------------------------- */

long ttun_drain(int tun, long most) {
    uint8_t first[sizeof(struct ttun_vnet) + 1]; /* a TUN read drops what does not fit */
    long drained = 0;
    while (drained < most && (read(tun, first, sizeof first) > 0 || errno == EINTR))
        drained++;
    return drained;
}

int ttun_forbid_dumps(void) {
    return prctl(PR_SET_DUMPABLE, 0);
}
