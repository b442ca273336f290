/* Shared by the fuzzers: consume the input byte by byte, and check properties. */
#ifndef TTUN_FUZZ_H
#define TTUN_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);          \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

struct input {
    const uint8_t *bytes;
    size_t left;
};

/* The next byte; 0 when there is none left. */
static inline uint8_t take(struct input *in) {
    if (in->left == 0)
        return 0;
    in->left--;
    return *in->bytes++;
}

static inline uint16_t take16(struct input *in) {
    uint16_t high = take(in);
    return (uint16_t)(high << 8 | take(in));
}

/* A copy of exactly that size, so that a byte too far is noticed. Never NULL. */
static inline uint8_t *copy_of(const uint8_t *bytes, size_t size) {
    uint8_t *copy = malloc(size ? size : 1);
    MUST(copy != NULL);
    if (size > 0)
        memcpy(copy, bytes, size);
    return copy;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
