/* Layout of IP, TCP and UDP headers, and access to their fields (RFC 791, RFC 8200, RFC 9293,
 * RFC 768). */
#ifndef TTUN_PACKET_H
#define TTUN_PACKET_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "checksum.h"

enum {
    IPV4_HEADER = 20,
    IPV6_HEADER = 40,
    TCP_HEADER = 20,
    UDP_HEADER = 8,
    PROTO_TCP = 6,
    PROTO_UDP = 17,
    TCP_CHECKSUM = 16, /* offset in the header */
    UDP_CHECKSUM = 6,
    FIN = 0x01,
    SYN = 0x02,
    RST = 0x04,
    PSH = 0x08,
    ACK = 0x10,
    URG = 0x20,
    CWR = 0x80
};

static inline uint16_t get16(const uint8_t *p) {
    return (uint16_t)(p[0] << 8 | p[1]);
}

static inline uint32_t get32(const uint8_t *p) {
    return (uint32_t)get16(p) << 16 | get16(p + 2);
}

static inline void put16(uint8_t *p, uint16_t v) {
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static inline void put32(uint8_t *p, uint32_t v) {
    put16(p, (uint16_t)(v >> 16));
    put16(p + 2, (uint16_t)v);
}

/* Stores a folded sum, which is in host byte order. */
static inline void store_sum(uint8_t *field, uint16_t sum) {
    memcpy(field, &sum, sizeof sum);
}

static inline uint16_t load_sum(const uint8_t *field) {
    uint16_t sum;
    memcpy(&sum, field, sizeof sum);
    return sum;
}

/* Returns the contribution of the transport length to the pseudo-header sum. */
static inline uint64_t length_sum(size_t size) {
    uint8_t length[4];
    put32(length, (uint32_t)size);
    return ttun_sum(0, length, sizeof length);
}

/* Sets the length of an IP packet, and the IPv4 header checksum. */
static inline void set_ip_length(uint8_t *packet, size_t size) {
    if (packet[0] >> 4 == 6) {
        put16(packet + 4, (uint16_t)(size - IPV6_HEADER));
        return;
    }
    put16(packet + 2, (uint16_t)size);
    put16(packet + 10, 0);
    store_sum(packet + 10, (uint16_t)~ttun_fold(ttun_sum(0, packet, (packet[0] & 15) * 4u)));
}

#endif
