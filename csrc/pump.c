/* The way of a packet.
 *
 *     TUN --read--> [uplink seal] --lane--> [uplink send] --> TCP
 *     TUN <--write-- [downlink open] <--lane-- [downlink receive] <-- TCP
 *
 *  1. uplink seal: reads packets until the device has no more or the slot is full, cuts large ones
 *     into segments, and seals each into the slot, frame behind frame. When slots wait too long for
 *     too long, it drops a packet (codel.h).
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
 */
#define _GNU_SOURCE
#include "pump.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "session.h"

enum {
    FRAME_MAX = TTUN_PREFIX + TTUN_LENGTH_MAX,
    WHOLE = 3,              /* bytes in front of an offloaded packet: its type and its gso_size */
    ARRIVALS = 64,          /* packets of the device that the queue takes at once */
    LARGE_BATCH = 64 * 1024 /* bytes of a slot from which on the uplink waits for its end */
};

static_assert(SLOT_SIZE >= 2 * FRAME_MAX,
              "a slot has room for the rest of a frame and a whole one");
static_assert((TTUN_PREFIX + 1 + TTUN_BODY_MAX + TTUN_TAG_MAX) * TTUN_TYPES < FRAME_MAX,
              "all control frames fit in front of the first packet of a slot");

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
    if (size + WHOLE + s->tx.now.tag_size <= TTUN_LENGTH_MAX && size <= s->connection.batch &&
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

/* Looks, before the first packet of a slot is taken, whether one has to be dropped. Who sends
 * faster than a near peer takes it has to be told, or the queues of the socket, the lane and the
 * device grow to seconds. It must be now: what is in a slot has its place among the nonces. */
static void watch_device(struct ttun_session *s) {
    static const struct ttun_codel_pace pace = {.target = 2000, .interval = 100000};
    uint64_t now = now_us(), delay = 0, oldest = lane_waits_since(&s->uplink);
    if (s->connection.limited)
        delay = 0; /* they wait in the queue */
    else if (oldest > 0)
        delay = now - oldest;
    else if (now - atomic_load(&s->send_end) < pace.target)
        delay = atomic_load(&s->waited);
    ttun_codel_watch(&s->codel, now, delay, &pace);
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
            if (wait)
                watch_device(s);
            if (ttun_codel_drops(&s->codel, (size_t)size)) {
                count(&s->congested, 1);
                continue;
            }
            if (start_packet(s, packet, (size_t)size - s->vnet_size))
                return true;
            count(&s->unsendable, 1);
        }
    }
    return false;
}

/* Is it a packet as the kernel left it, with what that takes in front? */
static bool is_offloaded(const struct ttun_session *s, const uint8_t *packet) {
    return s->wire != 0 && packet[0] == TTUN_OFFLOADED;
}

/* Puts what is left of the packet in the scratch into the queue. */
static void queue_segments(struct ttun_session *s, uint64_t now) {
    uint64_t dropped = s->queue.dropped;
    const uint8_t *packet;
    size_t size;
    while ((packet = ttun_next_segment(&s->segmenter, &size)) != NULL)
        ttun_fq_put(&s->queue, packet, size, is_offloaded(s, packet) ? WHOLE : 0, now);
    count(&s->congested, s->queue.dropped - dropped);
}

/* Moves what the device has into the queue. */
static void queue_arrivals(struct ttun_session *s) {
    uint64_t now = now_us();
    queue_segments(s, now);
    for (unsigned i = 0; i < ARRIVALS && read_packet(s, false); i++)
        queue_segments(s, now);
}

/* The next packet to seal, or NULL as read_packet says. What waits in the queue comes first. */
static const uint8_t *next_packet(struct ttun_session *s, bool wait, size_t *size) {
    for (;;) {
        if (s->queue.packets > 0) {
            if (wait && s->connection.limited)
                queue_arrivals(s);
            uint64_t dropped = s->queue.dropped;
            *size = ttun_fq_take(&s->queue, s->taken, now_us(), &s->connection.pace);
            count(&s->congested, s->queue.dropped - dropped);
            if (*size > 0)
                return s->taken;
        }
        const uint8_t *packet = ttun_next_segment(&s->segmenter, size);
        if (packet != NULL || !read_packet(s, wait))
            return packet;
        if (s->segmenter.size > s->connection.batch)
            queue_segments(s, now_us()); /* something small may come before it is through */
    }
}

/* Waits until the connection is not too far behind. Meanwhile packets go into the queue. */
static void await_room(struct ttun_session *s) {
    connection_look(&s->connection, now_us(), s->uplink.count);
    while (s->connection.limited && !is_over(s)) {
        atomic_store(&s->wants_room, true);
        if (lane_filled(&s->uplink) < s->connection.slots)
            return;
        queue_arrivals(s);
        await_device(s);
    }
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
    while (SLOT_SIZE - slot->end >= FRAME_MAX && slot->end < s->connection.batch && !is_over(s)) {
        if (slot->end == 0)
            slot->since = now_us();
        if (slot->end == 0 && mailbox_has(&s->outbox))
            seal_control(s, slot);
        size_t size;
        const uint8_t *packet = next_packet(s, slot->end == 0, &size);
        if (packet == NULL) {
            if (slot->end > 0)
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
        bytes += size - (is_offloaded(s, packet) ? WHOLE : 0);
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
    uint64_t now = now_us();
    atomic_store(&s->waited, now - slot->since);
    atomic_store(&s->send_end, now);
    return false;
}

void ttun_uplink_seal(struct ttun_session *s) {
    prctl(PR_SET_NAME, "ttun-up-seal");
    struct slot *slot;
    while (await_room(s), (slot = lane_free_slot(&s->uplink)) != NULL && seal_batch(s, slot))
        if (lane_push(&s->uplink, s->direct))
            lane_return(&s->uplink, send_slot(s, slot, MSG_DONTWAIT));
}

void ttun_uplink_send(struct ttun_session *s) {
    prctl(PR_SET_NAME, "ttun-up-send");
    struct slot *slot;
    while ((slot = lane_take(&s->uplink)) != NULL) {
        send_slot(s, slot, 0);
        lane_release(&s->uplink);
        if (atomic_exchange(&s->wants_room, false))
            wake_uplink(s);
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
