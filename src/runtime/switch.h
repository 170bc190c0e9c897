/* SPDX-License-Identifier: MIT */
/*
 * Switching stacks.
 *
 * A struct rt_ctx is a suspended flow of control: the stack pointer below which its callee-saved
 * registers lie.  x86-64 and aarch64 have a dozen instructions of their own (switch.S); everything
 * else uses ucontext, which costs two system calls a switch for the signal mask.
 *
 * Saved: the registers that the ABI calls callee-saved.  Not saved: MXCSR, the x87 control word and
 * FPCR.  All tasks of a loop share one thread and nothing in strata changes rounding or exception
 * masks; code that ever does must restore them before it suspends.  Saving them would cost about a
 * third of the whole switch.
 *
 * The assembler file carries no CET property note on purpose: the linker then leaves shadow stacks
 * off for the program, which stack switching needs.
 *
 * AddressSanitizer is told of each switch (fake, lo and bytes exist for that).
 */
#ifndef STRATA_RUNTIME_SWITCH_H
#define STRATA_RUNTIME_SWITCH_H

#include <stdbool.h>
#include <stddef.h>

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(STRATA_UCONTEXT)
#define STRATA_UCONTEXT 1
#endif
#if defined(__x86_64__) && defined(__ILP32__) && !defined(STRATA_UCONTEXT)
#define STRATA_UCONTEXT 1
#endif
#ifdef STRATA_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define RT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define RT_ASAN 1
#endif
#endif
#ifndef RT_ASAN
#define RT_ASAN 0
#endif

struct rt_ctx {
    void *sp;
    const void *lo; /* the stack; NULL for a thread's own until the first switch away from it */
    size_t bytes;
    void *fake; /* AddressSanitizer's shadow frames while suspended */
#ifdef STRATA_UCONTEXT
    ucontext_t uc;
#endif
};

/* Prepares `c` so that the first switch to it calls entry(arg) on [lo, top).  entry never returns
 * and begins with rt_ctx_entered(). */
void rt_ctx_make(struct rt_ctx *c, void *lo, void *top, void (*entry)(void *), void *arg);

/* Suspends the running flow into `from` and resumes `to`.  `last`: `from` never runs again. */
void rt_ctx_switch(struct rt_ctx *from, struct rt_ctx *to, bool last);

/* First thing on a new stack; `from` is the context that switched to it. */
void rt_ctx_entered(struct rt_ctx *from);

#endif
