#define _DEFAULT_SOURCE /* explicit_bzero */
#include "frame.h"

#include <assert.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { NONCE_COUNTER = 4 }; /* offset of the counter in the nonce */

static_assert(NONCE_COUNTER + sizeof(uint64_t) <= TTUN_NONCE_MAX, "the counter fits the nonce");

struct ttun_cipher_state *ttun_cipher_new(ttun_encrypt encrypt, ttun_decrypt decrypt,
                                          ttun_expand expand, uint32_t tag_size, uint8_t direction,
                                          const uint8_t *key) {
    if (tag_size > TTUN_TAG_MAX)
        return NULL;
    struct ttun_cipher_state *state =
        aligned_alloc(_Alignof(struct ttun_cipher_state), sizeof *state);
    if (state == NULL)
        return NULL;
    memset(state, 0, sizeof *state);
    state->encrypt = encrypt;
    state->decrypt = decrypt;
    state->tag_size = tag_size;
    state->nonce[0] = direction;
    if (expand != NULL)
        expand(state->key, key);
    else
        memcpy(state->key, key, TTUN_KEY_SIZE);
    return state;
}

void ttun_cipher_wipe(struct ttun_cipher_state *state) {
    explicit_bzero(state, sizeof *state);
}

void ttun_cipher_free(struct ttun_cipher_state *state) {
    if (state == NULL)
        return;
    ttun_cipher_wipe(state);
    free(state);
}

/* Writes the counter into the nonce and increments it. A counter is never reused: returns -1 when
 * it is exhausted, after 2^64 - 1 frames. */
static int next_nonce(struct ttun_cipher_state *state) {
    if (state->counter == UINT64_MAX)
        return -1;
    uint64_t counter = state->counter++;
    for (int i = 7; i >= 0; i--, counter >>= 8)
        state->nonce[NONCE_COUNTER + i] = (uint8_t)counter;
    return 0;
}

size_t ttun_seal(struct ttun_cipher_state *state, uint8_t *frame, const uint8_t *packet,
                 size_t packet_size) {
    size_t length = packet_size + state->tag_size;
    if (packet_size > TTUN_LENGTH_MAX || length > TTUN_LENGTH_MAX || next_nonce(state) < 0)
        return 0;
    state->encrypt(frame + TTUN_PREFIX, NULL, packet, packet_size, NULL, 0, NULL, state->nonce,
                   state->key);
    frame[0] = (uint8_t)(length >> 8);
    frame[1] = (uint8_t)length;
    return TTUN_PREFIX + length;
}

ptrdiff_t ttun_open(struct ttun_cipher_state *state, uint8_t *ciphertext, size_t length) {
    if (length < state->tag_size || length > TTUN_LENGTH_MAX || next_nonce(state) < 0)
        return -1;
    if (state->decrypt(ciphertext, NULL, NULL, ciphertext, length, NULL, 0, state->nonce,
                       state->key) != 0)
        return -1;
    return (ptrdiff_t)(length - state->tag_size);
}

size_t ttun_whole_frames(const uint8_t *bytes, size_t size, uint32_t tag_size, long *bad) {
    size_t whole = 0;
    *bad = -1;
    while (size - whole >= TTUN_PREFIX) {
        size_t length = ttun_frame_length(bytes + whole);
        if (length < tag_size) {
            *bad = (long)length;
            break;
        }
        if (size - whole - TTUN_PREFIX < length)
            break;
        whole += TTUN_PREFIX + length;
    }
    return whole;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int ttun_bench(struct ttun_cipher_state *sealing, struct ttun_cipher_state *opening,
               uint8_t *buffer, size_t room, size_t size, double seconds, double rates[2]) {
    double bytes = 0, seal_time = 0, open_time = 0;
    size_t frame = TTUN_PREFIX + size + sealing->tag_size, frames = room / frame;
    if (frames == 0)
        return -1;
    while (seal_time + open_time < seconds) {
        double start = now();
        for (size_t i = 0; i < frames; i++)
            ttun_seal(sealing, buffer + i * frame, buffer + i * frame + TTUN_PREFIX, size);
        double sealed = now();
        for (size_t i = 0; i < frames; i++)
            if (ttun_open(opening, buffer + i * frame + TTUN_PREFIX, frame - TTUN_PREFIX) < 0)
                return -1;
        open_time += now() - sealed;
        seal_time += sealed - start;
        bytes += (double)(frames * size);
    }
    rates[0] = bytes / seal_time;
    rates[1] = bytes / open_time;
    return 0;
}

void *ttun_find_function(const char *library, const char *name) {
    void *handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (handle == NULL)
        return NULL;
    void *function = dlsym(handle, name);
    dlclose(handle); /* it stays loaded: PyNaCl holds it */
    return function;
}
