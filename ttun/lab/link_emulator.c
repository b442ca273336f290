/* A link between two hosts (network namespaces) with a rate, a delay, random loss and a queue:
 * like netem, for kernels that lack it. ttun/lab/link_emulator.py compiles and controls it.
 *
 *     link_emulator NETNS DEVICE NETNS DEVICE [rate DOWN[/UP]] [rtt MS] [loss PERCENT] [queue MS]
 *                   [seed NUMBER]
 *
 * It makes a TAP device in each namespace and forwards frames between the two. The path of a frame:
 *
 *     TAP --read--> queue --rate--> flight --delay, loss--> TAP
 *
 *  1. A frame joins the queue, or is dropped if the frames before it take longer to transmit than
 *     the queue allows.
 *  2. Frames leave the queue one after another. Each takes the time of its size at the rate.
 *  3. A frame is in flight for half of the round-trip time. Then it is lost or delivered. The order
 *     is kept.
 *
 * Queue and flight share one ring of bytes with three positions: delivered up to `head`,
 * transmitted up to `middle`, filled up to `tail`. Time is virtual: the time at which a frame
 * leaves the queue is computed from its arrival and its size, so a late wake-up does not slow the
 * link down.
 *
 * DOWN is the rate from the first namespace to the second, UP the rate back. The options are also
 * commands, one per line on stdin; so are `cut` (stop all delivery), `join` (resume) and
 * `counters`. Each command is answered by one line. The program ends at the end of its input.
 *
 * Exit codes: 0 end of input, 1 namespace or device not available, 2 bad usage. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

/* From linux/if_tun.h, which is not installed with every C library. */
#define TUN_SET_INTERFACE _IOW('T', 202, int)
enum { TAP = 0x0002, NO_PACKET_INFORMATION = 0x1000 };

enum {
    RING = 64 << 20, /* bytes in one direction: 200 Mbit/s for 2.6 s */
    FRAME_MAX = 2048,
    BURST = 64, /* frames read in one go from one device */
    LINE_BYTES = 256
};
static const double SECOND = 1e9; /* nanoseconds, as all times here */

/* A frame in the ring; its bytes follow. */
struct record {
    uint64_t time; /* in the queue: of arrival; in flight: of delivery */
    uint32_t size; /* 0: the rest of the ring is unused; the next frame is at its start */
    uint32_t unused;
};

struct counters {
    uint64_t passed, bytes, lost, dropped;
};

struct direction {
    int from, to;                /* the TAP devices */
    double rate;                 /* bits per second */
    uint64_t head, middle, tail; /* positions; they only grow, and count modulo RING */
    uint64_t free_at;            /* when the last transmitted frame left the queue */
    uint64_t waiting;            /* bytes between middle and tail */
    struct counters counters;
    uint8_t *ring;
};

/* Records start at multiples of 16 bytes, so each one is aligned. */
static _Alignas(16) uint8_t rings[2][RING];
static struct direction directions[2];
static double delay, queue_limit, loss; /* nanoseconds; nanoseconds; 0 to 1 */
static bool cut;
static uint64_t random_state = 88172645463325252u; /* any number but 0 */

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Returns the next random number in [0, 1): xorshift64 (Marsaglia, 2003). */
static double chance(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (double)(random_state >> 11) / 9007199254740992.0;
}

/* Returns the record at a position; moves the position past an unused end of the ring. */
static struct record *record_at(struct direction *way, uint64_t *position) {
    struct record *record = (struct record *)(void *)(way->ring + *position % RING);
    if (record->size != 0)
        return record;
    *position += RING - *position % RING;
    return (struct record *)(void *)way->ring;
}

static uint64_t after(uint64_t position, const struct record *record) {
    return position + (sizeof *record + record->size + 15) / 16 * 16;
}

/* Returns the place for the next frame, or NULL if the ring is full. unused: the bytes at the end
 * of the ring that are too few for a frame and must be skipped. */
static struct record *room(struct direction *way, uint64_t *unused) {
    if (way->head == way->tail) /* empty: reuse memory that is already mapped */
        way->head = way->middle = way->tail = 0;
    const uint64_t needed = sizeof(struct record) + FRAME_MAX, left = RING - way->tail % RING;
    *unused = left < needed ? left : 0;
    if (way->tail - way->head + *unused + needed > RING)
        return NULL;
    return (struct record *)(void *)(way->ring + (way->tail + *unused) % RING);
}

/* Returns when a frame leaves the queue. */
static double transmitted_at(const struct direction *way, const struct record *record) {
    uint64_t begin = record->time > way->free_at ? record->time : way->free_at;
    return (double)begin + record->size * 8 * SECOND / way->rate;
}

