/* Waits of torch_npu that would never end: no thread waits for torch_npu's queue, or for a lock of it, while it holds the GIL.
 *
 * The emulated CANN computes in Python. With torch_npu's queue (TASK_QUEUE_ENABLE 1, its default, and 2) the thread of the
 * queue therefore needs the GIL. torch reads a tensor that stands where it wants a Python number, as in
 * torch.ones(3).repeat(n, 1), while it holds the GIL, and torch_npu waits there until the queue is empty; it waits in the
 * same way where the queue is full, for an event that the queue has yet to record, and for the lock of its allocator, whose
 * owner may itself wait for the queue. On a card the queue needs no GIL, so torch_npu does not let go of it.
 *
 * Here it does: the calls of libtorch_npu.so that can wait lead to the functions below, which release the GIL while the
 * thread waits and take it again afterwards. A lock that is free costs nothing more than before. The slots of the library's
 * own table of imports are changed, and only those: no other library sees a difference.
 *
 * A wait for a queue that nobody reads ends too. After an operator's error the thread of the queue empties it and ends, but
 * a launch that looked at the queue's status just before is still written into it (Repository::Enqueue and ReadQueue in
 * torch_npu's NPUQueue.cpp), and who then waits for the empty queue, at synchronize() or at the end of the process, waits
 * for ever; on a card too.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#define JUMP_SLOT R_X86_64_JUMP_SLOT
#define GLOB_DAT R_X86_64_GLOB_DAT
#else
#define JUMP_SLOT R_AARCH64_JUMP_SLOT
#define GLOB_DAT R_AARCH64_GLOB_DAT
#endif

/* --------------------------------------------------------------------------------------------------------------- the GIL */

static struct {
    int (*initialized)(void), (*held)(void);
    void *(*own_state)(void), *(*release)(void);
    void (*take)(void *);
} python;

static void find_python(void) {
    python.initialized = (int (*)(void))dlsym(RTLD_DEFAULT, "Py_IsInitialized");
    python.held = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Check");
    python.own_state = (void *(*)(void))dlsym(RTLD_DEFAULT, "PyGILState_GetThisThreadState");
    python.release = (void *(*)(void))dlsym(RTLD_DEFAULT, "PyEval_SaveThread");
    python.take = (void (*)(void *))dlsym(RTLD_DEFAULT, "PyEval_RestoreThread");
}

/* What `take_back` needs; NULL where this thread does not hold the GIL. */
static void *let_go(void) {
    if (!python.take || !python.initialized() || !python.held() || !python.own_state()) return NULL;
    return python.release();
}
static void take_back(void *state) {
    int number = errno;
    if (state) python.take(state);
    errno = number;
}

/* ------------------------------------------------------------------------------------------------ queues that nobody reads */

#define QUEUE_THREAD "acl_thread" /* torch_npu's name for it */
#define QUIET_MS 1000             /* without an operator, after which a wait beside a dead queue is taken for one that never ends */
#define MAX_FAILED 64

static int failed_threads[MAX_FAILED], failed_count; /* threads of queues in which an operator failed: they end soon after */
static int computing, computed;                      /* operators that are computed now, and those that were begun so far */

/* runtime.c says when an operator begins and ends, and when one fails. */
__attribute__((visibility("default"))) void emulator_begin_operator(void) {
    __atomic_add_fetch(&computed, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&computing, 1, __ATOMIC_SEQ_CST);
}
__attribute__((visibility("default"))) int emulator_end_operator(int status) {
    __atomic_sub_fetch(&computing, 1, __ATOMIC_SEQ_CST);
    return status;
}
__attribute__((visibility("hidden"))) void emulator_thread_failed(void) {
    char name[16] = "";
    if (prctl(PR_GET_NAME, name) || strcmp(name, QUEUE_THREAD)) return;
    int place = __atomic_fetch_add(&failed_count, 1, __ATOMIC_SEQ_CST);
    if (place < MAX_FAILED) __atomic_store_n(&failed_threads[place], (int)syscall(SYS_gettid), __ATOMIC_SEQ_CST);
}

static int a_queue_is_dead(void) {
    int count = __atomic_load_n(&failed_count, __ATOMIC_SEQ_CST);
    for (int i = 0; i < count && i < MAX_FAILED; i++) {
        int thread = __atomic_load_n(&failed_threads[i], __ATOMIC_SEQ_CST);
        if (thread && syscall(SYS_tgkill, getpid(), thread, 0) && errno == ESRCH) return 1;
    }
    return 0;
}

/* Read an eventfd, as eventfd_read does; -1 with EOWNERDEAD where a queue died and nothing is computed any more. torch_npu
 * takes that for a wait that failed, and goes on. */
