#define _DEFAULT_SOURCE /* explicit_bzero */
#include "fq.h"

#include <assert.h>
#include <string.h>

#include "packet.h"

enum { NONE = 0xffff };

/* A packet is a list of cells; the first one holds its metadata. */
struct cell {
    uint16_t next;   /* cell of the packet, or free cell; NONE: the last */
    uint16_t behind; /* first cell: the next packet of the flow */
    uint32_t size;   /* first cell: of the packet */
    uint64_t since;  /* first cell: arrival, in microseconds */
    uint8_t bytes[FQ_CELL - 16];
};

static_assert(sizeof(struct cell) == FQ_CELL, "cells are contiguous");
static_assert((int)FQ_CELLS_MAX <= (int)NONE, "cell indices fit");
static_assert((int)FQ_FLOWS <= (int)NONE, "flow indices fit");

enum { ROOM = sizeof((struct cell *)0)->bytes };

static struct cell *cell(struct ttun_fq *fq, uint16_t number) {
    assert(number < fq->fresh);
    return (struct cell *)(fq->memory + (size_t)number * FQ_CELL);
}

void ttun_fq_init(struct ttun_fq *fq, uint8_t *memory, size_t size, uint64_t salt) {
    memset(fq, 0, sizeof *fq);
    fq->memory = memory;
    fq->cells = fq->free_cells = (unsigned)(size / FQ_CELL);
    assert(fq->cells <= FQ_CELLS_MAX && (uintptr_t)memory % _Alignof(struct cell) == 0);
    fq->salt = salt;
    fq->first_free = NONE;
    fq->new_flows = fq->old_flows = (struct fq_list){NONE, NONE};
    for (unsigned i = 0; i < FQ_FLOWS; i++)
        fq->flows[i].head = fq->flows[i].tail = NONE;
}

void ttun_fq_wipe(struct ttun_fq *fq) {
    explicit_bzero(fq->memory, (size_t)fq->fresh * FQ_CELL);
}

/* ---- cells ---------------------------------------------------------------------------------- */

static uint16_t new_cell(struct ttun_fq *fq) {
    assert(fq->free_cells > 0);
    fq->free_cells--;
    if (fq->first_free == NONE)
        return (uint16_t)fq->fresh++;
    uint16_t number = fq->first_free;
    fq->first_free = cell(fq, number)->next;
    return number;
}

/* Removes a flow's oldest packet; copies it to `out` unless NULL. Returns its size. */
static size_t take_head(struct ttun_fq *fq, struct fq_flow *flow, uint8_t *out) {
    uint16_t number = flow->head;
    struct cell *first = cell(fq, number);
    size_t size = first->size;
    flow->head = first->behind;
    if (flow->head == NONE)
        flow->tail = NONE;
    for (size_t done = 0; number != NONE;) {
        struct cell *c = cell(fq, number);
        uint16_t next = c->next;
        size_t part = size - done < ROOM ? size - done : ROOM;
        if (out != NULL)
            memcpy(out + done, c->bytes, part);
        done += part;
        c->next = fq->first_free;
        fq->first_free = number;
        fq->free_cells++;
        flow->cells--;
        number = next;
    }
    flow->bytes -= (uint32_t)size;
    fq->packets--;
    return size;
}

/* ---- flows ---------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t hash, const uint8_t *bytes, size_t size) {
    for (size_t i = 0; i < size; i += 4) {
        uint32_t word;
        memcpy(&word, bytes + i, sizeof word);
        hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
    }
    return hash;
}

/* Returns the flow of a packet: by addresses, protocol and, for unfragmented TCP and UDP, ports. */
static struct fq_flow *find_flow(struct ttun_fq *fq, const uint8_t *ip, size_t size) {
    uint64_t hash = fq->salt;
    uint8_t protocol = 0;
    size_t ports = 0;
    if (size >= 20 && ip[0] >> 4 == 4) {
        protocol = ip[9];
        hash = mix(hash, ip + 12, 8);
        bool fragment = (ip[6] & 0x3f) != 0 || ip[7] != 0;
        ports = fragment ? size : (ip[0] & 15u) * 4u;
    } else if (size >= 40 && ip[0] >> 4 == 6) {
        protocol = ip[6];
        hash = mix(hash, ip + 8, 32);
        ports = 40;
    }
    hash = (hash ^ protocol) * 0x9E3779B97F4A7C15u;
    if ((protocol == PROTO_TCP || protocol == PROTO_UDP) && ports + 4 <= size)
        hash = mix(hash, ip + ports, 4);
    return &fq->flows[(hash >> 32) % FQ_FLOWS];
}

