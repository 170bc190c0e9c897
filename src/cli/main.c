/* SPDX-License-Identifier: MIT */
/*
 * strata: finds the verb, parses its options, runs it as a task on a loop, and turns what comes
 * back into one line on standard error and an exit status.
 *
 * The loop is made after the verb's prepare hook, so that forking happens while the process is
 * still one bare thread.
 */
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>
#include "base/log.h"
#include "base/strbuf.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "base/version.h"
#include "runtime/loop.h"

/*
 * A descriptor 0, 1 or 2 that is closed would be given to the first image that is opened, and what
 * we print would be written into it.  The stand-ins refuse to be written to (or read from), so that
 * a closed standard output still ends in an error.
 */
static void hold_standard_descriptors(void) {
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0 && errno == EBADF &&
            open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY) != fd)
            _exit(1);
}

/*
 * glibc gives each thread a heap of its own, and reserves 64 MiB of addresses for each: with the
 * offload pool's threads that alone breaks a limit on address space (ulimit -v) of 1 GiB.  Four
 * serve as well: workers allocate little, and not while they compute.
 */
static void bound_heaps(void) {
    mallopt(M_ARENA_MAX, 4);
}

/* A disk may lie in thousands of files; shells set the soft limit for programs that use select. */
static void raise_file_limit(void) {
    struct rlimit l;
    if (getrlimit(RLIMIT_NOFILE, &l) == 0 && l.rlim_cur < l.rlim_max) {
        l.rlim_cur = l.rlim_max < 65536 ? l.rlim_max : 65536;
        setrlimit(RLIMIT_NOFILE, &l);
    }
}

static void log_to_stderr(void *arg, enum log_level level, const char *text) {
    if (level <= LOG_LV_WARN) {
        cli_print_warning(arg, "%s", text);
        return;
    }
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    const struct verb_ctx *ctx = arg;
    strbuf_printf(&b, "strata: %s: ", ctx->verb->name);
    strbuf_put_safe(&b, text, strlen(text));
    strbuf_puts(&b, "\n");
    fwrite(b.s, 1, b.len, stderr);
}

static enum log_level wanted_log_level(void) {
    static const char *const names[] = {"error", "warn", "info", "debug"};
    const char *s = getenv("STRATA_LOG");
    for (int i = 0; s && i < 4; i++)
        if (!strcmp(s, names[i]))
            return i;
    return LOG_LV_WARN;
}

void cli_log_level(struct verb_ctx *ctx, int level) {
    enum log_level asked = wanted_log_level();
    log_set_sink(log_to_stderr, ctx, (int)asked > level ? asked : (enum log_level)level);
}

struct run {
    struct verb_ctx *ctx;
    int rc;
};

static void run_verb_task(void *arg) {
    struct run *r = arg;
    r->rc = r->ctx->verb->run_co(r->ctx);
}

static int run_on_loop(struct verb_ctx *ctx) {
    int rc = loop_new(LOOP_AUTO, &ctx->loop, &ctx->err);
    if (rc < 0)
        return rc;
    struct run r = {ctx, 0};
    loop_run(ctx->loop, run_verb_task, &r);
    loop_free(ctx->loop);
    ctx->loop = NULL;
    return r.rc;
}

/* Prepare and run; the exit status, or -errno with ctx->err set. */
static int run_verb(struct verb_ctx *ctx) {
    if (ctx->verb->prepare) {
        int rc = ctx->verb->prepare(ctx);
        if (rc >= CLI_DONE)
            return rc - CLI_DONE;
        if (rc < 0)
            return rc;
    }
    return ctx->verb->run ? ctx->verb->run(ctx) : run_on_loop(ctx);
}

static int report(struct verb_ctx *ctx, int rc) {
    if (!ctx->err.code)
        err_errno(&ctx->err, -rc, "failed");
    cli_print_error(ctx, &ctx->err);
    return ctx->verb && ctx->verb->error_status ? ctx->verb->error_status : 1;
}

/* Whatever was printed has reached its file, or the status says that it has not. */
static int finish_output(const struct verb_ctx *ctx, int status) {
    struct err e AUTO_ERR = ERR_INIT;
    errno = 0;
    bool failed = ferror(stdout);
    if (fflush(stdout) == EOF)
        failed = true;
    if (!failed)
        return status;
    err_errno(&e, errno ? errno : EIO, "writing to standard output");
    cli_print_error(ctx, &e);
    return status ? status : ctx->verb && ctx->verb->error_status ? ctx->verb->error_status : 1;
}

int cli_verb_main(const struct verb *v, int argc, char **argv) {
    struct verb_ctx ctx = {.verb = v};
    cli_log_level(&ctx, LOG_LV_WARN);
    bool help = false;
    int rc = cli_parse(&ctx, argc, argv, &help);
    int status;
    if (rc < 0) {
        if (!dialect_is_qemu())
            err_hint(&ctx.err, "see 'strata %s --help'", v->name);
        status = report(&ctx, rc);
        if (dialect_is_qemu())
            status = dialect_misuse_status(); /* whatever the verb's own statuses say */
    } else if (help) {
        cli_help_verb(v, stdout);
        status = 0;
    } else {
        rc = run_verb(&ctx);
        status = rc < 0 ? report(&ctx, rc) : rc;
    }
    status = finish_output(&ctx, status);
    cli_parse_free(&ctx);
    return status;
}

static int unknown_verb(const char *word) {
    struct verb_ctx ctx = {0};
    struct str_nearest near = {0};
    for (int i = 0; verb_table[i]; i++)
        str_nearest_offer(&near, word, verb_table[i]->name);
    bool option = *word == '-';
    err_set(&ctx.err, EINVAL, "unknown %s '%s'", option ? "option" : "command", word);
    if (near.best && !option)
        err_hint(&ctx.err, "did you mean '%s'?", near.best);
    err_hint(&ctx.err, "see 'strata --help'");
    int status = report(&ctx, -EINVAL);
    err_clear(&ctx.err);
    return status;
}

int main(int argc, char **argv) {
    hold_standard_descriptors();
    bound_heaps();
    raise_file_limit();
    signal(SIGPIPE, SIG_IGN);
    int status = dialect_main(argc, argv);
    if (status >= 0)
        return status;
    if (argc < 2) {
        cli_help_overview(stderr);
        return 1;
    }
    const char *word = argv[1];
    struct verb_ctx none = {0};
    if (!strcmp(word, "--help") || !strcmp(word, "-h")) {
        cli_help_overview(stdout);
        return finish_output(&none, 0);
    }
    if (!strcmp(word, "--version") || !strcmp(word, "-V")) {
        puts("strata " STRATA_VERSION);
        return finish_output(&none, 0);
    }
    const struct verb *v = verb_find(word);
    return v ? cli_verb_main(v, argc - 2, argv + 2) : unknown_verb(word);
}
