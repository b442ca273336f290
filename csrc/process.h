/* What Python cannot do about its own process: end on a signal while it waits in C, and change what
 * others see of its arguments. Python sees this file as it is. Sources: signal-safety(7),
 * getauxval(3). */
#ifndef TTUN_PROCESS_H
#define TTUN_PROCESS_H

#include <stddef.h>

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
