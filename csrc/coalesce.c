/* Coalesces packets into one GSO packet for the kernel:
 *
 *  1. ttun_coalesce checks that a packet continues its flow, has no unusual headers, and valid
 *     checksums. Coalesced packets are passed with a partial checksum, which the kernel completes:
 *     that would hide corruption, so a packet with a wrong checksum is never coalesced.
 *  2. ttun_flush sets the lengths in the headers of the first packet.
 *
 * For offloaded packets, between two ends with offloads:
 *
 *  3. ttun_stays_whole checks whether the peer can restore the vnet header.
 *  4. ttun_restore_vnet restores it from the packet alone, and rejects malformed ones. */
#include <string.h>

#include "offload.h"
#include "packet.h"

/* UDP_MAX_SEGMENTS of linux/udp.h since Linux 6.10; TTUN_SEGMENTS_MAX before. */
enum { UDP_SEGMENTS_MAX = 128 };

/* Returns the pseudo-header sum (RFC 9293, 3.1; RFC 8200, 8.1). size: of transport header and
 * payload. */
static uint64_t pseudo_sum(const uint8_t *packet, uint8_t protocol, size_t size) {
    bool v6 = packet[0] >> 4 == 6;
    const uint8_t next[2] = {0, protocol};
    uint64_t sum = ttun_sum(length_sum(size), next, sizeof next);
    return v6 ? ttun_sum(sum, packet + 8, 32) : ttun_sum(sum, packet + 12, 8);
}

/* Returns whether this is a complete TCP or UDP packet with no IP options; sets the layout. */
static bool find_transport(const uint8_t *packet, size_t size, struct ttun_layout *l) {
    if (size >= IPV6_HEADER && packet[0] >> 4 == 6) {
        l->transport = IPV6_HEADER;
        l->protocol = packet[6]; /* neither TCP nor UDP if there are extension headers */
        if ((size_t)get16(packet + 4) + IPV6_HEADER != size)
            return false;
    } else if (size >= IPV4_HEADER && packet[0] == 0x45) {
        l->transport = IPV4_HEADER;
        l->protocol = packet[9];
        /* Length; not a fragment: no offset, no MF, no reserved bit. */
        if (get16(packet + 2) != size || (get16(packet + 6) & 0xbfff) != 0)
            return false;
    } else {
        return false;
    }
    const uint8_t *transport = packet + l->transport;
    size_t room = size - l->transport;
    if (l->protocol == PROTO_TCP && room >= TCP_HEADER) {
        l->headers_size = l->transport + (transport[12] >> 4) * 4u;
        return l->headers_size >= l->transport + TCP_HEADER && l->headers_size <= size;
    }
    l->headers_size = l->transport + UDP_HEADER;
    return l->protocol == PROTO_UDP && room >= UDP_HEADER && get16(transport + 4) == room;
}

/* Returns whether a packet has a payload, valid checksums and no unusual headers. In ones'
 * complement, 0xffff is a second zero, which no sender computes (except for UDP) and segmenting
 * would not reproduce, so it counts as unusual. */
static bool is_plain(const struct ttun_coalescer *c, const uint8_t *packet, size_t size,
                     struct ttun_layout *l) {
    if (!find_transport(packet, size, l) || l->headers_size == size)
        return false;
    if (l->transport == IPV4_HEADER &&
        (get16(packet + 10) == 0xffff || ttun_fold(ttun_sum(0, packet, IPV4_HEADER)) != 0xffff))
        return false;
    const uint8_t *transport = packet + l->transport;
    size_t room = size - l->transport;
    if (l->protocol == PROTO_TCP) {
        /* ACK, optionally PSH and ECE; no reserved bit. */
        if (!c->tcp || (transport[12] & 0x0f) != 0 ||
            (transport[13] & (FIN | SYN | RST | URG | CWR | ACK)) != ACK ||
            get16(transport + TCP_CHECKSUM) == 0xffff)
            return false;
    } else if (!c->udp || get16(transport + UDP_CHECKSUM) == 0) {
        return false;
    }
    return ttun_fold(ttun_sum(pseudo_sum(packet, l->protocol, room), transport, room)) == 0xffff;
}

