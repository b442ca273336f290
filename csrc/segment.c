/* Segments a GSO packet from the kernel for a peer without offloads:
 *
 *  1. ttun_segment validates the vnet header against the packet.
 *  2. ttun_next_segment moves the headers in front of each part of the payload, over the previous
 *     payload, so that only headers are copied. As in the kernel, the checksum is computed from the
 *     pseudo-header sum in its field, with the length replaced. The addresses are not used: with a
 *     routing header or a source route the final destination is elsewhere. */
#include <assert.h>
#include <string.h>

#include "offload.h"
#include "packet.h"

static_assert(sizeof(struct ttun_vnet) == 10, "the kernel's header has no padding");

/* Completes a checksum whose field holds the pseudo-header sum. */
static bool complete_checksum(uint8_t *packet, size_t size, size_t start, size_t offset) {
    size_t field = start + offset;
    if (field + 2 > size)
        return false;
    uint16_t sum = (uint16_t)~ttun_fold(ttun_sum(0, packet + start, size - start));
    if (sum == 0 && offset == UDP_CHECKSUM)
        sum = 0xffff; /* zero means no checksum (RFC 768) */
    store_sum(packet + field, sum);
    return true;
}

bool ttun_segment(struct ttun_segmenter *g, const struct ttun_vnet *vnet, uint8_t *packet,
                  size_t size) {
    g->packet = packet;
    g->size = size;
    g->next = size; /* no segments until validated */
    g->gso_size = 0;
    if (size == 0 || size > TTUN_PACKET_MAX)
        return false;
    if (vnet->gso_type == TTUN_GSO_NONE) {
        if (vnet->flags & TTUN_NEEDS_CHECKSUM &&
            !complete_checksum(packet, size, vnet->checksum_start, vnet->checksum_offset))
            return false;
        g->next = 0;
        return true;
    }
    bool udp = vnet->gso_type == TTUN_GSO_UDP;
    bool v6 = packet[0] >> 4 == 6;
    if (!udp && vnet->gso_type != (v6 ? TTUN_GSO_TCP6 : TTUN_GSO_TCP4))
        return false;
    /* The transport header starts where the checksum does, possibly after extension headers. */
    size_t start = vnet->checksum_start;
    if (!(vnet->flags & TTUN_NEEDS_CHECKSUM) || start < (v6 ? IPV6_HEADER : IPV4_HEADER) ||
        (!v6 && (start != (packet[0] & 15u) * 4u || packet[0] >> 4 != 4)) ||
        start + (udp ? UDP_HEADER : TCP_HEADER) > size)
        return false;
    size_t headers = start + (udp ? UDP_HEADER : (packet[start + 12] >> 4) * 4u);
    if (headers < start + (udp ? UDP_HEADER : TCP_HEADER) || headers >= size || vnet->gso_size == 0)
        return false;
    g->udp = udp;
    g->headers_size = headers;
    g->transport = start;
    g->gso_size = vnet->gso_size;
    g->next = headers;
    g->flags = udp ? 0 : packet[start + 13];
    /* The kernel's pseudo-header sum without the length, which differs per segment. */
    g->partial = load_sum(packet + start + (udp ? UDP_CHECKSUM : TCP_CHECKSUM)) +
                 (uint64_t)(uint16_t)~ttun_fold(length_sum(size - start));
    return true;
}

const uint8_t *ttun_next_segment(struct ttun_segmenter *g, size_t *size) {
    if (g->next >= g->size)
        return NULL;
    if (g->gso_size == 0) {
        g->next = g->size;
        *size = g->size;
        return g->packet;
    }
    size_t left = g->size - g->next;
    size_t payload = left < g->gso_size ? left : g->gso_size;
    bool first = g->next == g->headers_size, last = payload == left;
    uint8_t *segment = g->packet + g->next - g->headers_size;
    uint8_t *transport = segment + g->transport;
    size_t segment_size = g->headers_size + payload;
    size_t transport_size = segment_size - g->transport;
    if (!first) /* memmove: the headers may be longer than a payload */
        memmove(segment, segment - g->gso_size, g->headers_size);

    if (!first && segment[0] >> 4 == 4) /* each segment is a separate packet (RFC 6864) */
        put16(segment + 4, (uint16_t)(get16(segment + 4) + 1));
    set_ip_length(segment, segment_size);
    size_t field = g->udp ? UDP_CHECKSUM : TCP_CHECKSUM;
    if (g->udp) {
        put16(transport + 4, (uint16_t)transport_size);
    } else {
        if (!first)
            put32(transport + 4, get32(transport + 4) + (uint32_t)g->gso_size);
        transport[13] = g->flags;
        if (!last)
            transport[13] &= (uint8_t)~(FIN | PSH);
        if (!first)
            transport[13] &= (uint8_t)~CWR; /* only in the first segment (RFC 3168, 6.1.2) */
    }
    store_sum(transport + field, ttun_fold(g->partial + length_sum(transport_size)));
    complete_checksum(segment, segment_size, g->transport, field);
    g->next += payload;
    *size = segment_size;
    return segment;
}
