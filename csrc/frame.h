/* The frame: what one IP packet looks like on the TCP connection.
 *
 *     u16 big-endian length | length bytes of ciphertext and tag
 *
 * The nonce is never sent: both ends count the frames of each direction from 0.
 *
 *     direction (1) | 0 0 0 | counter (u64 big-endian) | zeros up to the cipher's nonce size
 *
 * This file knows bytes and nothing else: no descriptor, no thread, no Python. The AEAD functions
 * are libsodium's, handed in as pointers, so the process has one libsodium: the one in PyNaCl. */
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

/* crypto_aead_*_beforenm: does once what depends on the key alone. encrypt and decrypt are then the
 * _afternm functions, which take what it wrote in place of the key. */
typedef int (*ttun_expand)(unsigned char *key_state, const unsigned char *key);

/* One direction of a session: its cipher, its key and the number of its next frame. */
struct ttun_cipher_state {
    _Alignas(16) uint8_t key[TTUN_KEY_STATE]; /* libsodium wants the expanded one so aligned */
    uint8_t nonce[TTUN_NONCE_MAX];
    ttun_encrypt encrypt;
    ttun_decrypt decrypt;
    uint64_t counter;
    uint32_t tag_size;
};

/* Makes a cipher state whose next frame is number 0. expand: NULL where the cipher has none.
 * direction: 0 client to server, 1 server to client. key: TTUN_KEY_SIZE bytes, copied. Returns NULL
 * when tag_size is over TTUN_TAG_MAX or there is no memory. */
struct ttun_cipher_state *ttun_cipher_new(ttun_encrypt encrypt, ttun_decrypt decrypt,
                                          ttun_expand expand, uint32_t tag_size, uint8_t direction,
                                          const uint8_t *key);

/* Overwrites key and nonce, in a way that the compiler may not leave out. */
void ttun_cipher_wipe(struct ttun_cipher_state *state);

/* Wipes and frees it. NULL is fine. */
void ttun_cipher_free(struct ttun_cipher_state *state);

/* Seals one packet into one frame. frame: room for TTUN_PREFIX + packet_size + tag_size bytes.
 * packet may be frame + TTUN_PREFIX (in place) or lie elsewhere, but not overlap otherwise.
 * Returns the size of the frame, or 0 when the packet does not fit one or the counter ran out. */
size_t ttun_seal(struct ttun_cipher_state *state, uint8_t *frame, const uint8_t *packet,
                 size_t packet_size);

/* Opens the ciphertext of one frame (frame + TTUN_PREFIX, length bytes) in place: the packet is
 * then its first length - tag_size bytes. Returns the packet's size, or -1 when the length is
 * below the tag or the tag is wrong. */
ptrdiff_t ttun_open(struct ttun_cipher_state *state, uint8_t *ciphertext, size_t length);

/* Reads a length prefix. bytes: at least TTUN_PREFIX. */
static inline size_t ttun_frame_length(const uint8_t *bytes) {
    return (size_t)bytes[0] << 8 | bytes[1];
}

/* How many of the first size bytes of a stream are whole frames. *bad is the first length found
 * below tag_size (nothing behind it can be read), else -1. */
size_t ttun_whole_frames(const uint8_t *bytes, size_t size, uint32_t tag_size, long *bad);

/* Seals as many packets of size bytes as buffer has room for, opens them, and so on for some
 * seconds. rates: bytes of packets per second, sealed and opened. Returns 0, or -1 when a frame did
 * not open or there is no room for one. */
int ttun_bench(struct ttun_cipher_state *sealing, struct ttun_cipher_state *opening,
               uint8_t *buffer, size_t room, size_t size, double seconds, double rates[2]);

/* Finds a function in a library that this process has loaded already; NULL if there is none. */
void *ttun_find_function(const char *library, const char *name);

#endif
