/* SPDX-License-Identifier: MIT */
/*
 * A fuzz target without a fuzzer: fuzz-replay-NAME [-w N] [-m MUTATIONS] [-t SECONDS]
 * FILE|FOLDER...
 *
 * Runs every file (in the order of their names), then that many mutations of them, with fixed
 * seeds, as far as the time goes.  -w: before those, every word at the beginning of each record of
 * each image in the sparse form (headers, tables) is set to values at the limits of what it could
 * be: 32 and 64 bits, both byte orders; one in N of these inputs is run.  -o FILE: the input that
 * ended in an abort is kept there.
 */
#include "fuzz.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>

#define INPUT_MAX (1u << 20)
#define INPUTS_MAX 4096

#pragma weak LLVMFuzzerCustomMutator

struct input {
    char *name;
    uint8_t *data;
    size_t size;
};
static struct input inputs[INPUTS_MAX];
static unsigned count;
static uint64_t rng;

static uint64_t next(void) {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    return rng ^= rng << 17;
}

/* A plain byte mutator. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max) {
    for (unsigned n = 1 + next() % 4; n; n--) {
        size_t at = size ? next() % size : 0, len = next() % 9;
        switch (next() % 5) {
        case 0:
            if (size)
                data[at] ^= (uint8_t)(1u << next() % 8);
            break;
        case 1:
            if (size)
                data[at] = (uint8_t)next();
            break;
        case 2: /* insert */
            if (size + len <= max) {
                memmove(data + at + len, data + at, size - at);
                for (size_t i = 0; i < len; i++)
                    data[at + i] = (uint8_t)next();
                size += len;
            }
            break;
        case 3: /* remove */
            len = min_u64(len, size - at);
            memmove(data + at, data + at + len, size - at - len);
            size -= len;
            break;
        default: /* copy inside */
            if (size) {
                size_t from = next() % size;
                len = min_u64(len, size - max_u64(from, at));
                memmove(data + at, data + from, len);
            }
        }
    }
    return size;
}

static void load(const char *path) {
    struct stat st;
    if (stat(path, &st) < 0) {
        perror(path);
        exit(1);
    }
    if (S_ISDIR(st.st_mode)) {
        struct dirent **names;
        int n = scandir(path, &names, NULL, alphasort);
        for (int i = 0; i < n; i++) {
            char *sub AUTO_FREE = xasprintf("%s/%s", path, names[i]->d_name);
            if (names[i]->d_name[0] != '.')
                load(sub);
            free(names[i]);
        }
        free(names);
        return;
    }
    if (count == INPUTS_MAX || st.st_size > INPUT_MAX)
        return;
    struct input *in = &inputs[count++];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    in->name = xstrdup(path);
    in->data = xcalloc(1, (size_t)st.st_size + 1);
    in->size = (size_t)st.st_size;
    if (fd < 0 || read(fd, in->data, in->size) != (ssize_t)in->size) {
        perror(path);
        exit(1);
    }
    close(fd);
}

