/* SPDX-License-Identifier: MIT */
/* What a long-running verb owes its caller: going to the background, a pid file, readiness. */
#ifndef STRATA_CLI_DAEMON_H
#define STRATA_CLI_DAEMON_H

struct err;

/*
 * Forks (call it from a `prepare` hook: before a loop, threads or an io_uring exist).  In the child
 * returns 0 and sets *status_fd for daemon_ready().  In the parent waits until the child is ready
 * or has ended, and returns CLI_DONE plus the exit status: 0 when ready, else the child's own (the
 * child has printed why).  -errno when forking itself failed.
 */
int daemon_fork(int *status_fd, struct err *e);
/*
 * Tells the parent that all is well, and lets go of the terminal: standard input, output and error
 * become /dev/null.  Closes *status_fd and sets it to -1; no-op for -1.
 */
void daemon_ready(int *status_fd);

/* Writes the process id and a newline to `path`. */
int pid_file_write(const char *path, struct err *e);

/* Tells systemd (NOTIFY_SOCKET) that the service is up; silent when there is none. */
void service_notify_ready(void);

#endif
