/* The frame: the encoding of one IP packet on the TCP connection.
 *
 *     u16 big-endian length | length bytes of ciphertext and tag
 *
 * The nonce is never sent: both ends count the frames of each direction from 0.
 *
 *     direction (1) | 0 0 0 | counter (u64 big-endian) | zeros up to the cipher's nonce size
 *
 * Pure functions: no descriptors, threads or Python. The AEAD functions are passed in as pointers
 * to PyNaCl's libsodium, so the process has only one copy of it. */
#ifndef TTUN_FRAME_H
#define TTUN_FRAME_H

#include <stddef.h>
#include <stdint.h>

#include "wire.h"

enum {
    TTUN_KEY_STATE = 512, /* room for an expanded key: libsodium's crypto_aead_aes256gcm_state */
    TTUN_NONCE_MAX = 32,
    TTUN_TAG_MAX = 32
};

/* libsodium's combined mode: crypto_aead_*_encrypt and crypto_aead_*_decrypt. Both work in place.
 */
typedef int (*ttun_encrypt)(unsigned char *c, unsigned long long *clen, const unsigned char *m,
                            unsigned long long mlen, const unsigned char *ad,
                            unsigned long long adlen, const unsigned char *nsec,
                            const unsigned char *npub, const unsigned char *k);
typedef int (*ttun_decrypt)(unsigned char *m, unsigned long long *mlen, unsigned char *nsec,
                            const unsigned char *c, unsigned long long clen,
                            const unsigned char *ad, unsigned long long adlen,
                            const unsigned char *npub, const unsigned char *k);

/* crypto_aead_*_beforenm: expands the key once. encrypt and decrypt are then the _afternm
 * functions, which take the expanded key. */
typedef int (*ttun_expand)(unsigned char *key_state, const unsigned char *key);

/* One direction of a session: cipher, key, and counter of the next frame. */
struct ttun_cipher_state {
    _Alignas(16) uint8_t key[TTUN_KEY_STATE]; /* alignment of an expanded key */
    uint8_t nonce[TTUN_NONCE_MAX];
    ttun_encrypt encrypt;
    ttun_decrypt decrypt;
    uint64_t counter;
    uint32_t tag_size;
};

/* Creates a cipher state with counter 0. expand: NULL if the cipher has none. direction: 0 client
 * to server, 1 server to client. key: TTUN_KEY_SIZE bytes, copied. Returns NULL if tag_size exceeds
 * TTUN_TAG_MAX or memory is short. */
struct ttun_cipher_state *ttun_cipher_new(ttun_encrypt encrypt, ttun_decrypt decrypt,
                                          ttun_expand expand, uint32_t tag_size, uint8_t direction,
                                          const uint8_t *key);

/* Overwrites key and nonce; the compiler cannot optimize it away. */
void ttun_cipher_wipe(struct ttun_cipher_state *state);

/* Wipes and frees it. NULL is allowed. */
void ttun_cipher_free(struct ttun_cipher_state *state);

/* Seals a packet into a frame. frame: room for TTUN_PREFIX + packet_size + tag_size bytes. packet:
 * frame + TTUN_PREFIX (in place), or a buffer that does not overlap. Returns the size of the frame,
 * or 0 if the packet is too large or the counter is exhausted. */
size_t ttun_seal(struct ttun_cipher_state *state, uint8_t *frame, const uint8_t *packet,
                 size_t packet_size);

/* Opens the ciphertext of a frame (at frame + TTUN_PREFIX, length bytes) in place: its first
 * length - tag_size bytes become the packet. Returns the size of the packet, or -1 if length is
 * below tag_size or authentication fails. */
ptrdiff_t ttun_open(struct ttun_cipher_state *state, uint8_t *ciphertext, size_t length);

/* Returns the length prefix. bytes: at least TTUN_PREFIX of them. */
static inline size_t ttun_frame_length(const uint8_t *bytes) {
    return (size_t)bytes[0] << 8 | bytes[1];
}

/* Returns how many of the first size bytes of a stream form complete frames. *bad: the first length
 * below tag_size, after which nothing can be parsed, or -1. */
size_t ttun_whole_frames(const uint8_t *bytes, size_t size, uint32_t tag_size, long *bad);

/* Repeatedly seals as many packets of size bytes as fit into room bytes of buffer, and opens them,
 * for some seconds. rates: packet bytes per second sealed and opened. Returns 0, or -1 if a frame
 * failed to open or none fits. */
int ttun_bench(struct ttun_cipher_state *sealing, struct ttun_cipher_state *opening,
               uint8_t *buffer, size_t room, size_t size, double seconds, double rates[2]);

/* Finds a function in an already loaded library. Returns NULL if there is none. */
void *ttun_find_function(const char *library, const char *name);

#endif