__attribute__((visibility("default"))) int emulator_read_eventfd(int descriptor, eventfd_t *value) {
    struct pollfd ready = {.fd = descriptor, .events = POLLIN};
    for (;;) {
        int before = __atomic_load_n(&computed, __ATOMIC_SEQ_CST);
        int answer = poll(&ready, 1, QUIET_MS);
        if (answer < 0) return -1; /* EINTR, as eventfd_read says it */
        if (answer) return eventfd_read(descriptor, value);
        int quiet = !__atomic_load_n(&computing, __ATOMIC_SEQ_CST) && before == __atomic_load_n(&computed, __ATOMIC_SEQ_CST);
        if (quiet && a_queue_is_dead()) {
            errno = EOWNERDEAD;
            return -1;
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------- the waits */

#define WAIT(call)                 \
    void *state = let_go();        \
    int status = (call);           \
    take_back(state);              \
    return status

static int wait_eventfd(int descriptor, eventfd_t *value) { WAIT(emulator_read_eventfd(descriptor, value)); }
static int wait_sleep(const struct timespec *time, struct timespec *rest) { WAIT(nanosleep(time, rest)); }
static int wait_mutex(pthread_mutex_t *mutex) {
    int free = pthread_mutex_trylock(mutex);
    if (free != EBUSY) return free;
    WAIT(pthread_mutex_lock(mutex));
}
static int wait_read(pthread_rwlock_t *lock) {
    int free = pthread_rwlock_tryrdlock(lock);
    if (free != EBUSY) return free;
    WAIT(pthread_rwlock_rdlock(lock));
}
static int wait_write(pthread_rwlock_t *lock) {
    int free = pthread_rwlock_trywrlock(lock);
    if (free != EBUSY) return free;
    WAIT(pthread_rwlock_wrlock(lock));
}
static void (*condition_wait)(void *condition, void *lock); /* std::condition_variable::wait */
static void wait_condition(void *condition, void *lock) {
    void *state = let_go();
    condition_wait(condition, lock);
    take_back(state);
}

#define CONDITION "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE"
static const struct { const char *name; void *function; } waits[] = {
    {"eventfd_read", wait_eventfd},      {"nanosleep", wait_sleep},
    {"pthread_mutex_lock", wait_mutex},  {"pthread_rwlock_rdlock", wait_read},
    {"pthread_rwlock_wrlock", wait_write}, {CONDITION, wait_condition}, {NULL, NULL}};

/* ------------------------------------------------------------------------------------------- the library's table of imports */

typedef struct { const ElfW(Rela) *entries; size_t count; } table_t;
static int led; /* how many imports lead here: 1 for eventfd_read alone tells that the queue's own wait does */

static int lead(ElfW(Addr) slot, void *to, int protected) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *start = (void *)(slot & ~(page - 1));
    if (mprotect(start, page, PROT_READ | PROT_WRITE)) return 0;
    __atomic_store_n((void **)slot, to, __ATOMIC_SEQ_CST);
    if (protected) mprotect(start, page, PROT_READ);
    return 1;
}

static int lead_imports(struct dl_phdr_info *library, size_t size, void *name) {
    const char *slash = strrchr(library->dlpi_name, '/'), *strings = NULL;
    const ElfW(Sym) *symbols = NULL;
    const ElfW(Dyn) *dynamic = NULL;
    ElfW(Addr) base = library->dlpi_addr, relro = 0, relro_end = 0;
    table_t tables[2] = {{0}};
    if (strcmp(slash ? slash + 1 : library->dlpi_name, name)) return 0;
    for (int i = 0; i < library->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &library->dlpi_phdr[i];
        if (part->p_type == PT_DYNAMIC) dynamic = (const ElfW(Dyn) *)(base + part->p_vaddr);
        if (part->p_type == PT_GNU_RELRO) relro = base + part->p_vaddr, relro_end = relro + part->p_memsz;
    }
    for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++) {
        ElfW(Addr) value = dynamic->d_un.d_val;
        if (dynamic->d_tag == DT_STRTAB) strings = (const char *)value;
        if (dynamic->d_tag == DT_SYMTAB) symbols = (const ElfW(Sym) *)value;
        if (dynamic->d_tag == DT_JMPREL) tables[0].entries = (const ElfW(Rela) *)value;
        if (dynamic->d_tag == DT_PLTRELSZ) tables[0].count = value / sizeof(ElfW(Rela));
        if (dynamic->d_tag == DT_RELA) tables[1].entries = (const ElfW(Rela) *)value;
        if (dynamic->d_tag == DT_RELASZ) tables[1].count = value / sizeof(ElfW(Rela));
    }
    if (!strings || !symbols) return 1;
    for (int t = 0; t < 2; t++)
        for (size_t i = 0; tables[t].entries && i < tables[t].count; i++) {
            const ElfW(Rela) *entry = &tables[t].entries[i];
            unsigned kind = (unsigned)ELF64_R_TYPE(entry->r_info);
            if (kind != JUMP_SLOT && kind != GLOB_DAT) continue;
            const char *import = strings + symbols[ELF64_R_SYM(entry->r_info)].st_name;
            for (int w = 0; waits[w].name; w++)
                if (!strcmp(import, waits[w].name)) {
                    ElfW(Addr) slot = base + entry->r_offset;
                    int done = lead(slot, waits[w].function, slot >= relro && slot < relro_end);
                    led += done && waits[w].function == wait_eventfd;
                }
        }
    return 1;
}

/* Lead the waits of libtorch_npu.so here, once in a process. Returns whether the wait for its queue is among them. */
__attribute__((visibility("hidden"))) int emulator_lead_waits(void) {
    static int settled = 0;
    if (settled) return led > 0;
    settled = 1;
    find_python();
    condition_wait = (void (*)(void *, void *))dlsym(RTLD_DEFAULT, CONDITION);
    if (python.take && condition_wait) dl_iterate_phdr(lead_imports, "libtorch_npu.so");
    return led > 0;
}
