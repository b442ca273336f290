/* The downlink of an x1 session, from the socket to the device and the inbox, with frames of a peer
 * that has the key. The cipher is the identity, so that every input is authentic.
 *
 * The session must end with a fitting reason, and count each frame at most once. */
#include "session.h"
#include "fuzz.h"
#include "ring.h"

#include <sys/socket.h>
#include <unistd.h>

static int same_encrypt(unsigned char *c, unsigned long long *clen, const unsigned char *m,
                        unsigned long long mlen, const unsigned char *ad, unsigned long long adlen,
                        const unsigned char *nsec, const unsigned char *npub,
                        const unsigned char *k) {
    (void)clen, (void)ad, (void)adlen, (void)nsec, (void)npub, (void)k;
    memmove(c, m, mlen);
    return 0;
}

static int same_decrypt(unsigned char *m, unsigned long long *mlen, unsigned char *nsec,
                        const unsigned char *c, unsigned long long clen, const unsigned char *ad,
                        unsigned long long adlen, const unsigned char *npub,
                        const unsigned char *k) {
    (void)mlen, (void)nsec, (void)ad, (void)adlen, (void)npub, (void)k;
    memmove(m, c, clen);
    return 0;
}

/* How many frames of the stream hold something. */
static uint64_t frames_in(const uint8_t *data, size_t size, size_t *rest) {
    uint64_t frames = 0;
    while (size >= TTUN_PREFIX && size - TTUN_PREFIX >= ttun_frame_length(data)) {
        size_t length = TTUN_PREFIX + ttun_frame_length(data);
        frames++;
        data += length;
        size -= length;
    }
    *rest = size;
    return frames;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const uint8_t key[TTUN_KEY_SIZE];
    int tun[2], peer[2], detail;
    struct input in = {data, size};
    uint8_t choice = take(&in);
    int offload = choice & (TTUN_OFFLOAD_VNET | TTUN_OFFLOAD_TCP | TTUN_OFFLOAD_UDP);
    MUST(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, tun) == 0);
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, peer) == 0);
    struct ttun_cipher_state *state = ttun_cipher_new(same_encrypt, same_decrypt, NULL, 0, 0, key);
    /* With `direct` this one thread does it all. */
    struct ttun_session *s =
        ttun_session_new(tun[0], peer[0], offload, TTUN_X1, state, state, 1, SLOTS, 1 << 18);
    MUST(state != NULL && s != NULL);
    if (choice & 16)
        MUST(ttun_session_rekey(s, state, state));
    MUST(in.left == 0 || write(peer[1], in.bytes, in.left) == (ssize_t)in.left);
    close(peer[1]);

    ttun_downlink_receive(s);
    size_t rest;
    uint64_t frames = frames_in(in.bytes, in.left, &rest);
    int end = ttun_session_reason(s, &detail);
    MUST(end == TTUN_END_CLOSED || end == TTUN_END_TRUNCATED || end == TTUN_END_CONTROL);
    MUST(end != TTUN_END_TRUNCATED || (size_t)detail == rest);
    MUST(end != TTUN_END_CLOSED || rest == 0);
    MUST(end != TTUN_END_CONTROL || (detail >= TTUN_PING && detail <= TTUN_SWITCH));
    uint64_t counted = 0;
    for (int which = TTUN_COUNT_DOWNLINK_PACKETS; which < TTUN_COUNTERS; which++)
        if (which != TTUN_COUNT_DOWNLINK_BYTES)
            counted += ttun_session_counter(s, (enum ttun_counter)which);
    MUST(counted <= frames);
    ttun_session_free(s);
    ttun_cipher_free(state);
    close(tun[0]), close(tun[1]), close(peer[0]);
    return 0;
}
