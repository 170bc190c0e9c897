/* SPDX-License-Identifier: MIT */
/*
 * Where diagnostics go: nowhere, until the program says so.
 *
 * Library code never prints.  What it has to say beside its result (a client broke the protocol, a
 * lock could not be kept) goes through log_msg(); the CLI sets a sink.  A message is one line
 * without the newline, at most about 1 KiB; hostile names in it have gone through strbuf_put_safe.
 */
#ifndef STRATA_BASE_LOG_H
#define STRATA_BASE_LOG_H

enum log_level { LOG_LV_ERROR, LOG_LV_WARN, LOG_LV_INFO, LOG_LV_DEBUG };

/* `text` is valid during the call only.  May be called on any thread, several at once. */
typedef void log_sink(void *arg, enum log_level level, const char *text);

/*
 * Messages up to and including `level` go to sink(arg); NULL: nowhere.  Call it before threads
 * exist (it is not synchronised).
 */
void log_set_sink(log_sink *sink, void *arg, enum log_level level);

/* Any thread.  Costs one comparison when nobody listens. */
void log_msg(enum log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
