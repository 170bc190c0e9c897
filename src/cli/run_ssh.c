/* SPDX-License-Identifier: MIT */
/*
 * strata run --ssh: a session in the guest on this terminal, and the guest ends with it.
 *
 *     waiting --sshd greets--> session --ssh ends--> the guest ends --> (run_guest.c goes on)
 *        `------------------------'-- the guest ends first: the session is ended
 *
 * A task of its own beside the one that waits for the guest.  After every suspension it looks at
 * r->ended; run_ssh_end_co() sets nothing else in motion than to wake it from what it waits for.
 *
 * How the guest ends.  Where all it wrote is thrown away, at once, as the power does it.  Where
 * something stays, its power button is pressed, as somebody would who wants a clean file system;
 * when it has not ended within a minute, it is ended, and that is no good end: nothing is
 * committed.
 */
#include <errno.h>
#include "base/bytes.h"
#include "cli/run.h"
#include "runtime/loop.h"
#include "vm/ssh.h"

#define RETRY_NS 200000000LL
#define POWERDOWN_NS 60000000000LL

static bool over(const struct run *r) {
    return r->ended || r->signo;
}

static bool wait_for_sshd_co(struct run *r) {
    if (!over(r) && !r->a->quiet)
        cli_print_note(r->ctx,
                       "waiting for the guest's sshd, at port %u of this machine; Ctrl-C "
                       "ends the guest",
                       r->ssh_port);
    while (!over(r)) {
        if (vm_ssh_greets_co(r->ssh_port, &r->ssh_fd))
            return !over(r);
        if (!over(r))
            loop_sleep_co(RETRY_NS);
    }
    return false;
}

static void session_co(struct run *r) {
    struct err e AUTO_ERR = ERR_INIT;
    char **args = vm_ssh_args(r->ssh_port, r->a->ssh_user);
    int ret = vm_start_beside(r->ctx->loop, args, &r->ssh, &e);
    vm_args_free(args);
    if (ret < 0) {
        cli_print_error(r->ctx, &e);
        r->ssh_status = 127;
        return;
    }
    ret = vm_wait_co(r->ssh);
    vm_free(r->ssh);
    r->ssh = NULL;
    if (!over(r))
        r->ssh_status = ret < 0 ? 1 : ret;
}

static bool something_stays(const struct run *r) {
    return run_count(r, RUN_WRITE) || r->a->keep.n || r->a->keep_overlay || r->a->commit;
}

static void end_guest_co(struct run *r) {
    if (something_stays(r)) {
        if (!r->a->quiet)
            cli_print_note(r->ctx, "asking the guest to switch itself off");
        vm_powerdown(r->power_fd);
        loop_sleep_co(POWERDOWN_NS);
        if (over(r))
            return;
        cli_print_warning(r->ctx, "the guest did not switch itself off within a minute");
        r->forced = true;
    }
    r->dismissed = true;
    vm_stop(r->vm);
}

static void ssh_task_co(void *arg) {
    struct run *r = arg;
    r->ssh_task = task_self();
    if (wait_for_sshd_co(r))
        session_co(r);
    if (!over(r))
        end_guest_co(r);
    r->ssh_task = NULL;
}

void run_ssh_begin(struct run *r) {
    task_group_init(&r->ssh_group);
    if (r->a->ssh)
        task_group_spawn(&r->ssh_group, r->ctx->loop, ssh_task_co, r);
}

void run_ssh_end_co(struct run *r) {
    if (r->ssh)
        vm_stop(r->ssh);
    if (r->ssh_fd >= 0)
        loop_cancel_fd(r->ctx->loop, r->ssh_fd);
    if (r->ssh_task)
        loop_cancel_sleep(r->ssh_task);
    task_group_wait_co(&r->ssh_group);
}