/* Moves the frames that have left the queue by now to the flight. */
static void transmit(struct direction *way, uint64_t t) {
    while (way->middle != way->tail) {
        struct record *record = record_at(way, &way->middle);
        double done = transmitted_at(way, record);
        if (done > (double)t)
            break;
        way->free_at = (uint64_t)done;
        record->time = (uint64_t)(done + delay);
        way->waiting -= record->size;
        way->middle = after(way->middle, record);
    }
}

/* Reads frames of this direction from its device. */
static void receive(struct direction *way, uint64_t t) {
    for (int i = 0; i < BURST; i++) {
        static uint8_t scratch[FRAME_MAX];
        uint64_t unused;
        struct record *record = room(way, &unused);
        uint8_t *bytes = record == NULL ? scratch : (uint8_t *)(record + 1);
        ssize_t size = read(way->from, bytes, FRAME_MAX);
        if (size <= 0)
            break;
        if (record == NULL || (double)way->waiting * 8 * SECOND / way->rate > queue_limit) {
            way->counters.dropped++;
            continue;
        }
        if (unused > 0) {
            ((struct record *)(void *)(way->ring + way->tail % RING))->size = 0;
            way->tail += unused;
        }
        record->time = t;
        record->size = (uint32_t)size;
        way->waiting += record->size;
        way->tail = after(way->tail, record);
    }
}

/* Delivers the frames whose flight is over. */
static void deliver(struct direction *way, uint64_t t) {
    while (way->head != way->middle) {
        struct record *record = record_at(way, &way->head);
        if (record->time > t)
            break;
        if (cut || chance() < loss) {
            way->counters.lost++;
        } else if (write(way->to, record + 1, record->size) >= 0) { /* else the device is down */
            way->counters.passed++;
            way->counters.bytes += record->size;
        }
        way->head = after(way->head, record);
    }
}

/* Returns when the next frame is due for delivery, at most a second from now. */
static uint64_t next_delivery(struct direction *way, uint64_t t) {
    double next = (double)t + SECOND;
    if (way->head != way->middle)
        next = (double)record_at(way, &way->head)->time;
    else if (way->middle != way->tail)
        next = transmitted_at(way, record_at(way, &way->middle)) + delay;
    return next < (double)t + SECOND ? (uint64_t)next : t + (uint64_t)SECOND;
}

static uint64_t work(void) {
    uint64_t t = now(), next = t + (uint64_t)SECOND;
    for (int i = 0; i < 2; i++) {
        struct direction *way = &directions[i];
        transmit(way, t);
        receive(way, t);
        transmit(way, t);
        deliver(way, t);
        uint64_t due = next_delivery(way, t);
        next = due < next ? due : next;
    }
    return next;
}

/* ---- commands ------------------------------------------------------------------------------ */

/* Parses a number that is followed by `end`; returns false unless it is within the bounds. */
static bool parse(const char *text, char end, double least, double most, double *value) {
    char *rest;
    if (text == NULL || *text == '\0' || strchr("+-0123456789.", *text) == NULL)
        return false;
    *value = strtod(text, &rest);
    return rest != text && *rest == end && *value >= least && *value <= most;
}

/* Sets a property of the link. Returns an error message, or NULL. */
static const char *set(const char *name, const char *text) {
    double value, up;
    if (strcmp(name, "rate") == 0) {
        const char *slash = text == NULL ? NULL : strchr(text, '/');
        if (!parse(text, slash == NULL ? '\0' : '/', 0.01, 10000, &value))
            return "rate: 0.01 to 10000 Mbit/s, or two such rates, DOWN/UP";
        up = value;
        if (slash != NULL && !parse(slash + 1, '\0', 0.01, 10000, &up))
            return "rate: 0.01 to 10000 Mbit/s, or two such rates, DOWN/UP";
        directions[0].rate = value * 1e6;
        directions[1].rate = up * 1e6;
    } else if (strcmp(name, "rtt") == 0) {
        if (!parse(text, '\0', 0, 60000, &value))
            return "rtt: 0 to 60000 ms";
        delay = value / 2 * 1e6;
    } else if (strcmp(name, "loss") == 0) {
        if (!parse(text, '\0', 0, 100, &value))
            return "loss: 0 to 100 %";
        loss = value / 100;
    } else if (strcmp(name, "queue") == 0) {
        if (!parse(text, '\0', 0, 60000, &value))
            return "queue: 0 to 60000 ms";
        queue_limit = value * 1e6;
    } else if (strcmp(name, "seed") == 0) {
        if (!parse(text, '\0', 0, 1e9, &value))
            return "seed: 0 to 1000000000";
        /* An odd factor spreads the seed over all bits. One bit is set, as 0 would stay 0. */
        random_state = ((uint64_t)value + 1) * 0x9E3779B97F4A7C15u | 1;
    } else {
        return "unknown: rate, rtt, loss, queue and seed can be set";
    }
    return NULL;
}

