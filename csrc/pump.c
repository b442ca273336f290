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
 * On wire x1 a packet that the kernel left whole travels whole, and there are control frames. What
 * the peer sends goes to an inbox, what Python answers comes from an outbox: the uplink looks there
 * before each batch. The keys change with SWITCH, the last frame under the old key of its
 * direction; the next keys are there before, so nobody waits for them.
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
#include <time.h>
#include <unistd.h>

#include "lane.h"
#include "offload.h"

enum {
    FRAME_MAX = TTUN_PREFIX + TTUN_LENGTH_MAX,
    /* The vnet header lies right before the packet, which starts on a multiple of 16. */
    SCRATCH_PACKET = 16,
    WHOLE = 3,               /* bytes in front of an offloaded packet: its type and its gso_size */
    LARGE_BATCH = 64 * 1024, /* bytes of a slot from which on the uplink waits for its end */
    SCRATCH_SIZE = SCRATCH_PACKET + TTUN_PACKET_MAX,
    MEMORY_SIZE = 2 * SLOTS * SLOT_SIZE + SCRATCH_SIZE
};

static_assert(SLOT_SIZE >= 2 * FRAME_MAX,
              "a slot has room for the rest of a frame and a whole one");
static_assert((TTUN_PREFIX + 1 + TTUN_BODY_MAX + TTUN_TAG_MAX) * TTUN_TYPES < FRAME_MAX,
              "all control frames fit in front of the first packet of a slot");

/* The keys of one direction, and those that follow them. */
struct keys {
    struct ttun_cipher_state now, next;
    bool ready; /* next is set */
};

struct ttun_session {
    int tun, socket;
    int wake; /* eventfd: the uplink is to look up from its device */
    bool direct;
    size_t vnet_size; /* of the header in front of each packet at the device, or 0 */
    int wire;         /* 0, or TTUN_X1 and what the peer's device takes */
    uint32_t tag_size;
    struct keys tx, rx;
    pthread_mutex_t keys_lock; /* over next and ready of both */
    struct mailbox inbox, outbox;
    _Atomic uint64_t heard; /* when a frame was opened last, in milliseconds */
    struct ttun_segmenter segmenter;
    struct ttun_coalescer coalescer;
    struct lane uplink, downlink;
    pthread_mutex_t delivery_lock;
    pthread_cond_t delivered;
    bool delivering;     /* the downlink writes a large batch to the device */
    unsigned deliveries; /* such batches so far */
    atomic_int end, end_detail;
    _Atomic uint64_t uplink_packets, uplink_bytes, downlink_packets, downlink_bytes;
    _Atomic uint64_t refused, empty, unsendable, ignored, forged, sent;
    uint8_t *memory;  /* of all slots, then the scratch */
    uint8_t *scratch; /* where the uplink reads to */
};

/* Each counter has one writer at a time, so a load and a store do and no bus lock is paid. */
static void count(_Atomic uint64_t *counter, uint64_t n) {
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n,
                          memory_order_relaxed);
}

/* ---- the session ---------------------------------------------------------------------------- */

static uint64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

struct ttun_session *ttun_session_new(int tun, int socket, int offload, int wire,
                                      const struct ttun_cipher_state *uplink,
                                      const struct ttun_cipher_state *downlink, int direct) {
    struct ttun_session *s = aligned_alloc(_Alignof(struct ttun_session), sizeof *s);
    if (s == NULL)
        return NULL;
    memset(s, 0, sizeof *s);
    s->tun = tun;
    s->socket = socket;
    s->direct = direct != 0;
    s->wire = wire;
    s->vnet_size = offload & TTUN_OFFLOAD_VNET ? sizeof(struct ttun_vnet) : 0;
    ttun_coalescer_init(&s->coalescer, offload & TTUN_OFFLOAD_TCP, offload & TTUN_OFFLOAD_UDP);
    s->memory = malloc(MEMORY_SIZE);
    if (s->memory == NULL)
        goto no_memory;
    s->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->wake < 0)
        goto no_eventfd;
    if (lane_init(&s->uplink, s->memory) < 0)
        goto no_uplink;
    if (lane_init(&s->downlink, s->memory + (size_t)SLOTS * SLOT_SIZE) < 0)
        goto no_downlink;
    if (mailbox_init(&s->inbox) < 0)
        goto no_inbox;
    if (mailbox_init(&s->outbox) < 0)
        goto no_outbox;
    s->scratch = s->memory + (size_t)2 * SLOTS * SLOT_SIZE;
    pthread_mutex_init(&s->delivery_lock, NULL);
    pthread_cond_init(&s->delivered, NULL);
    pthread_mutex_init(&s->keys_lock, NULL);
    s->tx.now = *uplink;
    s->rx.now = *downlink;
    s->tag_size = downlink->tag_size;
    s->heard = now_ms();
    return s;
