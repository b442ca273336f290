#define _GNU_SOURCE
#include "process.h"

#include <stdint.h>
#include <string.h>
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
