#include "checksum.h"

#include <string.h>

uint64_t ttun_sum(uint64_t sum, const uint8_t *data, size_t size) {
    /* A 64-bit sum of 32-bit words overflows only after 2^32 of them. Eight sums in parallel let
     * the compiler vectorize, with the pragma also under -Os. */
    uint64_t sums[8] = {0};
    for (; size >= 32; data += 32, size -= 32) {
        uint32_t words[8];
        memcpy(words, data, sizeof words);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            sums[i] += words[i];
    }
    for (int i = 0; i < 8; i++)
        sum += sums[i];
    for (; size >= 2; data += 2, size -= 2) {
        uint16_t w;
        memcpy(&w, data, sizeof w);
        sum += w;
    }
    if (size == 1) {
        uint16_t w = 0;
        memcpy(&w, data, 1); /* the byte and a zero, in any byte order */
        sum += w;
    }
    return sum;
}

uint16_t ttun_fold(uint64_t sum) {
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}
