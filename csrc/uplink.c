/* The uplink, from the device to the connection; session.h has the overview.
 *
 *  1. await_room: while the connection is busy, move packets from the device into the queue, where
 *     small ones overtake.
 *  2. seal_batch: fill a slot from the queue, or else from the device.
 *  3. send_slot: write it to the socket, on this thread or the next. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "internal.h"

enum { ARRIVALS = 64 /* packets moved from the device to the queue at once */ };

static_assert((TTUN_PREFIX + 1 + TTUN_BODY_MAX + TTUN_TAG_MAX) * TTUN_TYPES < FRAME_MAX,
              "all control frames fit before the first packet of a slot");

/* Waits until the device has a packet, a control frame is posted, or the session has ended; with
 * `room`, also until the socket is writable. milliseconds: at most, or -1. */
static void await_device(struct ttun_session *s, bool room, int milliseconds) {
    struct pollfd fds[] = {{.fd = s->tun, .events = POLLIN},
                           {.fd = s->wake, .events = POLLIN},
                           {.fd = s->socket, .events = POLLOUT}};
    if (poll(fds, room ? 3 : 2, milliseconds) < 0) {
        if (errno != EINTR)
            end_session(s, TTUN_END_DEVICE, errno);
    } else if (fds[1].revents != 0) {
        eventfd_t rings;
        if (eventfd_read(s->wake, &rings) < 0)
            assert(errno == EAGAIN);
    }
}

/* While the downlink delivers a batch, the kernel may answer each packet with a TCP
 * acknowledgement. Wait for the end of the batch and read them all at once: a wake-up, a system
 * call and a packet on the network for each of them would cost more than the data. */
static void await_delivery(struct ttun_session *s) {
    pthread_mutex_lock(&s->delivery_lock);
    /* The end of this batch only: the next may begin before this thread is awake. */
    unsigned seen = s->deliveries;
    while (s->delivering && s->deliveries == seen)
        pthread_cond_wait(&s->delivered, &s->delivery_lock);
    pthread_mutex_unlock(&s->delivery_lock);
}

/* Starts a packet in the scratch buffer: unsegmented if the peer has the offload, else segmented.
 * Returns false if its vnet header is invalid. */
static bool start_packet(struct ttun_session *s, uint8_t *packet, size_t size) {
    struct ttun_vnet vnet = {0};
    memcpy(&vnet, packet - s->vnet_size, s->vnet_size);
    if (s->wire != 0 && (size == 0 || !is_ip(packet)))
        return false; /* its first byte would be read as a frame type */
    if (size + TTUN_OFFLOADED_PREFIX + s->tx.now.tag_size <= TTUN_LENGTH_MAX &&
        size <= s->connection.gso_max &&
        ttun_stays_whole(&vnet, packet, size, s->wire & TTUN_OFFLOAD_TCP,
                         s->wire & TTUN_OFFLOAD_UDP)) {
        static const struct ttun_vnet done;
        uint16_t gso_size = vnet.gso_type == TTUN_GSO_NONE ? 0 : vnet.gso_size;
        packet -= TTUN_OFFLOADED_PREFIX; /* overwrites the vnet header */
        packet[0] = TTUN_OFFLOADED;
        packet[1] = (uint8_t)(gso_size >> 8);
        packet[2] = (uint8_t)gso_size;
        return ttun_segment(&s->segmenter, &done, packet, TTUN_OFFLOADED_PREFIX + size);
    }
    return ttun_segment(&s->segmenter, &vnet, packet, size);
}

/* Decides, before the first packet of a slot, whether CoDel drops one. A sender that is faster than
 * the connection must be slowed down, or the queues of the socket, ring and device grow to seconds.
 * It must happen here, because a sealed packet cannot be dropped: its nonce is used. */
static void watch_device(struct ttun_session *s) {
    static const struct ttun_codel_pace pace = {.target = 2000, .interval = 100000};
    uint64_t now = now_us(), delay = 0, oldest = ring_waits_since(&s->uplink);
    if (s->connection.limited)
        delay = 0; /* packets wait in the queue, which has its own CoDel */
    else if (oldest > 0)
        delay = now - oldest;
    else if (now - atomic_load(&s->send_end) < pace.target)
        delay = atomic_load(&s->waited);
    ttun_codel_watch(&s->codel, now, delay, &pace);
}

