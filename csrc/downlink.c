/* The downlink, from the connection to the device; session.h has the overview. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "internal.h"

enum { LARGE_BATCH = 64 * 1024 /* bytes in a slot; see await_delivery */ };

static_assert(SLOT_SIZE >= 2 * FRAME_MAX, "a slot has room for a partial and a complete frame");

/* Marks the start or end of a large batch, for await_delivery. */
static void set_delivering(struct ttun_session *s, bool delivering) {
    pthread_mutex_lock(&s->delivery_lock);
    s->delivering = delivering;
    if (!delivering) {
        s->deliveries++;
        pthread_cond_signal(&s->delivered);
    }
    pthread_mutex_unlock(&s->delivery_lock);
}

/* Writes one packet to the device; parts[0] is its vnet header. packets, bytes: to count. Returns
 * false if the device was removed. */
static bool write_packet(struct ttun_session *s, const struct iovec *parts, unsigned n,
                         uint64_t packets, uint64_t bytes) {
    unsigned skip = s->vnet_size == 0; /* the vnet header */
    ssize_t written;
    do
        written = writev(s->tun, parts + skip, (int)(n - skip));
    while (written < 0 && errno == EINTR);
    if (written >= 0) {
        count(s, TTUN_COUNT_DOWNLINK_PACKETS, packets);
        count(s, TTUN_COUNT_DOWNLINK_BYTES, bytes);
    } else if (errno == EBADFD) { /* the device was removed */
        end_session(s, TTUN_END_DEVICE, errno);
        return false;
    } else {
        count(s, TTUN_COUNT_REFUSED, packets);
    }
    return true;
}

/* Flushes the coalescer to the device. Returns false if the device was removed. */
static bool flush_coalescer(struct ttun_session *s) {
    uint64_t packets = s->coalescer.segments, bytes = 0;
    unsigned parts = ttun_flush(&s->coalescer);
    if (parts == 0)
        return true;
    for (unsigned i = 1; i < parts; i++)
        bytes += s->coalescer.parts[i].iov_len;
    bytes += (packets - 1) * s->coalescer.layout.headers_size; /* as they were in frames */
    return write_packet(s, s->coalescer.parts, parts, packets, bytes);
}

/* Restores the vnet header of an offloaded packet and writes it to the device. */
static bool write_offloaded(struct ttun_session *s, uint8_t *plaintext, size_t size) {
    struct ttun_vnet vnet;
    if (size <= TTUN_OFFLOADED_PREFIX ||
        !ttun_restore_vnet(&vnet, plaintext + TTUN_OFFLOADED_PREFIX, size - TTUN_OFFLOADED_PREFIX,
                           (uint16_t)(plaintext[1] << 8 | plaintext[2]), s->coalescer.tcp,
                           s->coalescer.udp)) {
        count(s, TTUN_COUNT_FORGED, 1);
        return true;
    }
    const struct iovec parts[] = {
        {.iov_base = &vnet, .iov_len = sizeof vnet},
        {.iov_base = plaintext + TTUN_OFFLOADED_PREFIX, .iov_len = size - TTUN_OFFLOADED_PREFIX}};
    return write_packet(s, parts, 2, 1, size - TTUN_OFFLOADED_PREFIX);
}

/* Passes a control frame to Python. Returns false if that ended the session. */
static bool receive_control(struct ttun_session *s, const uint8_t *plaintext, size_t size) {
    struct ttun_control frame = {.type = plaintext[0]};
    int body_size = ttun_body_size(frame.type);
    if (body_size < 0) {
        count(s, TTUN_COUNT_IGNORED, 1);
        return true;
    }
    bool fine = size == 1 + (size_t)body_size;
    if (fine && frame.type == TTUN_SWITCH)
        fine = next_key(s, &s->rx);
    if (fine) {
        memcpy(frame.body, plaintext + 1, (size_t)body_size);
        /* A PING may replace another, but a REKEY must not be lost. */
        fine = control_queue_post(&s->inbox, &frame) || frame.type != TTUN_REKEY;
    }
    if (!fine)
        end_session(s, TTUN_END_CONTROL, frame.type);
    return fine;
}

