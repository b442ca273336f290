#define _GNU_SOURCE
#include "process.h"

#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* linux/capability.h, which a C library other than glibc may come without */
enum { CAPABILITY_VERSION_3 = 0x20080522 };

struct capability_header {
    uint32_t version;
    int pid; /* 0: this thread */
};

struct capability_data {
    uint32_t effective, permitted, inheritable;
};

int ttun_end_with_parent(void) {
    return prctl(PR_SET_PDEATHSIG, SIGKILL);
}

int ttun_forbid_dumps(void) {
    return prctl(PR_SET_DUMPABLE, 0);
}

void ttun_drop_bounding_set(void) {
    for (int capability = 0; prctl(PR_CAPBSET_READ, capability) >= 0; capability++)
        prctl(PR_CAPBSET_DROP, capability);
}

int ttun_drop_capabilities(void) {
    struct capability_header header = {.version = CAPABILITY_VERSION_3};
    struct capability_data none[2]; /* bits 0 to 31 and 32 to 63 */
    memset(none, 0, sizeof none);
    /* Ambient capabilities go with the permitted ones. */
    if (syscall(SYS_capset, &header, none) != 0)
        return -1;
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
}

/* Appends a string; returns the new end. Only what is safe in a signal handler. */
static char *append(char *end, const char *text) {
    size_t size = strlen(text);
    memcpy(end, text, size);
    return end + size;
}

static void end_at_once(int number) {
    char line[64];
    const char *name = "a signal";
    if (number == SIGTERM)
        name = "SIGTERM";
    else if (number == SIGINT)
        name = "SIGINT";
    else if (number == SIGHUP)
        name = "SIGHUP";
    char *end = append(line, "ttun: stopped by ");
    end = append(end, name);
    end = append(end, " while starting\n");
    /* Nobody may be reading: a pipe with room for PIPE_BUF bytes takes the line without waiting. */
    struct pollfd output = {.fd = STDERR_FILENO, .events = POLLOUT};
    if (poll(&output, 1, 0) == 1 && write(STDERR_FILENO, line, (size_t)(end - line)) < 0) {
        /* closed, or a full disk */
    }
    _exit(0);
}

int ttun_end_on_signal(int number) {
    struct sigaction action = {.sa_handler = end_at_once};
    sigfillset(&action.sa_mask);
    return sigaction(number, &action, NULL);
}

/* More than the kernel takes of arguments and environment (fs/exec.c), and what stands below. */
enum { STACK_ROOM = 8 << 20 };

/* No variable of C is in the memory that these two look at. */
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
