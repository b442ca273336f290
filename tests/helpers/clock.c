/* Clocks that a test can move, for the programs that load this library (LD_PRELOAD).
 *
 * The file that TTUN_TEST_CLOCK names holds two numbers of seconds, of 8 bytes each. What this
 * process takes for the time is ahead by the first one, as when a machine's clock is set. The
 * second one is how long it takes the machine to have been suspended. The monotonic clock, by which
 * one waits, goes on as it is. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *ahead;

__attribute__((constructor)) static void find_clock(void) {
    const char *name = getenv("TTUN_TEST_CLOCK");
    int file = name == NULL ? -1 : open(name, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return;
    void *mapped = mmap(NULL, 2 * sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED)
        ahead = mapped;
}

int clock_gettime(clockid_t clock, struct timespec *t) {
    int result = (int)syscall(SYS_clock_gettime, clock, t);
    if (result == 0 && clock == CLOCK_REALTIME && ahead != NULL)
        t->tv_sec += ahead[0];
    else if (result == 0 && clock == CLOCK_BOOTTIME && ahead != NULL)
        t->tv_sec += ahead[1];
    return result;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    (void)zone;
    int result = clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return result;
}

time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t != NULL)
        *t = now.tv_sec;
    return now.tv_sec;
}
