/* Allocator options that both torch's CUDA build and torch_npu register, so that torch_npu can be imported beside
 * that build.
 *
 * libc10.so keeps the names of the allocator options in one std::unordered_set<std::string>. libc10_cuda.so adds
 * CUDA's names when it is loaded. libtorch_npu.so adds its own in a static initialiser, and a name that is in the set
 * already, such as pinned_reserve_segment_size_mb, is a C++ exception there that ends the process. So before the
 * initialisers of libtorch_npu run, the names that it will add are changed in place: their first letter becomes one
 * that no name has. torch_npu then adds the names itself, and the set holds every name that it held before. Names
 * that torch_npu does not register are not touched.
 *
 * The set has the layout of libstdc++, which torch does not promise, so it is checked before one letter is written:
 * the number of names, the chain, the buckets, every string, the hash of every name, and that the options of torch
 * itself are there. Memory is read and written through a pipe, where a wrong address is an error and no crash. Where
 * a check does not hold, nothing is written and `emulator_refusal` says which torch to install.
 *
 * keys.inc, made from the installed wheel, says what it registers: KEYS_FUNCTION is the function that returns the
 * set, KEY(name) each name, TORCH the version of torch that the wheel needs. Without KEYS_FUNCTION the wheel
 * registers nothing: torch_npu up to 2.12.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_NAMES 512
#define MAX_BUCKETS 65536
#define MAX_LETTERS 255
#define MAX_CAPACITY 65536
#define HASH_SEED 0xc70f6907UL /* of std::hash<std::string> */

/* As libstdc++ lays them out on 64-bit machines since GCC 5; a string's hash is kept in its node. */
typedef struct { uint64_t buckets, bucket_count, first, count; float load; uint64_t next_resize, single_bucket; } set_t;
typedef struct { uint64_t next, text, length; union { char here[16]; uint64_t capacity; }; uint64_t hash; } node_t;
typedef size_t (*hash_t)(const void *text, size_t length, size_t seed); /* std::_Hash_bytes */
typedef struct { uint64_t text[MAX_NAMES]; char names[MAX_NAMES][MAX_LETTERS + 1]; int count; } names_t;

static const char *const torch_names[] = { /* the options of torch itself, in every version that has the set */
    "max_split_size_mb", "garbage_collection_threshold", "roundup_power2_divisions", "expandable_segments", NULL};

/* ------------------------------------------------------------------------------------------------ checked memory */

static int ends[2]; /* of the pipe: read, write */

static int through_pipe(const void *from, void *to, size_t size) {
    if (write(ends[1], from, size) == (ssize_t)size && read(ends[0], to, size) == (ssize_t)size) return 1;
    char rest[4096];
    while (read(ends[0], rest, sizeof rest) > 0) {} /* what was readable of it */
    return 0;
}

static int fetch(uint64_t from, void *to, size_t size) {
    return from && through_pipe((const void *)(uintptr_t)from, to, size);
}
static int store(uint64_t to, char letter) { return through_pipe(&letter, (void *)(uintptr_t)to, 1); }

/* ---------------------------------------------------------------------------------------------------- the checks */

static const char *check_set(uint64_t at, set_t *set) {
    if (at % 8 || !fetch(at, set, sizeof *set)) return "the set of names cannot be read";
    if (set->count < 1 || set->count > MAX_NAMES) return "the set has an impossible number of names";
    if (set->bucket_count < 1 || set->bucket_count > MAX_BUCKETS || set->load != 1.0f || set->count > set->bucket_count)
        return "the set has an impossible number of buckets";
    if (set->bucket_count == 1 ? set->buckets != at + offsetof(set_t, single_bucket) : set->buckets % 8)
        return "the buckets of the set are in an impossible place";
    return NULL;
}