/* Reads the next packet from the device into the scratch buffer and starts it. Returns false if
 * there is none and `wait` is false, a control frame is posted, or the session has ended. */
static bool read_packet(struct ttun_session *s, bool wait) {
    uint8_t *packet = s->scratch + SCRATCH_PACKET;
    if (wait) {
        await_device(s, false, -1);
        await_delivery(s);
    }
    while (!is_over(s) && !(wait && control_queue_has(&s->outbox))) {
        ssize_t size = read(s->tun, packet - s->vnet_size, s->vnet_size + TTUN_PACKET_MAX);
        if (size < 0 && errno == EAGAIN) {
            if (!wait)
                return false;
            await_device(s, false, -1);
        } else if (size <= 0 && errno != EINTR) { /* 0: EOF of a test's socketpair */
            end_session(s, TTUN_END_DEVICE, size < 0 ? errno : ENODEV);
        } else if (size >= (ssize_t)s->vnet_size) {
            if (wait)
                watch_device(s);
            if (ttun_codel_drops(&s->codel, (size_t)size)) {
                count(s, TTUN_COUNT_CONGESTED, 1);
                continue;
            }
            if (start_packet(s, packet, (size_t)size - s->vnet_size))
                return true;
            count(s, TTUN_COUNT_UNSENDABLE, 1);
        }
    }
    return false;
}

/* Returns whether a plaintext is an offloaded packet, with its prefix. */
static bool is_offloaded(const struct ttun_session *s, const uint8_t *packet) {
    return s->wire != 0 && packet[0] == TTUN_OFFLOADED;
}

/* Moves the remaining segments of the current packet into the queue. */
static void queue_segments(struct ttun_session *s, uint64_t now) {
    uint64_t dropped = s->queue.dropped;
    const uint8_t *packet;
    size_t size;
    while ((packet = ttun_next_segment(&s->segmenter, &size)) != NULL)
        ttun_fq_put(&s->queue, packet, size, is_offloaded(s, packet) ? TTUN_OFFLOADED_PREFIX : 0,
                    now);
    count(s, TTUN_COUNT_CONGESTED, s->queue.dropped - dropped);
}

/* Moves packets from the device into the queue. */
static void queue_arrivals(struct ttun_session *s) {
    uint64_t now = now_us();
    queue_segments(s, now);
    for (unsigned i = 0; i < ARRIVALS && read_packet(s, false); i++)
        queue_segments(s, now);
}

/* Returns the next packet to seal, from the queue first, or NULL for the reasons of read_packet. */
static const uint8_t *next_packet(struct ttun_session *s, bool wait, size_t *size) {
    for (;;) {
        if (s->queue.packets > 0) {
            if (wait && s->connection.limited)
                queue_arrivals(s);
            uint64_t dropped = s->queue.dropped;
            *size = ttun_fq_take(&s->queue, s->taken, now_us(), &s->connection.pace);
            count(s, TTUN_COUNT_CONGESTED, s->queue.dropped - dropped);
            if (*size > 0)
                return s->taken;
        }
        const uint8_t *packet = ttun_next_segment(&s->segmenter, size);
        if (packet != NULL || !read_packet(s, wait))
            return packet;
        if (s->segmenter.size > s->connection.batch)
            queue_segments(s, now_us()); /* so that small packets can overtake it */
    }
}

/* Checks whether, or waits until, the socket is writable. */
static bool is_writable(struct ttun_session *s, bool wait) {
    struct pollfd fd = {.fd = s->socket, .events = POLLOUT};
    int ready;
    do
        ready = poll(&fd, 1, wait ? -1 : 0);
    while (ready < 0 && errno == EINTR);
    return ready != 0; /* on an error, send() reports it */
}

/* Checks whether, or waits until, less than half of TCP_NOTSENT_LOWAT is unsent. send() does not:
 * it fills the last socket buffer, up to 64 KiB, regardless (tcp_sendmsg_locked() in Linux). */
static bool has_room(struct ttun_session *s, bool wait) {
    return !atomic_load(&s->connection.limited) || is_writable(s, wait);
}

/* Waits until the connection has caught up, and for the end of a pause (bbr.h). Meanwhile moves
 * packets into the queue. */
