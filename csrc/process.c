#define _GNU_SOURCE
#include "process.h"

#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

static void end_at_once(int number) {
    const char *line = number == SIGTERM  ? "ttun: stopped by SIGTERM while starting\n"
                       : number == SIGINT ? "ttun: stopped by SIGINT while starting\n"
                                          : "ttun: stopped by SIGHUP while starting\n";
    /* Do not block on a full pipe: one that is writable has room for PIPE_BUF bytes. */
    struct pollfd output = {.fd = STDERR_FILENO, .events = POLLOUT};
    if (poll(&output, 1, 0) == 1 && write(STDERR_FILENO, line, strlen(line)) < 0) {
        /* closed, or disk full */
    }
    _exit(0);
}

int ttun_end_on_signal(int number) {
    struct sigaction action = {.sa_handler = end_at_once};
    sigfillset(&action.sa_mask);
    return sigaction(number, &action, NULL);
}

/* More than the kernel's limit for arguments and environment (fs/exec.c), plus stack frames. */
enum { STACK_ROOM = 8 << 20 };

/* These two access stack memory outside of any C object. */
__attribute__((no_sanitize_address)) static int stands_at(const char *place, const char *bytes,
                                                          size_t size) {
    for (size_t i = 0; i < size; i++)
        if (place[i] != bytes[i])
            return 0;
    return 1;
}

__attribute__((no_sanitize_address)) int ttun_replace_arguments(const char *before,
                                                                const char *after, size_t size) {
    char *end = (char *)getauxval(AT_EXECFN), *here = __builtin_frame_address(0);
    if (end == NULL || here > end || end - here > STACK_ROOM || size >= (size_t)(end - here))
        return -1;
    for (char *at = end - size; at > here; at--)
        if (at[-1] == 0 && stands_at(at, before, size)) {
            for (size_t i = 0; i < size; i++)
                at[i] = after[i];
            return 0;
        }
    return -1;
}