no_outbox:
    mailbox_destroy(&s->inbox);
no_inbox:
    lane_destroy(&s->downlink);
no_downlink:
    lane_destroy(&s->uplink);
no_uplink:
    close(s->wake);
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
    lane_destroy(&s->uplink);
    lane_destroy(&s->downlink);
    mailbox_destroy(&s->inbox);
    mailbox_destroy(&s->outbox);
    pthread_mutex_destroy(&s->keys_lock);
    pthread_cond_destroy(&s->delivered);
    pthread_mutex_destroy(&s->delivery_lock);
    close(s->wake);
    explicit_bzero(s->memory, MEMORY_SIZE); /* packets are secrets too */
    free(s->memory);
    free(s);
}

static void wake_uplink(struct ttun_session *s) {
    if (eventfd_write(s->wake, 1) < 0)
        assert(errno == EAGAIN); /* full is as good as written */
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
    mailbox_close(&s->inbox);
    wake_uplink(s);
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
    out->ignored = atomic_load(&s->ignored);
    out->forged = atomic_load(&s->forged);
    out->sent = atomic_load(&s->sent);
}

uint64_t ttun_session_silence(struct ttun_session *s) {
    uint64_t heard = atomic_load(&s->heard), now = now_ms();
    return now > heard ? now - heard : 0;
}

/* ---- control frames and keys ---------------------------------------------------------------- */

int ttun_session_take(struct ttun_session *s, struct ttun_control *frame, long milliseconds) {
    return mailbox_take(&s->inbox, frame, milliseconds);
}

void ttun_session_post(struct ttun_session *s, const struct ttun_control *frame) {
    mailbox_post(&s->outbox, frame);
    wake_uplink(s);
}

int ttun_session_rekey(struct ttun_session *s, const struct ttun_cipher_state *uplink,
                       const struct ttun_cipher_state *downlink) {
    pthread_mutex_lock(&s->keys_lock);
    bool free = !s->tx.ready && !s->rx.ready && downlink->tag_size == s->tag_size;
    if (free) {
        s->tx.next = *uplink;
        s->rx.next = *downlink;
        s->tx.ready = s->rx.ready = true;
    }
    pthread_mutex_unlock(&s->keys_lock);
    return free ? 0 : -1;
}

/* Puts the next key of a direction in the place of the one that saw its last frame. Returns false
 * when there is no next one. */
static bool next_key(struct ttun_session *s, struct keys *keys) {
    pthread_mutex_lock(&s->keys_lock);
    bool ready = keys->ready;
    if (ready) {
        keys->now = keys->next;
        ttun_cipher_wipe(&keys->next);
        keys->ready = false;
    }
    pthread_mutex_unlock(&s->keys_lock);
    return ready;
}

/* ---- uplink --------------------------------------------------------------------------------- */

