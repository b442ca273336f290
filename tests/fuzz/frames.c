/* The frame parser and opener, on any input from a peer.
 *
 *  1. A stream split anywhere gives the same frames.
 *  2. Each complete frame is opened in place, like in the downlink.
 *  3. A sealed packet opens unchanged; with a changed byte it never opens.
 *
 * The AEAD is a toy, so that the fuzzer can get past the tag. */
#include "frame.h"
#include "fuzz.h"

enum { TAG = 16 };

static uint8_t pad(const unsigned char *nonce, const unsigned char *key, size_t i) {
    return (uint8_t)(nonce[0] + 31 * nonce[11] + key[i % TTUN_KEY_SIZE] + i);
}

static void tag_of(uint8_t tag[TAG], const unsigned char *c, size_t size,
                   const unsigned char *nonce) {
    memset(tag, nonce[11], TAG);
    for (size_t i = 0; i < size; i++)
        tag[i % TAG] = (uint8_t)(tag[i % TAG] * 3 + c[i] + 1);
}

static int toy_encrypt(unsigned char *c, unsigned long long *clen, const unsigned char *m,
                       unsigned long long mlen, const unsigned char *ad, unsigned long long adlen,
                       const unsigned char *nsec, const unsigned char *npub,
                       const unsigned char *k) {
    (void)clen, (void)ad, (void)adlen, (void)nsec;
    for (size_t i = 0; i < mlen; i++)
        c[i] = m[i] ^ pad(npub, k, i);
    tag_of(c + mlen, c, mlen, npub);
    return 0;
}

static int toy_decrypt(unsigned char *m, unsigned long long *mlen, unsigned char *nsec,
                       const unsigned char *c, unsigned long long clen, const unsigned char *ad,
                       unsigned long long adlen, const unsigned char *npub,
                       const unsigned char *k) {
    (void)mlen, (void)nsec, (void)ad, (void)adlen;
    uint8_t tag[TAG];
    MUST(clen >= TAG);
    tag_of(tag, c, clen - TAG, npub);
    if (memcmp(tag, c + clen - TAG, TAG) != 0)
        return -1;
    for (size_t i = 0; i < clen - TAG; i++)
        m[i] = c[i] ^ pad(npub, k, i);
    return 0;
}

static struct ttun_cipher_state *state(void) {
    static const uint8_t key[TTUN_KEY_SIZE] = {1, 2, 3};
    struct ttun_cipher_state *made = ttun_cipher_new(toy_encrypt, toy_decrypt, NULL, TAG, 0, key);
    MUST(made != NULL);
    return made;
}

static void parse_and_open(const uint8_t *data, size_t size, size_t cut) {
    uint8_t *stream = copy_of(data, size), *first = copy_of(data, cut);
    long bad, bad_first, bad_rest;
    size_t whole = ttun_whole_frames(stream, size, TAG, &bad);
    MUST(whole <= size && bad < TAG);

    size_t begin = ttun_whole_frames(first, cut, TAG, &bad_first);
    MUST(begin <= whole);
    if (bad_first >= 0)
        MUST(begin == whole && bad == bad_first);
    else
        MUST(begin + ttun_whole_frames(stream + begin, size - begin, TAG, &bad_rest) == whole &&
             bad_rest == bad);

    struct ttun_cipher_state *rx = state();
    for (size_t at = 0; at < whole;) {
        size_t length = ttun_frame_length(stream + at);
        at += TTUN_PREFIX;
        MUST(length >= TAG && at + length <= whole);
        ptrdiff_t opened = ttun_open(rx, stream + at, length);
        MUST(opened == -1 || opened == (ptrdiff_t)(length - TAG));
        at += length;
    }
    ttun_open(rx, first, cut); /* any length, also one that no frame has */
    ttun_cipher_free(rx);
    free(first);
    free(stream);
}

static void seal_and_open(struct input in) {
    struct ttun_cipher_state *tx = state(), *rx = state();
    while (in.left > 0) {
        size_t size = take16(&in) % 700;
        uint8_t change = take(&in);
        if (size > in.left)
            size = in.left;
        uint8_t *frame = malloc(TTUN_PREFIX + size + TAG);
        MUST(frame != NULL);
        memcpy(frame + TTUN_PREFIX, in.bytes, size); /* in place */
        size_t framed = ttun_seal(tx, frame, frame + TTUN_PREFIX, size);
        MUST(framed == TTUN_PREFIX + size + TAG);
        long bad;
        MUST(ttun_whole_frames(frame, framed, TAG, &bad) == framed && bad == -1);
        if (change > 200)
            frame[framed - 1] ^= 1;
        ptrdiff_t opened = ttun_open(rx, frame + TTUN_PREFIX, framed - TTUN_PREFIX);
        if (change > 200)
            MUST(opened == -1);
        else
            MUST(opened == (ptrdiff_t)size && memcmp(frame + TTUN_PREFIX, in.bytes, size) == 0);
        in.bytes += size;
        in.left -= size;
        free(frame);
    }
    ttun_cipher_free(tx);
    ttun_cipher_free(rx);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input in = {data, size};
    size_t cut = take16(&in);
    parse_and_open(in.bytes, in.left, in.left ? cut % (in.left + 1) : 0);
    seal_and_open(in);
    return 0;
}