/* Returns whether the headers equal those that segmenting would give this packet. */
static bool follows(const struct ttun_coalescer *c, const uint8_t *packet, size_t size,
                    const struct ttun_layout *l) {
    const uint8_t *first = c->parts[1].iov_base;
    size_t payload = size - l->headers_size;
    if (!c->open || l->headers_size != c->layout.headers_size ||
        l->transport != c->layout.transport || payload > c->vnet.gso_size ||
        c->segments == TTUN_SEGMENTS_MAX || c->size + payload > TTUN_COALESCED_MAX)
        return false;
    if (l->transport == IPV4_HEADER) {
        /* Version and TOS; identification, incremented; flags, TTL, protocol; addresses. */
        if (memcmp(packet, first, 2) != 0 ||
            get16(packet + 4) != (uint16_t)(get16(first + 4) + c->segments) ||
            memcmp(packet + 6, first + 6, 4) != 0 || memcmp(packet + 12, first + 12, 8) != 0)
            return false;
    } else {
        /* Version, traffic class, flow label; next header, hop limit; addresses. */
        if (memcmp(packet, first, 4) != 0 || memcmp(packet + 6, first + 6, 34) != 0)
            return false;
    }
    const uint8_t *mine = packet + l->transport, *theirs = first + l->transport;
    if (memcmp(mine, theirs, 4) != 0) /* ports */
        return false;
    if (l->protocol == PROTO_UDP)
        return true;
    /* Sequence number; acknowledgement, data offset; flags except PSH, which ends a coalesced
     * packet; window; urgent pointer, options. */
    return get32(mine + 4) == c->next_sequence && memcmp(mine + 8, theirs + 8, 5) == 0 &&
           (mine[13] & ~PSH) == theirs[13] && memcmp(mine + 14, theirs + 14, 2) == 0 &&
           memcmp(mine + 18, theirs + 18, l->headers_size - l->transport - 18) == 0;
}

void ttun_coalescer_init(struct ttun_coalescer *c, bool tcp, bool udp) {
    memset(c, 0, sizeof *c);
    c->tcp = tcp;
    c->udp = udp;
}

bool ttun_coalesce(struct ttun_coalescer *c, uint8_t *packet, size_t size) {
    struct ttun_layout l = {0};
    bool plain = (c->segments == 0 || c->open) && is_plain(c, packet, size, &l);
    if (c->segments > 0) {
        if (!plain || !follows(c, packet, size, &l))
            return false;
        size_t payload = size - l.headers_size;
        c->parts[1 + c->segments] =
            (struct iovec){.iov_base = packet + l.headers_size, .iov_len = payload};
        c->segments++;
        c->size += payload;
        c->next_sequence += (uint32_t)payload;
        c->open = payload == c->vnet.gso_size;
        if (l.protocol == PROTO_TCP && packet[l.transport + 13] & PSH) {
            ((uint8_t *)c->parts[1].iov_base)[l.transport + 13] |= PSH;
            c->open = false;
        }
        return true;
    }
    c->vnet = (struct ttun_vnet){0};
    c->parts[0] = (struct iovec){.iov_base = &c->vnet, .iov_len = sizeof c->vnet};
    c->parts[1] = (struct iovec){.iov_base = packet, .iov_len = size};
    c->segments = 1;
    c->size = size;
    c->open = plain;
    if (plain) {
        c->layout = l;
        c->vnet.gso_size = (uint16_t)(size - l.headers_size);
        if (l.protocol == PROTO_TCP) {
            c->next_sequence = get32(packet + l.transport + 4) + c->vnet.gso_size;
            c->open = !(packet[l.transport + 13] & PSH);
        }
    }
    return true;
}

