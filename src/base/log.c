/* SPDX-License-Identifier: MIT */
/*
 * The diagnostics sink.  The text is built in a bounded stack buffer (tasks have small stacks, and
 * logging must work when memory is gone); longer messages are cut.
 */
#include <stdarg.h>
#include <stdio.h>
#include "base/log.h"

static log_sink *sink_fn;
static void *sink_arg;
static enum log_level sink_level;

void log_set_sink(log_sink *sink, void *arg, enum log_level level) {
    sink_fn = sink;
    sink_arg = arg;
    sink_level = level;
}

void log_msg(enum log_level level, const char *fmt, ...) {
    if (!sink_fn || level > sink_level)
        return;
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    sink_fn(sink_arg, level, text);
}
