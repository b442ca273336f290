/* What is in memory when it is given back, for a program that loads this library (LD_PRELOAD).
 *
 * TTUN_TEST_FREED names patterns, in hexadecimal with a comma between two, every byte inverted, so
 * that they are not themselves in memory. When a block that holds one of them is freed, a line on
 * stderr says which. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PATTERNS_MAX = 8, SIZE_MAX_OF_ONE = 64 };

static uint8_t inverted[PATTERNS_MAX][SIZE_MAX_OF_ONE];
static size_t sizes[PATTERNS_MAX], count;

__attribute__((constructor)) static void read_patterns(void) {
    const char *text = getenv("TTUN_TEST_FREED");
    for (; text != NULL && *text != '\0' && count < PATTERNS_MAX; count++) {
        unsigned byte;
        for (; sizes[count] < SIZE_MAX_OF_ONE && sscanf(text, "%2x", &byte) == 1; text += 2)
            inverted[count][sizes[count]++] = (uint8_t)byte;
        text += *text == ',';
    }
}

static int holds(const uint8_t *block, size_t size, size_t n) {
    for (size_t i = 0; i + sizes[n] <= size; i++) {
        size_t same = 0;
        while (same < sizes[n] && block[i + same] + inverted[n][same] == 0xff)
            same++;
        if (same == sizes[n])
            return 1;
    }
    return 0;
}

void free(void *block) {
    static void (*next)(void *);
    if (next == NULL)
        *(void **)&next = dlsym(RTLD_NEXT, "free");
    for (size_t n = 0; block != NULL && n < count; n++) {
        if (holds(block, malloc_usable_size(block), n)) {
            char line[] = "freed with pattern 0\n";
            line[sizeof line - 3] = (char)('0' + n);
            if (write(STDERR_FILENO, line, sizeof line - 1) < 0)
                abort();
        }
    }
    next(block);
}
