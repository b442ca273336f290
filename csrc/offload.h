/* Offloads of the TUN device: one read or write carries up to 64 KiB.
 *
 * With a vnet header (Documentation/networking/tuntap.rst, linux/virtio_net.h) the kernel leaves
 * checksums and segmentation of the uplink to this program, and accepts coalesced packets on the
 * downlink:
 *
 *     segment    one GSO packet       ->  packets for a peer without offloads
 *     coalesce   consecutive packets  ->  one GSO packet for the kernel
 *
 * coalesce followed by segment gives the same bytes. If the peer has offloads too, a packet is sent
 * unsegmented, with its gso_size as the only metadata. No payload is copied. */
#ifndef TTUN_OFFLOAD_H
#define TTUN_OFFLOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum {
    TTUN_PACKET_MAX = 40 + 65535, /* an IPv6 header and the largest length in it */
    TTUN_SEGMENTS_MAX = 64,       /* coalesced into one; the kernel's lowest limit for UDP */
    TTUN_COALESCED_MAX = 65535    /* bytes of a coalesced packet, with the IPv6 header */
};

/* struct virtio_net_hdr, in host byte order. */
struct ttun_vnet {
    uint8_t flags;    /* TTUN_NEEDS_CHECKSUM */
    uint8_t gso_type; /* enum ttun_gso */
    uint16_t header_size;
    uint16_t gso_size; /* payload bytes of each segment except the last */
    uint16_t checksum_start, checksum_offset;
};

enum { TTUN_NEEDS_CHECKSUM = 1, TTUN_GSO_MIN = 8 /* smallest gso_size accepted */ };
enum ttun_gso { TTUN_GSO_NONE = 0, TTUN_GSO_TCP4 = 1, TTUN_GSO_TCP6 = 4, TTUN_GSO_UDP = 5 };

/* ---- segment ---- */

struct ttun_segmenter {
    uint8_t *packet; /* the packet; its remaining payload is at `next` */
    size_t size, next;
    size_t headers_size, transport; /* all headers; offset of TCP or UDP */
    size_t gso_size;                /* 0: not a GSO packet */
    uint64_t partial;               /* pseudo-header sum without the length */
    bool udp;
    uint8_t flags; /* TCP flags of the GSO packet */
};

/* Starts segmenting a packet of size bytes, in place. Returns false, and there are no segments, if
 * the vnet header does not match the packet. */
bool ttun_segment(struct ttun_segmenter *g, const struct ttun_vnet *vnet, uint8_t *packet,
                  size_t size);

/* Returns the next segment, with valid checksums, or NULL after the last one. It is valid until the
 * next call, which overwrites it. */
const uint8_t *ttun_next_segment(struct ttun_segmenter *g, size_t *size);

/* ---- coalesce ---- */

/* Of a packet that may be coalesced: offset of TCP or UDP, size of all headers. */
struct ttun_layout {
    size_t transport, headers_size;
    uint8_t protocol;
};

struct ttun_coalescer {
    struct ttun_vnet vnet;
    bool tcp, udp;     /* which protocols to coalesce */
    bool open;         /* another packet may follow */
    unsigned segments; /* coalesced so far; 0: empty */
    size_t size;       /* headers once, and all payloads */
    struct ttun_layout layout;
    uint32_t next_sequence;
    /* The vnet header, the first packet, the payloads of the others. */
    struct iovec parts[2 + TTUN_SEGMENTS_MAX];
};

/* Initializes an empty coalescer. tcp, udp: which protocols to coalesce. */
void ttun_coalescer_init(struct ttun_coalescer *c, bool tcp, bool udp);

/* Adds a packet, which must stay valid until the flush and is modified. Returns false if it does
 * not continue the current one: flush, then add it again. */
bool ttun_coalesce(struct ttun_coalescer *c, uint8_t *packet, size_t size);

/* Finishes the packet: parts[0] is the vnet header, the other parts are the packet. Returns the
 * number of parts, 0 if it was empty. Leaves the coalescer empty. */
unsigned ttun_flush(struct ttun_coalescer *c);

/* ---- offloaded packets, sent unsegmented ---- */

/* Restores the vnet header of an offloaded packet, and the pseudo-header sum in its checksum field.
 * gso_size: 0 for a single packet, else the segment payload size. tcp, udp: offloads of this
 * device. Returns false if it breaks a rule of docs/protocol.md, "Offload packets". */
bool ttun_restore_vnet(struct ttun_vnet *vnet, uint8_t *packet, size_t size, uint16_t gso_size,
                       bool tcp, bool udp);

/* Returns whether ttun_restore_vnet would give the same header and packet at a peer with the
 * offloads tcp and udp, and whether sending it unsegmented is worthwhile. */
bool ttun_stays_whole(const struct ttun_vnet *vnet, const uint8_t *packet, size_t size, bool tcp,
                      bool udp);

#endif
