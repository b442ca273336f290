/* Offloaded packets of a peer: any gso_size, any packet. If accepted, the restored header must
 * match the packet, segmenting must give the whole payload in order, and ttun_stays_whole must
 * agree. */
#include "fuzz.h"
#include "offload.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input in = {data, size};
    uint16_t gso_size = take16(&in);
    uint8_t takes = take(&in);
    bool tcp = takes & 1, udp = takes & 2;
    uint8_t *packet = copy_of(in.bytes, in.left);
    const uint8_t *found;
    struct ttun_vnet vnet;
    if (!ttun_restore_vnet(&vnet, packet, in.left, gso_size, tcp, udp)) {
        MUST(in.left == 0 || memcmp(packet, in.bytes, in.left) == 0);
        free(packet);
        return 0;
    }
    size_t field = vnet.checksum_start + vnet.checksum_offset;
    MUST(vnet.flags == TTUN_NEEDS_CHECKSUM && vnet.gso_size == gso_size);
    MUST(vnet.checksum_offset == 6 ? udp : tcp);
    MUST(field + 2 <= vnet.header_size && vnet.header_size <= in.left);
    MUST((vnet.gso_type == TTUN_GSO_NONE) == (gso_size == 0));
    MUST(memcmp(packet, in.bytes, field) == 0);
    MUST(memcmp(packet + field + 2, in.bytes + field + 2, in.left - field - 2) == 0);
    /* A sender segments more UDP than older kernels accept. */
    bool many = vnet.gso_type == TTUN_GSO_UDP &&
                in.left - vnet.header_size > (size_t)gso_size * TTUN_SEGMENTS_MAX;
    if (gso_size > 0)
        MUST(ttun_stays_whole(&vnet, packet, in.left, tcp, udp) == !many);

    struct ttun_segmenter g;
    size_t length, payload = 0;
    MUST(ttun_segment(&g, &vnet, packet, in.left));
    while ((found = ttun_next_segment(&g, &length)) != NULL && gso_size > 0) {
        size_t part = length - vnet.header_size;
        MUST(found >= packet && found + length <= packet + in.left && part <= gso_size);
        MUST(memcmp(found + vnet.header_size, in.bytes + vnet.header_size + payload, part) == 0);
        payload += part;
    }
    if (gso_size > 0)
        MUST(vnet.header_size + payload == in.left);
    free(packet);
    return 0;
}
