/* Coalesce, then segment: the same packets come back, byte for byte.
 *
 * The input describes packets: mostly consecutive ones of a flow, some with a change, with valid
 * and invalid checksums, and random bytes. */
#include "fuzz.h"
#include "offload.h"

enum { PACKETS_MAX = 200, PACKET_ROOM = 1600 };

struct packet {
    uint8_t *bytes; /* passed to the coalescer, which modifies it */
    uint8_t *copy;  /* expected result */
    size_t size;
};

static void put16(uint8_t *p, unsigned v) {
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

/* RFC 1071, a byte at a time; bytes at odd places are the low ones. */
static unsigned sum_of(unsigned sum, const uint8_t *p, size_t size) {
    for (size_t i = 0; i < size; i++)
        sum += i % 2 ? p[i] : (unsigned)p[i] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}

/* The state of the flow that the next packet would follow. */
struct flow {
    bool v6, udp;
    uint8_t options; /* of TCP, in words */
    uint16_t identification, window;
    uint32_t sequence;
};

/* Builds the next packet of a flow and returns its size. */
static size_t build(struct flow *f, struct input *in, uint8_t *p) {
    uint8_t change = take(in), flags = 0x10;
    if (change & 0x80) { /* something is different */
        switch (change & 15) {
        case 0:
            f->v6 = !f->v6;
            break;
        case 1:
            f->udp = !f->udp;
            break;
        case 2:
            f->options = take(in) % 11;
            break;
        case 3:
            f->sequence += take(in);
            break;
        case 4:
            f->identification = take16(in);
            break;
        case 5:
            f->window = take16(in);
            break;
        case 6:
            flags = take(in);
            break;
        default:
            flags |= 8;
            break;
        }
    }
    size_t ip = f->v6 ? 40 : 20, header = f->udp ? 8 : 20 + 4u * f->options;
    size_t payload = change & 0x40 ? take16(in) % 1400 : 100, size = ip + header + payload;
    memset(p, 0, size);
    uint8_t *t = p + ip;
    if (f->v6) {
        p[0] = 0x60;
        put16(p + 4, (unsigned)(header + payload));
        p[6] = f->udp ? 17 : 6;
        p[7] = 64;
        p[8] = p[24] = 0xfc;
    } else {
        p[0] = 0x45;
        put16(p + 2, (unsigned)size);
        put16(p + 4, f->identification++);
        p[6] = 0x40;
        p[8] = 64;
        p[9] = f->udp ? 17 : 6;
        p[12] = p[16] = 10;
        put16(p + 10, 0xffff - sum_of(0, p, 20));
    }
    put16(t, 5001);
    put16(t + 2, 80);
    for (size_t i = 0; i < payload; i++)
        t[header + i] = (uint8_t)(f->sequence + i);
    unsigned sum = sum_of(0, f->v6 ? p + 8 : p + 12, f->v6 ? 32 : 8) + (f->udp ? 17 : 6) +
                   (unsigned)(header + payload);
    if (f->udp) {
        put16(t + 4, (unsigned)(header + payload));
        put16(t + 6, 0xffff - sum_of(sum, t, header + payload));
    } else {
        put16(t + 4, f->sequence >> 16);
        put16(t + 6, f->sequence & 0xffff);
        t[12] = (uint8_t)((5u + f->options) << 4);
        t[13] = flags;
        put16(t + 14, f->window);
        put16(t + 16, 0xffff - sum_of(sum, t, header + payload));
        f->sequence += (uint32_t)payload;
    }
    if (change & 0x20) { /* any byte of it, after the checksums were made */
        uint16_t at = take16(in);
        p[at % size] ^= take(in);
    }
    return size;
}

/* Cuts what would be written to the device, and compares it with the next packets. Returns how many
 * those were. */
static size_t expect(struct ttun_coalescer *c, unsigned parts, const struct packet *next,
                     size_t left) {
    size_t size = 0, found = 0, length;
    struct ttun_vnet vnet;
    memcpy(&vnet, c->parts[0].iov_base, sizeof vnet);
    for (unsigned i = 1; i < parts; i++)
        size += c->parts[i].iov_len;
    uint8_t *merged = malloc(size);
    const uint8_t *segment;
    MUST(merged != NULL && size <= TTUN_PACKET_MAX);
    for (unsigned i = 1, at = 0; i < parts; at += (unsigned)c->parts[i].iov_len, i++)
        memcpy(merged + at, c->parts[i].iov_base, c->parts[i].iov_len);
    struct ttun_segmenter g;
    MUST(ttun_segment(&g, &vnet, merged, size));
    while ((segment = ttun_next_segment(&g, &length)) != NULL) {
        MUST(found < left && length == next[found].size);
        MUST(memcmp(segment, next[found].copy, length) == 0);
        found++;
    }
    free(merged);
    return found;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input in = {data, size};
    struct packet packets[PACKETS_MAX];
    struct flow flow = {.window = 500, .sequence = 0xfffffff0};
    struct ttun_coalescer c;
    uint8_t kinds = take(&in), p[PACKET_ROOM];
    size_t made = 0, checked = 0;
    ttun_coalescer_init(&c, !(kinds & 1), !(kinds & 2));
    for (; in.left > 0 && made < PACKETS_MAX; made++) {
        size_t length = build(&flow, &in, p);
        if (kinds & 4 && made % 7 == 3 && in.left > 0) { /* the bytes of the input themselves */
            length = 1 + take(&in) % 255;
            if (length > in.left)
                length = in.left;
            if (length == 0)
                break;
            memcpy(p, in.bytes, length);
            in.bytes += length;
            in.left -= length;
        }
        packets[made] = (struct packet){copy_of(p, length), copy_of(p, length), length};
        if (!ttun_coalesce(&c, packets[made].bytes, length)) {
            checked += expect(&c, ttun_flush(&c), packets + checked, made - checked);
            MUST(checked == made);
            MUST(ttun_coalesce(&c, packets[made].bytes, length));
        }
    }
    unsigned parts = ttun_flush(&c);
    if (parts > 0)
        checked += expect(&c, parts, packets + checked, made - checked);
    MUST(checked == made && ttun_flush(&c) == 0);
    for (size_t i = 0; i < made; i++) {
        free(packets[i].bytes);
        free(packets[i].copy);
    }
    return 0;
}