static void await_room(struct ttun_session *s) {
    struct connection *c = &s->connection;
    while (connection_look(c, now_us(), s->uplink.count), c->limited && !is_over(s)) {
        atomic_store(&s->wants_room, true);
        bool next = !c->bbr.paused && ring_filled(&s->uplink) < c->slots;
        if (next && has_room(s, false))
            return;
        queue_arrivals(s);
        await_device(s, next, c->bbr.paused ? CONNECTION_PAUSE : -1);
    }
}

/* Seals the posted control frames. The slot is empty. */
static void seal_control(struct ttun_session *s, struct slot *slot) {
    struct ttun_control frame;
    while (control_queue_take(&s->outbox, &frame, 0) == 1) {
        uint8_t plaintext[1 + TTUN_BODY_MAX] = {frame.type};
        size_t size = (size_t)ttun_body_size(frame.type);
        memcpy(plaintext + 1, frame.body, size);
        slot->end += ttun_seal(&s->tx.now, slot->bytes + slot->end, plaintext, 1 + size);
        if (frame.type == TTUN_SWITCH && !next_key(s, &s->tx))
            end_session(s, TTUN_END_CONTROL, TTUN_SWITCH);
    }
}

/* Fills the slot with at least one frame. Returns false when the session has ended. Segments of a
 * GSO packet may continue in the next slot. */
static bool seal_batch(struct ttun_session *s, struct slot *slot) {
    uint64_t packets = 0, bytes = 0;
    slot->begin = slot->end = 0;
    while (SLOT_SIZE - slot->end >= FRAME_MAX && slot->end < s->connection.batch && !is_over(s)) {
        bool first = slot->end == 0;
        if (first && control_queue_has(&s->outbox))
            seal_control(s, slot);
        size_t size;
        const uint8_t *packet = next_packet(s, slot->end == 0, &size);
        if (first)
            slot->since = now_us(); /* not before: it may have waited for the packet */
        if (packet == NULL) {
            if (slot->end > 0)
                break;
            continue;
        }
        size_t framed = ttun_seal(&s->tx.now, slot->bytes + slot->end, packet, size);
        if (framed == 0 && s->tx.now.counter == UINT64_MAX) {
            end_session(s, TTUN_END_NONCES, 0);
            break;
        }
        if (framed == 0) {
            count(s, TTUN_COUNT_UNSENDABLE, 1);
            continue;
        }
        slot->end += framed;
        packets++;
        bytes += size - (is_offloaded(s, packet) ? TTUN_OFFLOADED_PREFIX : 0);
    }
    count(s, TTUN_COUNT_UPLINK_PACKETS, packets);
    count(s, TTUN_COUNT_UPLINK_BYTES, bytes);
    return !is_over(s);
}

/* Sends the rest of a slot. flags: MSG_DONTWAIT to stop when the socket is full. Returns whether
 * data is left. */
static bool send_slot(struct ttun_session *s, struct slot *slot, int flags) {
    bool wait = (flags & MSG_DONTWAIT) == 0;
    while (slot->begin < slot->end && !is_over(s)) {
        if (!has_room(s, wait))
            return true;
        ssize_t sent = send(s->socket, slot->bytes + slot->begin, slot->end - slot->begin,
                            flags | MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno == EAGAIN) {
            if (!wait)
                return true;
            is_writable(s, true); /* another holder of the socket has set O_NONBLOCK */
            continue;
        }
        if (sent < 0) {
            end_session(s, TTUN_END_SOCKET, errno);
            return false;
        }
        slot->begin += (size_t)sent;
        count(s, TTUN_COUNT_SENT, (uint64_t)sent);
    }
    uint64_t now = now_us();
    atomic_store(&s->waited, now - slot->since);
    atomic_store(&s->send_end, now);
    return false;
}

void ttun_uplink_seal(struct ttun_session *s) {
    prctl(PR_SET_NAME, "ttun-up-seal");
    struct slot *slot;
    while (await_room(s), (slot = ring_free_slot(&s->uplink)) != NULL && seal_batch(s, slot))
        if (ring_push(&s->uplink, s->direct))
            ring_return(&s->uplink, send_slot(s, slot, MSG_DONTWAIT));
}

void ttun_uplink_send(struct ttun_session *s) {
    prctl(PR_SET_NAME, "ttun-up-send");
    struct slot *slot;
    while ((slot = ring_take(&s->uplink)) != NULL) {
        send_slot(s, slot, 0);
        ring_release(&s->uplink);
        if (atomic_exchange(&s->wants_room, false))
            wake_uplink(s);
    }
}