static const char *check_name(uint64_t at, const node_t *node, char *name, hash_t hash) {
    if (!node->length || node->length > MAX_LETTERS) return "a name has an impossible length";
    int fits = node->length < sizeof node->here; /* a short string lies in its node */
    if (node->text != at + offsetof(node_t, here))
        fits = node->capacity >= sizeof node->here && node->capacity >= node->length && node->capacity < MAX_CAPACITY;
    if (!fits) return "a name is no string of the known layout";
    if (!fetch(node->text, name, node->length + 1)) return "the letters of a name cannot be read";
    if (name[node->length] || strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_") != node->length)
        return "a name holds letters that no option has";
    return hash(name, node->length, HASH_SEED) == node->hash ? NULL : "the hash of a name is another one";
}

/* A bucket leads to what comes before its first node, and the nodes of a bucket follow each other. */
static const char *check_bucket(const set_t *set, uint64_t bucket, uint64_t bucket_before, uint64_t before) {
    uint64_t leads_to;
    if (bucket == bucket_before) return NULL;
    if (!fetch(set->buckets + 8 * bucket, &leads_to, 8)) return "the buckets of the set cannot be read";
    return leads_to == before ? NULL : "a bucket of the set does not lead to its names";
}

static const char *check_torch(const names_t *names) {
    for (const char *const *own = torch_names; *own; own++) {
        int found = 0;
        for (int i = 0; i < names->count; i++) found |= !strcmp(names->names[i], *own);
        if (!found) return "the set lacks options of torch itself";
    }
    return NULL;
}

static const char *read_names(uint64_t at, hash_t hash, names_t *names) {
    set_t set;
    node_t node;
    const char *problem = check_set(at, &set);
    uint64_t before = at + offsetof(set_t, first), bucket_before = UINT64_MAX, place = problem ? 0 : set.first;
    for (names->count = 0; !problem && place; place = node.next) {
        if ((uint64_t)names->count == set.count) return "the set holds more names than it counts";
        if (place % 8 || !fetch(place, &node, sizeof node)) return "a name of the set cannot be read";
        problem = check_name(place, &node, names->names[names->count], hash);
        if (!problem) problem = check_bucket(&set, node.hash % set.bucket_count, bucket_before, before);
        names->text[names->count++] = node.text;
        bucket_before = node.hash % set.bucket_count;
        before = place;
    }
    if (!problem && (uint64_t)names->count != set.count) return "the set holds fewer names than it counts";
    return problem ? problem : check_torch(names);
}

/* Change the first letter of each of `keys` that the set holds: to itself, which shows that it can be written, then
 * to \1. */
static const char *change(const names_t *names, const char *const *keys, int *changed) {
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < names->count; i++)
            for (const char *const *key = keys; *key; key++) {
                if (strcmp(names->names[i], *key)) continue;
                if (!store(names->text[i], pass ? '\1' : **key)) return "the letters of a name cannot be written";
                *changed += pass;
            }
    return NULL;
}

/* Take `keys` out of the way in the set at an address. Returns NULL, or which check does not hold: then nothing was
 * changed. `changed` becomes how many of them were there. Exported for tests, which make sets that are wrong. */
EXPORT const char *emulator_set_keys_aside(uint64_t set, const char *const *keys, int *changed) {
    static names_t names;
    void *library = dlopen("libstdc++.so.6", RTLD_LAZY | RTLD_NOLOAD);
    hash_t hash = library ? (hash_t)dlsym(library, "_ZSt11_Hash_bytesPKvmm") : NULL;
    *changed = 0;
    if (!hash) return "libstdc++.so.6, whose layout is the known one, is not loaded";
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK)) return "no pipe can be opened to check the set of names";
    const char *problem = read_names(set, hash, &names);
    if (!problem) problem = change(&names, keys, changed);
    close(ends[0]);
    close(ends[1]);
    return problem;
}

/* -------------------------------------------------------------------------------------------------- in a process */

#define KEY(name) #name,
static const char *const keys[] = {
#include "keys.inc"
    NULL};

static char refusal[1024];

static int is_called(struct dl_phdr_info *library, size_t size, void *name) {
    const char *slash = strrchr(library->dlpi_name, '/');
    return !strcmp(slash ? slash + 1 : library->dlpi_name, name);
}

/* Asked without dlopen, which would run the initialisers of a library whose turn has not come. */
static int loaded(const char *library) { return dl_iterate_phdr(is_called, (void *)library); }

#ifdef KEYS_FUNCTION
static const char *set_aside(void) {
    void *torch = dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);
    uint64_t (*set)(void) = torch ? (uint64_t (*)(void))dlsym(torch, KEYS_FUNCTION) : NULL;
    int changed;
    if (!set) return "libc10.so has no set of their names";
    if (!strstr(KEYS_FUNCTION, "B5cxx11")) return "their names are no strings of libstdc++";
    if (!keys[0]) return "torch_npu's header does not list its own";
    return emulator_set_keys_aside(set(), keys, &changed);
}

static void settle(void) { /* once in a process: later the names in the set are torch_npu's */
    static int settled = 0;
    if (settled || !loaded("libc10.so")) return;
    settled = 1;
    const char *problem = set_aside();
    if (problem && (loaded("libc10_cuda.so") || loaded("libc10_hip.so") || loaded("libc10_xpu.so")))
        snprintf(refusal, sizeof refusal,
                 "torch_npu cannot be imported beside this build of torch: both register the same allocator options, "
                 "and the memory that holds them is not as expected (%s); install the CPU build: "
                 "pip install torch==%s --index-url https://download.pytorch.org/whl/cpu", problem, TORCH);
}
#else
static void settle(void) {}
#endif

/* Why torch_npu cannot be imported beside this torch and what to do, on one line; NULL where it can. */
EXPORT const char *emulator_refusal(void) {
    settle();
    return *refusal ? refusal : NULL;
}

/* A process that an emulated program started loads this library in the midst of `import torch_npu`, before the
 * initialisers of libtorch_npu: they would end the process with a C++ exception, so it ends here, with the reason. */
__attribute__((constructor)) static void before_torch_npu(void) {
    if (!emulator_refusal() || !loaded("libtorch_npu.so")) return;
    fprintf(stderr, "%s\n", refusal);
    _exit(1);
}
