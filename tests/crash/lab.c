/* SPDX-License-Identifier: MIT */
/*
 * The crash laboratory: what could a power cut have left behind?
 *
 * A workload of concurrent guest requests runs on a format over recorded disks.  Then states are
 * built and judged.
 *
 *     recorder.c   the disks and the log, a storage driver "lab:0" ...
 *     model.c      what the guest's disk may read as after a cut at any moment
 *     guest.c      the requests and operations before the cut
 *     replay.c     the fault model: which states a cut could have left
 *     judge.c      when a state passes
 *     write.c, chain.c ...   the workloads; lab.h says how to add one
 *
 *     lab [-n STATES] [-s SEED] [-j JOBS] [-p PLANT] [WORKLOAD ...]   exit 1 when a state failed
 *
 * STATES are those of the windows of one workload; the prefixes come on top.  -x stops at the first
 * failed state.  -p breaks a rule on purpose (base/plant.h; lab-planted only), -l lists those; the
 * workloads that name the rule run first, and with -o alone.  -d writes every -e-th state to a
 * folder, for a checker that is not ours; -w keeps the first failed one.
 */
#include "lab.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "base/ck.h"
#include "base/plant.h"
#include "runtime/loop.h"
#include "workloads.h"

static const struct workload *const sets[] = {
    write_workloads,    chain_workloads, amend_workloads, repair_workloads, bitmap_workloads,
    snapshot_workloads, apart_workloads, mixed_workloads, format_workloads,
};

unsigned lab_rnd(struct lab *l, unsigned n) {
    l->seed = l->seed * 1664525u + 1013904223u;
    return (unsigned)(((uint64_t)l->seed * n) >> 32);
}

void lab_must(int r, const struct err *e, const char *what) {
    if (r >= 0)
        return;
    fflush(stdout);
    fprintf(stderr, "lab: %s: %s\n", what, e && e->code ? err_text(e) : strerror(-r));
    abort();
}

/* ---------------------------------------------------------------- one workload */

static void create_co(unsigned i, const char *format, const char *text, uint64_t size) {
    struct err e AUTO_ERR = ERR_INIT;
    char name[8];
    json_t *options = json_object();
    struct node *file;
    snprintf(name, sizeof(name), "lab:%u", i);
    struct create_ctx ctx = {.name = name};
    if (text)
        lab_must(opt_parse_keyval(text, NULL, &options, &e), &e, "options");
    json_object_set_new(options, "size", json_integer((json_int_t)size));
    lab_must(storage_create_co(&ctx, &file, &e), &e, name);
    lab_must(format_create_co(file, driver_find(format), options, &e), &e, name);
    lab_must(disk_flush_co(file), NULL, "flushing a new image");
    node_unref_co(file);
    json_decref(options);
}

static void below_co(struct lab *l) {
    for (unsigned i = 0; i < LAB_DISKS - 1 && l->w->below[i].format; i++) {
        const struct lab_below *b = &l->w->below[i];
        struct err e AUTO_ERR = ERR_INIT;
        struct node *n;
        create_co(i + 1, b->format, b->options, b->size);
        if (!b->filled)
            continue;
        lab_must(lab_open_co(i + 1, b->format, NULL, OPEN_RW | OPEN_NO_BACKING, &n, &e), &e,
                 "opening what lies below");
        lab_fill_co(l, n);
        node_unref_co(n);
    }
}

static void top_co(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    const char *format = l->w->format ? l->w->format : "qcow2";
    json_t *extra = NULL;
    if (l->w->open_co) {
        l->w->open_co(l);
        return;
    }
    create_co(0, format, l->w->options, l->w->size);
    if (l->w->open_options)
        lab_must(opt_parse_keyval(l->w->open_options, NULL, &extra, &e), &e, "open options");
    lab_must(lab_open_co(0, format, extra, OPEN_RW, &l->disk, &e), &e, "opening");
}

/* What the disk reads as is where the model starts. */
static void start_co(struct lab *l) {
    struct lab_state st = {.l = l};
    uint32_t *ids = malloc(BLOCKS * sizeof(*ids));
    uint64_t blocks = 0;
    lab_must(disk_flush_co(l->disk), NULL, "flush");
    if (state_read_ids_co(&st, l->disk, "the start", ids, &blocks) < 0)
        lab_must(-1, NULL, st.why);
    for (uint64_t b = 0; b < blocks; b++)
        if (ids[b])
            model_start(l, b, ids[b]);
    model_start_size(l, l->disk->size);
    free(ids);
    for (unsigned i = 0; i < LAB_DISKS; i++) {
        l->begin[i] = machine->disk[i];
        if (!machine->disk[i].bytes)
            continue;
        l->begin[i].bytes = malloc(RECORDER_BYTES_MAX);
        memcpy(l->begin[i].bytes, machine->disk[i].bytes, RECORDER_BYTES_MAX);
    }
    machine->seed = l->seed;
    machine->recording = true;
}

static void workload_co(void *arg) {
    struct lab *l = arg;
    below_co(l);
    top_co(l);
    if (l->w->setup_co)
        l->w->setup_co(l);
    start_co(l);
    guests_co(l);
    if (l->w->finish_co)
        l->w->finish_co(l);
    node_unref_co(l->disk);
    l->disk = NULL;
    machine->recording = false;
    machine_settle();
    model_settle(l);
    replay_co(l);
}

struct totals {
    unsigned long states, failed, next;
};

struct settings {
    unsigned long states, sample_every;
    unsigned seed, jobs;
    bool first_only; /* the first failed state ends it */
    bool only_named; /* no workload but those that name the plant */
    const char *plant, *save, *sample_dir;
    char **wanted; /* NULL-terminated names; none: all */
    struct totals *sum;
};