static void answer(char *line) {
    char *name = strtok(line, " \t\r"), *value = strtok(NULL, " \t\r");
    const char *wrong = NULL;
    if (name == NULL || strtok(NULL, " \t\r") != NULL) {
        wrong = "a command is a name and a value";
    } else if (value == NULL && strcmp(name, "counters") == 0) {
        for (int i = 0; i < 2; i++) {
            const struct counters *c = &directions[i].counters;
            printf("%" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "%c", c->passed,
                   c->bytes, c->lost, c->dropped, directions[i].waiting, i == 0 ? ' ' : '\n');
        }
        return;
    } else if (value == NULL && (strcmp(name, "cut") == 0 || strcmp(name, "join") == 0)) {
        cut = *name == 'c';
    } else {
        wrong = set(name, value);
    }
    puts(wrong == NULL ? "ok" : wrong);
}

/* Reads commands; returns false at the end of the input or if a line is too long. */
static bool take_commands(void) {
    static char buffer[LINE_BYTES];
    static size_t filled;
    ssize_t size = read(STDIN_FILENO, buffer + filled, sizeof buffer - filled);
    if (size < 0)
        return errno == EAGAIN || errno == EINTR;
    if (size == 0)
        return false;
    filled += (size_t)size;
    char *begin = buffer, *end;
    while ((end = memchr(begin, '\n', filled - (size_t)(begin - buffer))) != NULL) {
        *end = '\0';
        answer(begin);
        begin = end + 1;
    }
    fflush(stdout);
    filled -= (size_t)(begin - buffer);
    memmove(buffer, begin, filled);
    return filled < sizeof buffer;
}

/* Enters a namespace and makes a TAP device there. Returns its descriptor, or -1. */
static int make_device(const char *namespace, const char *name) {
    char path[LINE_BYTES];
    snprintf(path, sizeof path, "/run/netns/%s", namespace);
    int place = open(path, O_RDONLY | O_CLOEXEC);
    if (place < 0 || setns(place, CLONE_NEWNET) < 0) {
        fprintf(stderr, "namespace %s: %s\n", namespace, strerror(errno));
        return -1;
    }
    close(place);
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct ifreq request = {.ifr_flags = TAP | NO_PACKET_INFORMATION};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    if (device < 0 || ioctl(device, TUN_SET_INTERFACE, &request) < 0) {
        fprintf(stderr, "device %s: %s\n", name, strerror(errno));
        return -1;
    }
    return device;
}

int main(int count, char **arguments) {
    set("rate", "100");
    set("queue", "100");
    const char *wrong = count < 5 ? "NETNS DEVICE NETNS DEVICE, then names and values" : NULL;
    for (int i = 5; wrong == NULL && i < count; i += 2)
        wrong = set(arguments[i], i + 1 < count ? arguments[i + 1] : NULL);
    if (wrong != NULL) {
        fprintf(stderr, "link_emulator: %s\n", wrong);
        return 2;
    }
    int first = make_device(arguments[1], arguments[2]);
    int second = first < 0 ? -1 : make_device(arguments[3], arguments[4]);
    if (second < 0)
        return 1;
    directions[0] = (struct direction){
        .from = first, .to = second, .rate = directions[0].rate, .ring = rings[0]};
    directions[1] = (struct direction){
        .from = second, .to = first, .rate = directions[1].rate, .ring = rings[1]};
    puts("ready");
    fflush(stdout);
    struct pollfd watched[3] = {{.fd = first, .events = POLLIN},
                                {.fd = second, .events = POLLIN},
                                {.fd = STDIN_FILENO, .events = POLLIN}};
    for (;;) {
        uint64_t next = work(), t = now(), wait = next > t ? next - t : 0;
        struct timespec timeout = {(time_t)(wait / 1000000000u), (long)(wait % 1000000000u)};
        if (ppoll(watched, 3, &timeout, NULL) < 0 && errno != EINTR)
            return 1;
        if (watched[2].revents != 0 && !take_commands())
            return 0;
        /* A device that was removed with its namespace is always ready. */
        if ((watched[0].revents | watched[1].revents) & (POLLERR | POLLNVAL))
            return 1;
    }
}
