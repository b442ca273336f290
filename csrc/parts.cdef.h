/* Declarations for tests and the benchmark, in addition to codec.cdef.h: the individual parts of the
 * packet path. Wheels omit them. */

struct ttun_cipher_state {
    uint64_t counter;
    ...;
};
size_t ttun_whole_frames(const uint8_t *bytes, size_t size, uint32_t tag_size, long *bad);
int ttun_bench(struct ttun_cipher_state *sealing, struct ttun_cipher_state *opening,
               uint8_t *buffer, size_t room, size_t size, double seconds, double rates[2]);

struct ttun_codel {
    ...;
};
struct ttun_codel_pace {
    uint64_t target, interval;
};
void ttun_codel_watch(struct ttun_codel *, uint64_t now, uint64_t delay,
                      const struct ttun_codel_pace *);
_Bool ttun_codel_drops(struct ttun_codel *, size_t size);

struct ttun_fq {
    unsigned free_cells, packets;
    uint64_t dropped;
    ...;
};
void ttun_fq_init(struct ttun_fq *, uint8_t *memory, size_t size, uint64_t salt);
void ttun_fq_put(struct ttun_fq *, const uint8_t *packet, size_t size, size_t ip, uint64_t now);
size_t ttun_fq_take(struct ttun_fq *, uint8_t *out, uint64_t now, const struct ttun_codel_pace *);
void ttun_fq_wipe(struct ttun_fq *);

#define TTUN_SEGMENTS_MAX ...
#define TTUN_PACKET_MAX ...

struct ttun_vnet {
    uint8_t flags;
    uint8_t gso_type;
    uint16_t header_size;
    uint16_t gso_size;
    uint16_t checksum_start, checksum_offset;
};

struct iovec {
    void *iov_base;
    size_t iov_len;
    ...;
};

struct ttun_segmenter {
    ...;
};
bool ttun_segment(struct ttun_segmenter *, const struct ttun_vnet *, uint8_t *packet, size_t size);
const uint8_t *ttun_next_segment(struct ttun_segmenter *, size_t *size);

struct ttun_coalescer {
    unsigned segments;
    struct iovec parts[...];
    ...;
};
void ttun_coalescer_init(struct ttun_coalescer *, bool tcp, bool udp);
bool ttun_coalesce(struct ttun_coalescer *, uint8_t *packet, size_t size);
unsigned ttun_flush(struct ttun_coalescer *);
bool ttun_stays_whole(const struct ttun_vnet *, const uint8_t *packet, size_t size, bool tcp,
                      bool udp);
bool ttun_restore_vnet(struct ttun_vnet *, uint8_t *packet, size_t size, uint16_t gso_size,
                       bool tcp, bool udp);

uint64_t now_ms(void);
uint64_t now_us(void);

uint64_t ttun_sum(uint64_t sum, const uint8_t *data, size_t size);
uint16_t ttun_fold(uint64_t sum);