static void run(const struct workload *w, const struct settings *set) {
    struct lab *l = calloc(1, sizeof(*l));
    struct machine m = {0};
    struct workload own = *w;
    struct loop *loop;
    l->w = &own;
    l->seed = set->seed;
    l->budget = set->states;
    l->save = set->save;
    l->sample_dir = set->sample_dir;
    l->sample_every = set->sample_every;
    l->first_only = set->first_only;
    machine = &m;
    task_rwlock_init(&l->quiet);
    if (w->vary)
        w->vary(l, &own);
    lab_must(loop_new(LOOP_THREADS, &loop, NULL), NULL, "loop");
    loop_run(loop, workload_co, l);
    loop_free(loop);
    printf("%-16s seed %-10u %6lu states, %lu failed%s%s\n", w->name, set->seed, l->states,
           l->failed, w->vary ? "  " : "", w->vary ? own.options : "");
    fflush(stdout);
    __atomic_add_fetch(&set->sum->states, l->states, __ATOMIC_RELAXED);
    __atomic_add_fetch(&set->sum->failed, l->failed, __ATOMIC_RELAXED);
    if (w->free)
        w->free(l);
    model_free(l);
    machine_free(&m);
    for (unsigned i = 0; i < LAB_DISKS; i++)
        free(l->begin[i].bytes);
    free(l->own);
    free(l);
}

/* ---------------------------------------------------------------- which ones, and by whom */

static bool names(const char *list, const char *word) {
    size_t len = strlen(word);
    for (const char *p = list; p && (p = strstr(p, word)); p += len)
        if ((p == list || p[-1] == ' ') && (!p[len] || p[len] == ' '))
            return true;
    return false;
}

static bool is_wanted(const struct workload *w, char *const *wanted) {
    for (char *const *name = wanted; *name; name++)
        if (!strcmp(*name, w->name))
            return true;
    return !*wanted;
}

/* In the order of work; the caller's to free. */
static const struct workload **choose(const struct settings *set, size_t *count) {
    const struct workload **out = NULL;
    *count = 0;
    for (int pass = set->plant ? 0 : 1; pass < (set->only_named ? 1 : 2); pass++)
        for (size_t s = 0; s < sizeof(sets) / sizeof(*sets); s++)
            for (const struct workload *w = sets[s]; w->name; w++) {
                bool first = set->plant && names(w->plants, set->plant);
                if (first != (pass == 0) || !is_wanted(w, set->wanted))
                    continue;
                out = realloc(out, (*count + 1) * sizeof(*out));
                out[(*count)++] = w;
            }
    return out;
}

static void work(const struct settings *set, const struct workload *const *w, size_t count) {
    struct totals *sum = set->sum;
    for (;;) {
        unsigned long i = __atomic_fetch_add(&sum->next, 1, __ATOMIC_RELAXED);
        if (i >= count || (set->first_only && __atomic_load_n(&sum->failed, __ATOMIC_RELAXED)))
            return;
        run(w[i], set);
    }
}

/* Each job is a process: a workload uses one processor.  False when one has died. */
static bool work_jobs(const struct settings *set, const struct workload *const *w, size_t count) {
    bool ok = true;
    if (set->jobs <= 1) {
        work(set, w, count);
        return true;
    }
    fflush(stdout);
    for (unsigned i = 0; i < set->jobs; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            work(set, w, count);
            fflush(stdout);
            _exit(0);
        }
        ok &= pid > 0;
    }
    for (int status; wait(&status) > 0;)
        ok &= status == 0;
    return ok;
}

static int list_plants(void) {
    for (size_t i = 0; plant_name(i); i++)
        puts(plant_name(i));
    return 0;
}

static int list_workloads(void) {
    for (size_t s = 0; s < sizeof(sets) / sizeof(*sets); s++)
        for (const struct workload *w = sets[s]; w->name; w++)
            puts(w->name);
    return 0;
}

int main(int argc, char **argv) {
    struct settings set = {.states = 2000, .seed = 1, .sample_every = 100};
    for (int c; (c = getopt(argc, argv, "n:s:p:w:d:e:j:lLxo")) != -1;) {
        if (c == 'n')
            set.states = strtoul(optarg, NULL, 0);
        else if (c == 's')
            set.seed = (unsigned)strtoul(optarg, NULL, 0);
        else if (c == 'j')
            set.jobs = (unsigned)strtoul(optarg, NULL, 0);
        else if (c == 'w')
            set.save = optarg;
        else if (c == 'd')
            set.sample_dir = optarg;
        else if (c == 'e')
            set.sample_every = max_u64(1, strtoul(optarg, NULL, 0));
        else if (c == 'x')
            set.first_only = true;
        else if (c == 'o')
            set.only_named = true;
        else if (c == 'l')
            return list_plants();
        else if (c == 'L')
            return list_workloads();
        else if (c == 'p' && plant_set(optarg))
            set.plant = optarg;
        else {
            fprintf(stderr, "usage: lab [-n STATES] [-s SEED] [-j JOBS] [-w FAILED-STATE] "
                            "[-d SAMPLES-DIR] [-e EVERY] [-p PLANT [-o] | -l | -L] [-x] "
                            "[WORKLOAD ...]\n");
            return 2;
        }
    }
    size_t count;
    set.wanted = argv + optind;
    set.sum =
        mmap(NULL, sizeof(*set.sum), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    const struct workload **chosen = choose(&set, &count);
    if (set.sum == MAP_FAILED || !count) {
        fprintf(stderr, "lab: no such workload\n");
        return 2;
    }
    bool ok = work_jobs(&set, chosen, count);
    printf("%lu workloads, %lu states, %lu failed\n", (unsigned long)count, set.sum->states,
           set.sum->failed);
    free(chosen);
    return !ok || set.sum->failed;
}
