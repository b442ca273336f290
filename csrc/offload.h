/* Large packets at the TUN device: one read or write carries up to 64 KiB.
 *
 * With a vnet header (Documentation/networking/tuntap.rst, linux/virtio_net.h) the kernel leaves
 * checksums and segmentation to us on the way in, and takes merged packets on the way out:
 *
 *     segment    one packet of the kernel's  ->  packets that a peer without offloads can use
 *     coalesce   consecutive packets         ->  one that the kernel takes in one go
 *
 * coalesce, then segment gives the same bytes. Where the other end has offloads too, a packet
 * travels whole, with its gso_size as all that must be said about it. Knows bytes and nothing else:
 * no descriptor, no allocation, no copy of a payload. */
#ifndef TTUN_OFFLOAD_H
#define TTUN_OFFLOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum {
    TTUN_PACKET_MAX = 40 + 65535, /* an IPv6 header and what its length field can say */
    TTUN_SEGMENTS_MAX = 64,       /* merged into one; the kernel's least limit for UDP */
    TTUN_MERGED_MAX = 65535       /* bytes of a merged packet, the IPv6 header included */
};

/* struct virtio_net_hdr, in the byte order of the machine. */
struct ttun_vnet {
    uint8_t flags;    /* TTUN_NEEDS_CHECKSUM */
    uint8_t gso_type; /* enum ttun_gso */
    uint16_t header_size;
    uint16_t gso_size; /* payload bytes of each segment but the last */
    uint16_t checksum_start, checksum_offset;
};

enum { TTUN_NEEDS_CHECKSUM = 1, TTUN_GSO_MIN = 8 /* least gso_size that anybody needs */ };
enum ttun_gso { TTUN_GSO_NONE = 0, TTUN_GSO_TCP4 = 1, TTUN_GSO_TCP6 = 4, TTUN_GSO_UDP = 5 };

/* ---- segment ---- */

struct ttun_segmenter {
    uint8_t *packet; /* the rest of it: what comes next is payload at `next` */
    size_t size, next;
    size_t headers_size, transport; /* IP, its options or extensions, and TCP or UDP */
    size_t gso_size;                /* 0: one packet, as it is */
    uint64_t partial;               /* sum over the pseudo-header, but for the length */
    bool udp;
    uint8_t flags; /* of TCP, in the whole packet */
};

/* Starts on a packet of size bytes, which is written to. Returns false, and there are no segments,
 * when the header contradicts the packet. */
bool ttun_segment(struct ttun_segmenter *g, const struct ttun_vnet *vnet, uint8_t *packet,
                  size_t size);

/* The next segment, with its checksums; NULL when there is none left. It stays until the next call,
 * which writes over it, and takes its headers from there. */
const uint8_t *ttun_next_segment(struct ttun_segmenter *g, size_t *size);

/* ---- coalesce ---- */

struct ttun_coalescer {
    struct ttun_vnet vnet;
    bool tcp, udp;     /* what may be merged */
    bool open;         /* one more may follow */
    unsigned segments; /* merged so far; 0: empty */
    size_t size;       /* of all: its headers once, all payloads */
    size_t transport, headers_size;
    uint32_t next_sequence;
    /* The vnet header, the first packet, the payloads of the others. */
    struct iovec parts[2 + TTUN_SEGMENTS_MAX];
};

/* Makes an empty one. What is false is never merged. */
void ttun_coalescer_init(struct ttun_coalescer *c, bool tcp, bool udp);

/* Adds a packet, which must stay where it is until the flush and is written to. Returns false when
 * it cannot follow those before it: flush, then add it again. */
bool ttun_coalesce(struct ttun_coalescer *c, uint8_t *packet, size_t size);

/* Ends what was added: parts[0] is the vnet header, the others are the packet. Returns how many
 * parts there are, 0 when nothing was added. The coalescer is empty then. */
unsigned ttun_flush(struct ttun_coalescer *c);

/* ---- whole packets ---- */

/* Makes the vnet header of a packet that lacks it, and writes the sum over the pseudo-header where
 * the kernel wants it. gso_size: 0 for one packet, else what its payload is to be cut into. tcp,
 * udp: what this device takes. Returns false for anything but one TCP or UDP packet, with no
 * fragment, IP option or extension header, whose lengths are those of the packet, with more than
 * one segment of at least TTUN_GSO_MIN bytes, and without SYN, RST, URG, CWR in all of them. */
bool ttun_restore_vnet(struct ttun_vnet *vnet, uint8_t *packet, size_t size, uint16_t gso_size,
                       bool tcp, bool udp);

/* Would ttun_restore_vnet give this very header, and this very packet, at an end that takes tcp,
 * udp, and is it worth it? */
bool ttun_stays_whole(const struct ttun_vnet *vnet, const uint8_t *packet, size_t size, bool tcp,
                      bool udp);

#endif
