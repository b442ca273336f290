/* What this process may do, what others may do to it and see of it, and how a signal ends it while
 * it starts. Python sees this file as it is. Sources: prctl(2), capabilities(7), signal-safety(7),
 * getauxval(3). */
#ifndef TTUN_PROCESS_H
#define TTUN_PROCESS_H

#include <stddef.h>

/* Has this process killed when the thread that forked it is gone. 0, or -1 with errno set. */
int ttun_end_with_parent(void);

/* Forbids core dumps and ptrace of this process by others, so that keys stay in it. 0, or -1. */
int ttun_forbid_dumps(void);

/* Takes every capability out of this thread's bounding set, as far as it may: nothing that it
 * executes can have one. It may while it has CAP_SETPCAP, so this comes before the others go. */
void ttun_drop_bounding_set(void);

/* Gives up all capabilities of this thread and sets no_new_privs. Threads that it makes afterwards
 * have none either. 0, or -1 with errno set. */
int ttun_drop_capabilities(void);

/* From now on this signal ends the process at once: one line on stderr, exit code 0. Python runs
 * its handlers only between its own instructions, so none runs while getaddrinfo() waits for a name
 * server. Python's next signal.signal() for this number replaces it. 0, or -1 with errno set. */
int ttun_end_on_signal(int number);

/* Replaces the program's last arguments, each with its zero byte, by as many other bytes: in the
 * memory that /proc/PID/cmdline is read from. At the end of the first stack stand the arguments,
 * the environment and the program's name, and getauxval tells where that is, without /proc. For the
 * main thread. 0, or -1 where they do not stand there. */
int ttun_replace_arguments(const char *before, const char *after, size_t size);

#endif
