/* SPDX-License-Identifier: MIT */
/*
 * Progress on standard error: see progress.h for the forms.
 *
 * Time is asked for with clock_gettime (no system call) at each update, and at most ten lines a
 * second are written, so callers may report each chunk.  Totals may grow while work goes on (a copy
 * learns how much data there is), so a percentage may fall; it never exceeds 100.
 */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>
#include "base/size.h"
#include "cli/progress.h"
#include "cli/dialect.h"

const char *const progress_names[] = {"off", "bar", "json", NULL};

enum { PERIOD_NS = 100000000 };

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static double percent(const struct progress *p) {
    if (!p->total)
        return 0;
    return p->done >= p->total ? 100 : 100.0 * p->done / p->total;
}

static int terminal_width(void) {
    struct winsize w;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &w) < 0 || w.ws_col < 20)
        return 80;
    return w.ws_col;
}

/* " 42.0% [########--------------]  1.2 GiB/s  0:12" within the terminal's width */
static void draw_bar(struct progress *p, int64_t now) {
    char line[256], bar[64], tail[64] = "", human[32];
    double pc = percent(p), secs = (now - p->start_ns) / 1e9;
    if (secs >= 1 && p->done) {
        double rate = p->done / secs, left = p->total > p->done ? (p->total - p->done) / rate : 0;
        unsigned long s = left < 359999 ? (unsigned long)(left + 0.5) : 359999;
        snprintf(tail, sizeof(tail), "  %s/s  %lu:%02lu:%02lu left",
                 size_human((uint64_t)rate, human), s / 3600, s / 60 % 60, s % 60);
    }
    int room = terminal_width() - 1 - 9 - (int)strlen(tail) - 2;
    if (room > 50)
        room = 50;
    bar[0] = '\0';
    if (room >= 8) {
        int full = (int)(pc * room / 100);
        memset(bar, '#', full);
        memset(bar + full, '-', room - full);
        bar[room] = '\0';
    }
    snprintf(line, sizeof(line), "\r %5.1f%% [%s]%s\033[K", pc, bar, tail);
    fputs(line, stderr);
    fflush(stderr);
    p->drawn = true;
}

static void write_json(const struct progress *p) {
    fprintf(stderr,
            "{\"progress\": {\"done\": %" PRIu64 ", \"total\": %" PRIu64 ", \"percent\": %.2f}}\n",
            p->done, p->total, percent(p));
}

static void write_tenth(struct progress *p) {
    unsigned tenths = (unsigned)(percent(p) / 10);
    if (tenths > p->tenths) {
        p->tenths = tenths;
        fprintf(stderr, "%u%%\n", tenths * 10);
    }
}

/* That program's form, on standard output. */
static void write_qemu(const struct progress *p) {
    printf("    (%3.2f/100%%)\r", percent(p));
    fflush(stdout);
}

/* ---- on demand ---- */

static volatile sig_atomic_t demanded;

static void on_demand(int signo) {
    demanded = 1;
}

static void catch_demands(bool on) {
    struct sigaction sa = {.sa_handler = on ? on_demand : SIG_DFL, .sa_flags = SA_RESTART};
    sigemptyset(&sa.sa_mask);
    demanded = 0;
    sigaction(SIGUSR1, &sa, NULL);
}

static void write_demanded(const struct progress *p) {
    demanded = 0;
    if (dialect_is_qemu()) {
        write_qemu(p);
        return;
    }
    fprintf(stderr, "(%.2f/100%%)\n", percent(p));
}

static void show(struct progress *p, int64_t now) {
    p->last_ns = now;
    if (dialect_is_qemu()) {
        write_qemu(p);
        return;
    }
    if (p->mode == PROGRESS_JSON)
        write_json(p);
    else if (p->terminal)
        draw_bar(p, now);
    else
        write_tenth(p);
}

void progress_begin(struct progress *p, const struct progress_args *args) {
    *p = (struct progress){.mode = args->mode};
    if (p->mode == PROGRESS_OFF && args->bar)
        p->mode = PROGRESS_BAR;
    if (p->mode == PROGRESS_OFF)
        p->mode = PROGRESS_DEMAND;
    catch_demands(true);
    p->terminal = isatty(STDERR_FILENO);
    p->start_ns = now_ns();
    p->last_ns = p->start_ns - PERIOD_NS;
}

void progress_update(struct progress *p, uint64_t done, uint64_t total) {
    if (p->mode == PROGRESS_OFF)
        return;
    p->done = done;
    p->total = total;
    if (demanded)
        write_demanded(p);
    if (p->mode == PROGRESS_DEMAND)
        return;
    int64_t now = now_ns();
    if (dialect_is_qemu()) { /* there, each whole percent */
        if (!p->drawn_once || percent(p) >= p->tenths + 1 ||
            (percent(p) >= 100 && p->tenths < 100)) {
            p->drawn_once = true;
            p->tenths = (unsigned)percent(p);
            show(p, now);
        }
        return;
    }
    if (now - p->last_ns >= PERIOD_NS)
        show(p, now);
}

void progress_end(struct progress *p, bool success) {
    if (p->mode == PROGRESS_OFF)
        return;
    catch_demands(false);
    if (p->mode == PROGRESS_DEMAND) {
        p->mode = PROGRESS_OFF;
        return;
    }
    if (success) {
        /* Work that had nothing to move is done, too. */
        p->total = p->total ? p->total : 1;
        p->done = p->total;
    }
    if (success || p->mode == PROGRESS_JSON)
        show(p, now_ns());
    if (dialect_is_qemu() && success)
        putchar('\n');
    if (p->drawn) {
        fputs(success ? "\n" : "\r\033[K", stderr);
        fflush(stderr);
    }
    p->mode = PROGRESS_OFF;
}