static void append(struct ttun_fq *fq, struct fq_list *list, struct fq_flow *flow) {
    uint16_t number = (uint16_t)(flow - fq->flows);
    flow->next = NONE;
    flow->listed = true;
    if (list->first == NONE)
        list->first = number;
    else
        fq->flows[list->last].next = number;
    list->last = number;
}

static void remove_first(struct ttun_fq *fq, struct fq_list *list) {
    struct fq_flow *flow = &fq->flows[list->first];
    list->first = flow->next;
    if (list->first == NONE)
        list->last = NONE;
    flow->listed = false;
}

/* Frees cells by dropping packets of the largest flow. */
static void make_room(struct ttun_fq *fq, unsigned cells) {
    while (fq->free_cells < cells) {
        struct fq_flow *fattest = &fq->flows[0];
        for (unsigned i = 1; i < FQ_FLOWS; i++)
            if (fq->flows[i].cells > fattest->cells)
                fattest = &fq->flows[i];
        /* Drop several at once, so that a flood does not search all flows for each packet. */
        unsigned enough = fq->cells / 64;
        for (unsigned before = fq->free_cells;
             fattest->head != NONE && (fq->free_cells < cells || fq->free_cells - before < enough);
             fq->dropped++)
            take_head(fq, fattest, NULL);
    }
}

void ttun_fq_put(struct ttun_fq *fq, const uint8_t *packet, size_t size, size_t ip, uint64_t now) {
    unsigned cells = (unsigned)((size + ROOM - 1) / ROOM);
    assert(ip < size && cells <= fq->cells);
    make_room(fq, cells);
    struct fq_flow *flow = find_flow(fq, packet + ip, size - ip);
    uint16_t number = new_cell(fq);
    struct cell *c = cell(fq, number);
    *c = (struct cell){.behind = NONE, .size = (uint32_t)size, .since = now, .next = NONE};
    if (flow->head == NONE)
        flow->head = number;
    else
        cell(fq, flow->tail)->behind = number;
    flow->tail = number;
    for (size_t done = 0;;) {
        size_t part = size - done < ROOM ? size - done : ROOM;
        memcpy(c->bytes, packet + done, part);
        done += part;
        if (done == size)
            break;
        c->next = new_cell(fq);
        c = cell(fq, c->next);
        c->next = NONE;
    }
    flow->cells += cells;
    flow->bytes += (uint32_t)size;
    fq->packets++;
    if (!flow->listed) {
        flow->deficit = FQ_QUANTUM;
        append(fq, &fq->new_flows, flow);
    }
}

size_t ttun_fq_take(struct ttun_fq *fq, uint8_t *out, uint64_t now,
                    const struct ttun_codel_pace *pace) {
    for (;;) {
        struct fq_list *list = fq->new_flows.first != NONE ? &fq->new_flows : &fq->old_flows;
        if (list->first == NONE)
            return 0;
        struct fq_flow *flow = &fq->flows[list->first];
        if (flow->deficit <= 0) {
            flow->deficit += FQ_QUANTUM;
            remove_first(fq, list);
            append(fq, &fq->old_flows, flow);
            continue;
        }
        while (flow->head != NONE) {
            const struct cell *first = cell(fq, flow->head);
            /* A single packet is not a queue (RFC 8289, 5.4). */
            uint64_t delay = flow->bytes > FQ_QUANTUM ? now - first->since : 0;
            ttun_codel_watch(&flow->codel, now, delay, pace);
            if (ttun_codel_drops(&flow->codel, first->size)) {
                take_head(fq, flow, NULL);
                fq->dropped++;
                continue;
            }
            size_t size = take_head(fq, flow, out);
            flow->deficit -= (int32_t)size;
            return size;
        }
        remove_first(fq, list);
        /* A new flow becomes an old one before it can be new again (RFC 8290, 4.2). */
        if (list == &fq->new_flows && fq->old_flows.first != NONE)
            append(fq, &fq->old_flows, flow);
    }
}
