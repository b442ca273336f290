#include "checksum.h"

#include <string.h>

uint64_t ttun_sum(uint64_t sum, const uint8_t *data, size_t size) {
    /* 32-bit words into 64-bit sums overflow only after 2^32 of them; eight sums side by side let
     * the compiler use vectors, also with -Os when it is told to unroll them. */
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
        memcpy(&w, data, 1); /* the byte and a zero behind it, whatever the byte order */
        sum += w;
    }
    return sum;
}

uint16_t ttun_fold(uint64_t sum) {
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}