/* Returns the vnet header of a packet with a partial checksum. gso_size: of its segments, or 0. */
static struct ttun_vnet describe(const struct ttun_layout *l, uint16_t gso_size) {
    bool udp = l->protocol == PROTO_UDP;
    return (struct ttun_vnet){
        .flags = TTUN_NEEDS_CHECKSUM,
        .gso_type = gso_size == 0                 ? TTUN_GSO_NONE
                    : udp                         ? TTUN_GSO_UDP
                    : l->transport == IPV6_HEADER ? TTUN_GSO_TCP6
                                                  : TTUN_GSO_TCP4,
        .header_size = (uint16_t)l->headers_size,
        .gso_size = gso_size,
        .checksum_start = (uint16_t)l->transport,
        .checksum_offset = udp ? UDP_CHECKSUM : TCP_CHECKSUM,
    };
}

/* Returns the partial checksum of such a packet. */
static uint16_t partial_sum(const uint8_t *packet, size_t size, const struct ttun_layout *l) {
    return ttun_fold(pseudo_sum(packet, l->protocol, size - l->transport));
}

unsigned ttun_flush(struct ttun_coalescer *c) {
    unsigned segments = c->segments;
    c->segments = 0;
    if (segments <= 1) { /* passed unchanged, its checksum not verified */
        c->vnet = (struct ttun_vnet){0};
        return segments == 0 ? 0 : 2;
    }
    const struct ttun_layout *l = &c->layout;
    uint8_t *first = c->parts[1].iov_base;
    set_ip_length(first, c->size);
    if (l->protocol == PROTO_UDP)
        put16(first + l->transport + 4, (uint16_t)(c->size - l->transport));
    c->vnet = describe(l, c->vnet.gso_size);
    store_sum(first + l->transport + c->vnet.checksum_offset, partial_sum(first, c->size, l));
    return 1 + segments;
}

/* ---- offloaded packets ---------------------------------------------------------------------- */

/* Returns whether this packet can be sent unsegmented; sets the layout. */
static bool is_offloadable(const uint8_t *packet, size_t size, uint16_t gso_size, bool tcp,
                           bool udp, struct ttun_layout *l) {
    if (size > TTUN_PACKET_MAX || !find_transport(packet, size, l) ||
        !(l->protocol == PROTO_TCP ? tcp : udp))
        return false;
    if (gso_size == 0)
        return true;
    size_t payload = size - l->headers_size;
    if (gso_size < TTUN_GSO_MIN || payload <= gso_size)
        return false;
    return l->protocol == PROTO_TCP ? (packet[l->transport + 13] & (SYN | RST | URG | CWR)) == 0
                                    : payload <= (size_t)gso_size * UDP_SEGMENTS_MAX;
}

bool ttun_restore_vnet(struct ttun_vnet *vnet, uint8_t *packet, size_t size, uint16_t gso_size,
                       bool tcp, bool udp) {
    struct ttun_layout l = {0};
    if (!is_offloadable(packet, size, gso_size, tcp, udp, &l))
        return false;
    *vnet = describe(&l, gso_size);
    store_sum(packet + l.transport + vnet->checksum_offset, partial_sum(packet, size, &l));
    return true;
}

bool ttun_stays_whole(const struct ttun_vnet *vnet, const uint8_t *packet, size_t size, bool tcp,
                      bool udp) {
    struct ttun_layout l = {0};
    uint16_t gso_size = vnet->gso_type == TTUN_GSO_NONE ? 0 : vnet->gso_size;
    /* Coalescing at the receiver saves more than skipping a checksum. */
    bool coalescable = gso_size == 0 && size <= TTUN_COALESCED_MAX / 2;
    if (!(vnet->flags & TTUN_NEEDS_CHECKSUM) || coalescable ||
        !is_offloadable(packet, size, gso_size, tcp, udp, &l))
        return false;
    if (gso_size > 0 && l.protocol == PROTO_UDP &&
        size - l.headers_size > (size_t)gso_size * TTUN_SEGMENTS_MAX)
        return false; /* an older kernel of the peer would reject it */
    struct ttun_vnet same = describe(&l, gso_size);
    return same.gso_type == vnet->gso_type && same.checksum_start == vnet->checksum_start &&
           same.checksum_offset == vnet->checksum_offset &&
           load_sum(packet + l.transport + same.checksum_offset) == partial_sum(packet, size, &l);
}
