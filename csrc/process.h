/* Process functions that Python lacks. cffi parses this file. Sources: signal-safety(7),
 * getauxval(3). */
#ifndef TTUN_PROCESS_H
#define TTUN_PROCESS_H

#include <stddef.h>

/* Makes SIGTERM, SIGINT or SIGHUP end the process at once: one line on stderr, exit code 0. Python
 * runs its handlers only between bytecode instructions, so not while getaddrinfo() waits for a name
 * server. The next signal.signal() for this number replaces it. Returns 0, or -1 with errno set. */
int ttun_end_on_signal(int number);

/* Overwrites the last arguments of the program (each with its zero byte, `size` bytes in all) in
 * the memory behind /proc/PID/cmdline. The initial stack ends with the arguments, the environment
 * and the program name, which getauxval locates without /proc. Call it on the main thread. Returns
 * 0, or -1 if the arguments were not found. */
int ttun_replace_arguments(const char *before, const char *after, size_t size);

#endif
