/* The parser of vnet headers: any header, any packet. If accepted, the segments must contain the
 * whole payload in order, each within the gso_size of the header. */
#include "fuzz.h"
#include "offload.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct ttun_vnet vnet;
    if (size < sizeof vnet)
        return 0;
    memcpy(&vnet, data, sizeof vnet);
    data += sizeof vnet;
    size -= sizeof vnet;
    uint8_t *packet = copy_of(data, size);
    const uint8_t *found;
    struct ttun_segmenter g;
    size_t length, segments = 0, payload = 0;
    bool taken = ttun_segment(&g, &vnet, packet, size);
    while ((found = ttun_next_segment(&g, &length)) != NULL) {
        MUST(taken && found >= packet && found + length <= packet + size);
        segments++;
        if (vnet.gso_type == TTUN_GSO_NONE) {
            MUST(length == size && segments == 1);
            continue;
        }
        MUST(length > g.headers_size && length <= g.headers_size + vnet.gso_size);
        size_t part = length - g.headers_size;
        MUST(memcmp(found + g.headers_size, data + g.headers_size + payload, part) == 0);
        payload += part;
        MUST(part == vnet.gso_size || g.headers_size + payload == size);
    }
    MUST(taken == (segments > 0));
    if (taken && vnet.gso_type != TTUN_GSO_NONE)
        MUST(g.headers_size + payload == size);
    free(packet);
    return 0;
}
