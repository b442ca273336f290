/* The uplink's queue, with little memory and any order of puts and takes. Packets are numbered:
 * each comes out unchanged, at most once, in the order of its flow; all others are counted as
 * dropped. */
#include "fq.h"
#include "fuzz.h"

enum { ROOM = 16 * 1024, FLOWS = 4, LARGEST = 3000 };

static size_t fill(uint8_t *packet, uint8_t flow, uint32_t number, size_t size) {
    memset(packet, (int)number, size);
    memset(packet, 0, 28);
    packet[0] = 0x45;
    packet[9] = 17;
    packet[20] = flow;
    memcpy(packet + 24, &number, sizeof number);
    return size;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static uint8_t memory[ROOM], packet[LARGEST], out[LARGEST];
    static struct ttun_fq fq;
    const struct ttun_codel_pace pace = {.target = 5000, .interval = 100000};
    uint32_t put = 0, last[FLOWS] = {0};
    uint64_t taken = 0, now = 1;
    ttun_fq_init(&fq, memory, ROOM, 7);
    for (size_t i = 0; i + 3 <= size; i += 3) {
        now += data[i + 2] * 50u;
        if (data[i] & 1) {
            size_t length = 28 + (data[i + 1] << 8 | data[i + 2]) % (LARGEST - 28);
            fill(packet, (data[i] >> 1) % FLOWS, ++put, length);
            ttun_fq_put(&fq, packet, length, 0, now);
        } else {
            size_t length = ttun_fq_take(&fq, out, now, &pace);
            if (length == 0) {
                MUST(fq.packets == 0);
                continue;
            }
            uint32_t number;
            memcpy(&number, out + 24, sizeof number);
            MUST(out[20] < FLOWS && number > last[out[20]] && number <= put);
            last[out[20]] = number;
            fill(packet, out[20], number, length);
            MUST(memcmp(packet, out, length) == 0);
            taken++;
        }
        MUST(put == taken + fq.packets + fq.dropped);
    }
    while (ttun_fq_take(&fq, out, now, &pace) > 0)
        taken++;
    MUST(fq.packets == 0 && put == taken + fq.dropped);
    MUST(fq.free_cells == ROOM / FQ_CELL);
    return 0;
}