/* Processes the plaintext of a frame. Returns false when the session has ended. */
static bool deliver(struct ttun_session *s, uint8_t *plaintext, size_t size) {
    if (s->wire != 0 && !is_ip(plaintext)) {
        if (plaintext[0] == TTUN_OFFLOADED)
            return flush_coalescer(s) && write_offloaded(s, plaintext, size);
        return receive_control(s, plaintext, size);
    }
    if (ttun_coalesce(&s->coalescer, plaintext, size))
        return true;
    return flush_coalescer(s) && ttun_coalesce(&s->coalescer, plaintext, size);
}

/* Opens each frame of a slot and delivers its content, coalescing packets where possible. */
static void open_frames(struct ttun_session *s, struct slot *slot) {
    while (slot->begin < slot->end && !is_over(s)) {
        uint8_t *plaintext = slot->bytes + slot->begin + TTUN_PREFIX;
        size_t length = ttun_frame_length(slot->bytes + slot->begin);
        slot->begin += TTUN_PREFIX + length;
        assert(slot->begin <= slot->end); /* a slot holds complete frames */
        ptrdiff_t size = ttun_open(&s->rx.now, plaintext, length);
        if (size < 0) {
            flush_coalescer(s); /* deliver what came before */
            end_session(s, TTUN_END_TAG, (int)length);
            return;
        }
        if (size == 0)
            count(s, TTUN_COUNT_EMPTY, 1);
        else if (!deliver(s, plaintext, (size_t)size))
            break;
    }
    flush_coalescer(s); /* do not hold packets back for later ones */
    atomic_store_explicit(&s->last_received, now_ms(), memory_order_relaxed);
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
    const uint8_t *rest = NULL; /* partial frame, in the previous slot */
    size_t rest_size = 0;
    long bad = -1;
    struct slot *slot;
    while ((slot = ring_free_slot(&s->downlink)) != NULL) {
        if (rest_size > 0)
            memmove(slot->bytes, rest, rest_size);
        size_t size = rest_size, whole = 0;
        while (whole == 0 && bad < 0) {
            ssize_t got = recv(s->socket, slot->bytes + size, SLOT_SIZE - size, 0);
            if (got < 0 && errno == EAGAIN) { /* another holder of the socket set O_NONBLOCK */
                struct pollfd fd = {.fd = s->socket, .events = POLLIN};
                poll(&fd, 1, -1);
                continue;
            }
            if (got < 0 && errno == EINTR)
                continue;
            if (got <= 0) {
                int error = errno;
                ring_finish(&s->downlink); /* deliver the frames before the end */
                if (got < 0)
                    end_session(s, TTUN_END_SOCKET, error);
                else
                    end_session(s, size > 0 ? TTUN_END_TRUNCATED : TTUN_END_CLOSED, (int)size);
                return;
            }
            size += (size_t)got;
            whole = ttun_whole_frames(slot->bytes, size, s->tag_size, &bad);
        }
        slot->begin = 0;
        slot->end = whole;
        rest = slot->bytes + whole;
        rest_size = size - whole;
        if (whole > 0 && ring_push(&s->downlink, s->direct)) {
            open_slot(s, slot);
            ring_return(&s->downlink, false);
        }
        if (bad >= 0) { /* nothing after it can be parsed; deliver what came before */
            ring_finish(&s->downlink);
            end_session(s, TTUN_END_LENGTH, (int)bad);
            return;
        }
    }
}

void ttun_downlink_open(struct ttun_session *s) {
    prctl(PR_SET_NAME, "ttun-down-open");
    struct slot *slot;
    while ((slot = ring_take(&s->downlink)) != NULL) {
        open_slot(s, slot);
        ring_release(&s->downlink);
    }
}
