/* The Internet checksum (RFC 1071) of IP, TCP and UDP. */
#ifndef TTUN_CHECKSUM_H
#define TTUN_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

/* Adds data to a ones' complement sum in host byte order. */
uint64_t ttun_sum(uint64_t sum, const uint8_t *data, size_t size);

/* Folds a sum to 16 bits, in host byte order, not complemented. */
uint16_t ttun_fold(uint64_t sum);

#endif
