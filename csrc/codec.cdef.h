/* What Python sees of codec.h, mailbox.h, process.h and session.h, in the subset of C that cffi reads.
 */

#define TTUN_KEY_SIZE ...
#define TTUN_PREFIX ...
#define TTUN_LENGTH_MAX ...

typedef int (*ttun_encrypt)(unsigned char *, unsigned long long *, const unsigned char *,
                            unsigned long long, const unsigned char *, unsigned long long,
                            const unsigned char *, const unsigned char *, const unsigned char *);
typedef int (*ttun_decrypt)(unsigned char *, unsigned long long *, unsigned char *,
                            const unsigned char *, unsigned long long, const unsigned char *,
                            unsigned long long, const unsigned char *, const unsigned char *);

typedef int (*ttun_expand)(unsigned char *, const unsigned char *);

struct ttun_cipher_state {
    uint64_t counter;
    uint32_t tag_size;
    ...;
};

struct ttun_cipher_state *ttun_cipher_new(ttun_encrypt, ttun_decrypt, ttun_expand,
                                          uint32_t tag_size, uint8_t direction, const uint8_t *key);
void ttun_cipher_wipe(struct ttun_cipher_state *);
void ttun_cipher_free(struct ttun_cipher_state *);
void *ttun_find_function(const char *library, const char *name);
size_t ttun_seal(struct ttun_cipher_state *, uint8_t *frame, const uint8_t *packet, size_t size);
ptrdiff_t ttun_open(struct ttun_cipher_state *, uint8_t *ciphertext, size_t length);
size_t ttun_whole_frames(const uint8_t *bytes, size_t size, uint32_t tag_size, long *bad);

enum ttun_reason {
    TTUN_RUNNING,
    TTUN_END_STOPPED,
    TTUN_END_CLOSED,
    TTUN_END_TRUNCATED,
    TTUN_END_LENGTH,
    TTUN_END_TAG,
    TTUN_END_SOCKET,
    TTUN_END_DEVICE,
    TTUN_END_NONCES,
    TTUN_END_CONTROL,
    ...
};

struct ttun_counters {
    uint64_t uplink_packets, uplink_bytes;
    uint64_t downlink_packets, downlink_bytes;
    uint64_t refused;
    uint64_t empty;
    uint64_t unsendable;
    uint64_t congested;
    uint64_t ignored;
    uint64_t forged;
    uint64_t sent;
    ...;
};

enum ttun_offload { TTUN_OFFLOAD_VNET, TTUN_OFFLOAD_TCP, TTUN_OFFLOAD_UDP, TTUN_X1, ... };
enum ttun_type { TTUN_OFFLOADED, TTUN_PING, TTUN_PONG, TTUN_REKEY, TTUN_SWITCH, ... };

struct ttun_control {
    uint8_t type;
    uint8_t body[...];
};

struct ttun_session;

struct ttun_session *ttun_session_new(int tun, int socket, int offload, int wire,
                                      const struct ttun_cipher_state *uplink,
                                      const struct ttun_cipher_state *downlink, int direct,
                                      unsigned slots, size_t queue);
void ttun_uplink_seal(struct ttun_session *);
void ttun_uplink_send(struct ttun_session *);
void ttun_downlink_receive(struct ttun_session *);
void ttun_downlink_open(struct ttun_session *);
void ttun_session_stop(struct ttun_session *);
int ttun_session_reason(struct ttun_session *, int *detail);
void ttun_session_counters(struct ttun_session *, struct ttun_counters *out);
uint64_t ttun_session_silence(struct ttun_session *);
int ttun_session_take(struct ttun_session *, struct ttun_control *frame, long milliseconds);
void ttun_session_post(struct ttun_session *, const struct ttun_control *frame);
int ttun_session_rekey(struct ttun_session *, const struct ttun_cipher_state *uplink,
                       const struct ttun_cipher_state *downlink);
void ttun_session_free(struct ttun_session *);

long ttun_drain(int tun, long most);

int ttun_end_with_parent(void);
int ttun_forbid_dumps(void);
void ttun_drop_bounding_set(void);
int ttun_drop_capabilities(void);
int ttun_end_on_signal(int number);
int ttun_replace_arguments(const char *before, const char *after, size_t size);