static double seconds(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* Exactly as many bytes as the input has, so that a sanitizer sees the end. */
static void run(const uint8_t *data, size_t size) {
    uint8_t *copy = malloc(size ? size : 1);
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

static const uint8_t *running;
static size_t running_len;
static const char *keep;

static void on_abort(int signo) {
    int fd = keep ? open(keep, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644) : -1;
    if (fd >= 0 && write(fd, running, running_len) < 0)
        _exit(1);
    signal(signo, SIG_DFL);
    raise(signo);
}

static void mutate_and_run(unsigned n, double until) {
    static uint8_t data[INPUT_MAX];
    unsigned done = 0;
    for (unsigned i = 0; i < n && count && seconds() < until; i++, done++) {
        rng = UINT64_C(0x853c49e6748fea9b) ^ (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
        const struct input *in = &inputs[i % count];
        size_t size = in->size;
        memcpy(data, in->data, size);
        for (unsigned k = 1 + next() % 3; k; k--)
            size = LLVMFuzzerCustomMutator
                       ? LLVMFuzzerCustomMutator(data, size, sizeof(data), (unsigned)next())
                       : LLVMFuzzerMutate(data, size, sizeof(data));
        running = data;
        running_len = size;
        run(data, size);
    }
    printf("%u inputs, %u mutations\n", count, done);
}

/* ---- every word of headers and tables at its limits ---- */

#define SWEEP_WORDS 128 /* of a record: a sector */
#define SWEEP_RECORDS 6

static const uint64_t limits[] = {
    0,          1,          2,          3,          511,       4096,
    0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff, INT64_MAX, UINT64_MAX - 511,
};

static void put_word(uint8_t *p, unsigned how, uint64_t value) {
    if (how == 0)
        le32_store(p, (uint32_t)value);
    else if (how == 1)
        be32_store(p, (uint32_t)value);
    else if (how == 2)
        le64_store(p, value);
    else
        be64_store(p, value);
}

static unsigned sweep_step, sweep_turn;

static unsigned sweep_word(uint8_t *data, size_t size, uint8_t *p, size_t left) {
    uint8_t was[8] = {0};
    size_t keep = min_u64(left, 8);
    unsigned done = 0;
    memcpy(was, p, keep);
    for (unsigned how = 0; how < 4; how++) {
        for (size_t v = 0; v < sizeof(limits) / sizeof(limits[0]); v++) {
            bool wide = limits[v] > UINT32_MAX;
            /* Small numbers in 64 bits are met by the words of 32. */
            if (how >= 2 ? left < 8 || !wide : wide)
                continue;
            if (sweep_turn++ % sweep_step)
                continue;
            put_word(p, how, limits[v]);
            running = data;
            running_len = size;
            run(data, size);
            memcpy(p, was, keep);
            done++;
        }
    }
    return done;
}

static unsigned sweep_image(uint8_t *data, size_t size) {
    unsigned done = 0, records = 0;
    if (size < 8 || memcmp(data, SPARSE_MAGIC, 4))
        return 0;
    for (size_t at = 8; size - at > 6 && records < SWEEP_RECORDS; records++) {
        size_t n = min_u64(be16_load(data + at + 4), size - at - 6);
        uint8_t *p = data + at + 6;
        bool plain = n > 8 && !memcmp(p, p + 1, n - 1); /* guest data of one byte */
        for (size_t i = 0; !plain && i + 4 <= n && i < SWEEP_WORDS * 4; i += 4)
            done += sweep_word(data, size, p + i, n - i);
        at += 6 + n;
    }
    return done;
}

/* Seeds come in threes, the same image without and with programs: each third is enough. */
static void sweep(void) {
    unsigned done = 0;
    for (unsigned i = 0; i < count; i++) {
        size_t len = strlen(inputs[i].name);
        uint8_t *copy = malloc(inputs[i].size + 1);
        memcpy(copy, inputs[i].data, inputs[i].size);
        if (len > 2 && !strcmp(inputs[i].name + len - 2, "-1"))
            done += sweep_image(copy, inputs[i].size);
        free(copy);
    }
    printf("%u words at their limits\n", done);
}

int main(int argc, char **argv) {
    unsigned mutations = 0;
    double limit = 5;
    for (int opt; (opt = getopt(argc, argv, "m:t:o:w:")) != -1;) {
        if (opt == 'm')
            mutations = (unsigned)strtoul(optarg, NULL, 10);
        else if (opt == 't')
            limit = strtod(optarg, NULL);
        else if (opt == 'o')
            keep = optarg;
        else if (opt == 'w')
            sweep_step = (unsigned)strtoul(optarg, NULL, 10);
        else
            return 1;
    }
    for (int i = optind; i < argc; i++)
        load(argv[i]);
    signal(SIGABRT, on_abort);
#ifndef __SANITIZE_ADDRESS__ /* which has more to say about it */
    signal(SIGSEGV, on_abort);
#endif
    for (unsigned i = 0; i < count; i++) {
        running = inputs[i].data;
        running_len = inputs[i].size;
        fprintf(stderr, "%s\n", inputs[i].name);
        run(inputs[i].data, inputs[i].size);
    }
    if (sweep_step)
        sweep();
    mutate_and_run(mutations, seconds() + limit);
    for (unsigned i = 0; i < count; i++) {
        free(inputs[i].name);
        free(inputs[i].data);
    }
    return 0;
}