/* Waits until the device has a packet, there is a control frame to send, or the session is over. */
static void await_device(struct ttun_session *s) {
    struct pollfd fds[] = {{.fd = s->tun, .events = POLLIN}, {.fd = s->wake, .events = POLLIN}};
    if (poll(fds, 2, -1) < 0) {
        if (errno != EINTR)
            session_end(s, TTUN_END_DEVICE, errno);
    } else if (fds[1].revents != 0) {
        eventfd_t rings;
        if (eventfd_read(s->wake, &rings) < 0)
            assert(errno == EAGAIN);
    }
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

static bool is_ip(const uint8_t *packet) {
    return packet[0] >> 4 == 4 || packet[0] >> 4 == 6;
}

/* Starts on a packet in the scratch: whole where the peer takes it so, else in segments. Returns
 * false when its vnet header contradicts it. */
static bool start_packet(struct ttun_session *s, uint8_t *packet, size_t size) {
    struct ttun_vnet vnet = {0};
    memcpy(&vnet, packet - s->vnet_size, s->vnet_size);
    if (s->wire != 0 && (size == 0 || !is_ip(packet)))
        return false; /* its first byte would be taken for a type */
    if (size + WHOLE + s->tx.now.tag_size <= TTUN_LENGTH_MAX &&
        ttun_stays_whole(&vnet, packet, size, s->wire & TTUN_OFFLOAD_TCP,
                         s->wire & TTUN_OFFLOAD_UDP)) {
        static const struct ttun_vnet done;
        uint16_t gso_size = vnet.gso_type == TTUN_GSO_NONE ? 0 : vnet.gso_size;
        packet -= WHOLE; /* where the vnet header was */
        packet[0] = TTUN_OFFLOADED;
        packet[1] = (uint8_t)(gso_size >> 8);
        packet[2] = (uint8_t)gso_size;
        return ttun_segment(&s->segmenter, &done, packet, WHOLE + size);
    }
    return ttun_segment(&s->segmenter, &vnet, packet, size);
}

/* Reads the next packet of the device into the scratch and starts on it. Returns false when there
 * is none and `wait` is false, when a control frame is to be sent, or when the session is over. */
static bool read_packet(struct ttun_session *s, bool wait) {
    uint8_t *packet = s->scratch + SCRATCH_PACKET;
    if (wait) {
        await_device(s);
        await_delivery(s);
    }
    while (!is_over(s) && !(wait && mailbox_has(&s->outbox))) {
        ssize_t size = read(s->tun, packet - s->vnet_size, s->vnet_size + TTUN_PACKET_MAX);
        if (size < 0 && errno == EAGAIN) {
            if (!wait)
                return false;
            await_device(s);
        } else if (size <= 0 && errno != EINTR) { /* 0: the end of a test's socketpair */
            session_end(s, TTUN_END_DEVICE, size < 0 ? errno : ENODEV);
        } else if (size >= (ssize_t)s->vnet_size) {
            if (start_packet(s, packet, (size_t)size - s->vnet_size))
                return true;
            count(&s->unsendable, 1);
        }
    }
    return false;
}

/* Seals what Python wants to be sent. The slot is empty. */
static void seal_control(struct ttun_session *s, struct slot *slot) {
    struct ttun_control frame;
    while (mailbox_take(&s->outbox, &frame, 0) == 1) {
        uint8_t plaintext[1 + TTUN_BODY_MAX] = {frame.type};
        size_t size = (size_t)ttun_body_size(frame.type);
        memcpy(plaintext + 1, frame.body, size);
        slot->end += ttun_seal(&s->tx.now, slot->bytes + slot->end, plaintext, 1 + size);
        if (frame.type == TTUN_SWITCH && !next_key(s, &s->tx))
            session_end(s, TTUN_END_CONTROL, TTUN_SWITCH);
    }
}

/* Fills the slot with at least one frame; false when the session is over. A large packet may go on
 * in the next slot. */
static bool seal_batch(struct ttun_session *s, struct slot *slot) {
    uint64_t packets = 0, bytes = 0;
    slot->begin = slot->end = 0;
    while (SLOT_SIZE - slot->end >= FRAME_MAX && !is_over(s)) {
        if (slot->end == 0 && mailbox_has(&s->outbox))
            seal_control(s, slot);
        size_t size;
        const uint8_t *packet = ttun_next_segment(&s->segmenter, &size);
        if (packet == NULL) {
            if (!read_packet(s, slot->end == 0) && slot->end > 0)
                break;
            continue;
        }
        size_t framed = ttun_seal(&s->tx.now, slot->bytes + slot->end, packet, size);
        if (framed == 0 && s->tx.now.counter == UINT64_MAX) {
            session_end(s, TTUN_END_NONCES, 0);
            break;
        }
        if (framed == 0) {
            count(&s->unsendable, 1);
            continue;
        }
        slot->end += framed;
        packets++;
        bytes += size - (s->wire != 0 && packet[0] == TTUN_OFFLOADED ? WHOLE : 0);
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
        count(&s->sent, (uint64_t)sent);
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

/* Writes one packet, its vnet header in parts[0], to the device. Returns false when the device is
 * gone. packets, bytes: what it stands for. */
static bool write_packet(struct ttun_session *s, const struct iovec *parts, unsigned n,
                         uint64_t packets, uint64_t bytes) {
    unsigned skip = s->vnet_size == 0; /* the vnet header */
    ssize_t written;
    do
        written = writev(s->tun, parts + skip, (int)(n - skip));
    while (written < 0 && errno == EINTR);
    if (written >= 0) {
        count(&s->downlink_packets, packets);
        count(&s->downlink_bytes, bytes);
    } else if (errno == EBADFD) { /* the device was removed */
        session_end(s, TTUN_END_DEVICE, errno);
        return false;
    } else {
        count(&s->refused, packets);
    }
    return true;
}

/* Writes what the coalescer holds to the device. Returns false when the device is gone. */
static bool write_merged(struct ttun_session *s) {
    uint64_t packets = s->coalescer.segments, bytes = 0;
    unsigned parts = ttun_flush(&s->coalescer);
    if (parts == 0)
        return true;
    for (unsigned i = 1; i < parts; i++)
        bytes += s->coalescer.parts[i].iov_len;
    bytes += (packets - 1) * s->coalescer.headers_size; /* as many as came in frames */
    return write_packet(s, s->coalescer.parts, parts, packets, bytes);
}

/* Writes a packet that came whole, once its vnet header is restored. */
static bool write_whole(struct ttun_session *s, uint8_t *plaintext, size_t size) {
    struct ttun_vnet vnet;
    if (size <= WHOLE || !ttun_restore_vnet(&vnet, plaintext + WHOLE, size - WHOLE,
                                            (uint16_t)(plaintext[1] << 8 | plaintext[2]),
                                            s->coalescer.tcp, s->coalescer.udp)) {
        count(&s->forged, 1);
        return true;
    }
    const struct iovec parts[] = {{.iov_base = &vnet, .iov_len = sizeof vnet},
                                  {.iov_base = plaintext + WHOLE, .iov_len = size - WHOLE}};
    return write_packet(s, parts, 2, 1, size - WHOLE);
}

/* Leaves a control frame to Python. Returns false when that ended the session. */
static bool receive_control(struct ttun_session *s, const uint8_t *plaintext, size_t size) {
    struct ttun_control frame = {.type = plaintext[0]};
    int body_size = ttun_body_size(frame.type);
    if (body_size < 0) {
        count(&s->ignored, 1);
        return true;
    }
    bool fine = size == 1 + (size_t)body_size;
    if (fine && frame.type == TTUN_SWITCH)
        fine = next_key(s, &s->rx);
    if (fine) {
        memcpy(frame.body, plaintext + 1, (size_t)body_size);
        /* Of pings the last one counts, but no key may get lost. */
        fine = mailbox_post(&s->inbox, &frame) || frame.type != TTUN_REKEY;
    }
    if (!fine)
        session_end(s, TTUN_END_CONTROL, frame.type);
    return fine;
}

/* Brings one packet, or what else a frame may hold, where it belongs. Returns false when the
 * session is over. */
static bool deliver(struct ttun_session *s, uint8_t *plaintext, size_t size) {
    if (s->wire != 0 && !is_ip(plaintext)) {
        if (plaintext[0] == TTUN_OFFLOADED)
            return write_merged(s) && write_whole(s, plaintext, size);
        return receive_control(s, plaintext, size);
    }
    if (ttun_coalesce(&s->coalescer, plaintext, size))
        return true;
    return write_merged(s) && ttun_coalesce(&s->coalescer, plaintext, size);
}

/* Opens each frame of a slot and delivers what is in it. Packets are merged with those before them
 * where they can be. */
static void open_frames(struct ttun_session *s, struct slot *slot) {
    while (slot->begin < slot->end && !is_over(s)) {
        uint8_t *plaintext = slot->bytes + slot->begin + TTUN_PREFIX;
        size_t length = ttun_frame_length(slot->bytes + slot->begin);
        slot->begin += TTUN_PREFIX + length;
        assert(slot->begin <= slot->end); /* a slot holds whole frames */
        ptrdiff_t size = ttun_open(&s->rx.now, plaintext, length);
        if (size < 0) {
            write_merged(s); /* what came before it counts */
            session_end(s, TTUN_END_TAG, (int)length);
            return;
        }
        if (size == 0)
            count(&s->empty, 1);
        else if (!deliver(s, plaintext, (size_t)size))
            break;
    }
    write_merged(s); /* nothing waits for what may come later */
    atomic_store_explicit(&s->heard, now_ms(), memory_order_relaxed);
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
            whole = ttun_whole_frames(slot->bytes, size, s->tag_size, &bad);
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
