/* SPDX-License-Identifier: MIT */
/* Stack switching: frames of new stacks, the sanitizer's view, and the ucontext fallback. */
#include "runtime/switch.h"

#include <stdint.h>

#if RT_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef STRATA_UCONTEXT

/* makecontext passes ints: a pointer travels in two halves. */
static void uc_start(unsigned fn_hi, unsigned fn_lo, unsigned arg_hi, unsigned arg_lo) {
    uintptr_t fn = (uintptr_t)((uint64_t)fn_hi << 32 | fn_lo);
    uintptr_t arg = (uintptr_t)((uint64_t)arg_hi << 32 | arg_lo);
    ((void (*)(void *))fn)((void *)arg);
}

void rt_ctx_make(struct rt_ctx *c, void *lo, void *top, void (*entry)(void *), void *arg) {
    uint64_t f = (uintptr_t)entry, a = (uintptr_t)arg;
    c->lo = lo;
    c->bytes = (size_t)((char *)top - (char *)lo);
    c->fake = NULL;
    getcontext(&c->uc);
    c->uc.uc_stack.ss_sp = lo;
    c->uc.uc_stack.ss_size = c->bytes;
    c->uc.uc_link = NULL;
    makecontext(&c->uc, (void (*)(void))uc_start, 4, (unsigned)(f >> 32), (unsigned)f,
                (unsigned)(a >> 32), (unsigned)a);
}

static inline void swap(struct rt_ctx *from, struct rt_ctx *to) {
    swapcontext(&from->uc, &to->uc);
}

#else

void rt_swap(void **save_sp, void *to_sp);
void rt_start(void);

void rt_ctx_make(struct rt_ctx *c, void *lo, void *top, void (*entry)(void *), void *arg) {
    uintptr_t *sp = (uintptr_t *)((uintptr_t)top & ~(uintptr_t)15);
    c->lo = lo;
    c->bytes = (size_t)((char *)top - (char *)lo);
    c->fake = NULL;
    sp -= 2; /* where a debugger looks for a caller: none */
    sp[0] = sp[1] = 0;
#ifdef __x86_64__
    sp -= 7; /* r15 r14 r13 r12 rbx rbp, return address; leaves rsp aligned for rt_start's call */
    sp[0] = sp[1] = sp[4] = sp[5] = 0;
    sp[2] = (uintptr_t)arg;
    sp[3] = (uintptr_t)entry;
    sp[6] = (uintptr_t)rt_start;
#else
    sp -= 20; /* x19..x30, d8..d15 */
    for (int i = 0; i < 20; i++)
        sp[i] = 0;
    sp[0] = (uintptr_t)entry;
    sp[1] = (uintptr_t)arg;
    sp[11] = (uintptr_t)rt_start;
#endif
    c->sp = sp;
}

static inline void swap(struct rt_ctx *from, struct rt_ctx *to) {
    rt_swap(&from->sp, to->sp);
}

#endif

void rt_ctx_switch(struct rt_ctx *from, struct rt_ctx *to, bool last) {
#if RT_ASAN
    __sanitizer_start_switch_fiber(last ? NULL : &from->fake, to->lo, to->bytes);
    swap(from, to);
    __sanitizer_finish_switch_fiber(from->fake, NULL, NULL);
#else
    (void)last;
    swap(from, to);
#endif
}

void rt_ctx_entered(struct rt_ctx *from) {
#if RT_ASAN
    /* The one place where the bounds of a thread's own stack can be learnt. */
    const void *lo;
    size_t bytes;
    __sanitizer_finish_switch_fiber(NULL, &lo, &bytes);
    if (!from->lo) {
        from->lo = lo;
        from->bytes = bytes;
    }
#else
    (void)from;
#endif
}
