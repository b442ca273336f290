/* The sum of RFC 1071, which IP, TCP and UDP check their packets with. */
#ifndef TTUN_CHECKSUM_H
#define TTUN_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

/* Adds data to a ones' complement sum (RFC 1071) in the byte order of the machine. */
uint64_t ttun_sum(uint64_t sum, const uint8_t *data, size_t size);

/* Folds such a sum into 16 bits, still in the byte order of the machine, not complemented. */
uint16_t ttun_fold(uint64_t sum);

#endif
