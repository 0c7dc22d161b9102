/* The C side of the emulated CANN: devices, memory, streams, events, and the entry points of every aclnn operator.
 *
 * It needs neither Python's nor torch's headers. One library holds it all under the soname libascendcl.so; the other sonames
 * that torch_npu asks for are empty libraries that depend on it, so that dlsym on them finds what is here.
 *
 * Everything computes in the thread that launches it: when a launch returns its work is done. Streams therefore keep their
 * order by themselves, and an event is done when it is recorded; only a wait for an event that another thread has yet to
 * record has to block.
 *
 * names.inc, made from the installed wheel, lists the operators: OPERATOR(index, name).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define OK 0
#define INVALID 107000         /* ACL_ERROR_RT_PARAM_INVALID */
#define NOT_SUPPORTED 561000   /* ACLNN_ERR_INNER. ACL_ERROR_RT_FEATURE_NOT_SUPPORT (207000) would make torch_npu print that driver and
                                * firmware do not match, and go on as if the call had succeeded (NPU_CHECK_ERROR). */
#define OUT_OF_MEMORY 207001   /* ACL_ERROR_RT_MEMORY_ALLOCATION */
#define MAX_DEVICES 16

/* waits.c */
int emulator_lead_waits(void), emulator_end_operator(int status);
void emulator_begin_operator(void), emulator_thread_failed(void);

/* ------------------------------------------------------------------------------------------------------ settings, errors */

static int device_count = 1;
static char soc_name[64] = "Ascend910B4";
static char cann_version[64] = "";
static uint64_t memory_total = (uint64_t)32 << 30;
static __thread int current_device = 0;
static __thread char error_text[4096];
static __thread int error_unread = 0;

EXPORT void emulator_configure(int devices, const char *name, uint64_t memory, const char *cann) {
    device_count = devices;
    memory_total = memory;
    snprintf(soc_name, sizeof soc_name, "%s", name);
    snprintf(cann_version, sizeof cann_version, "%s", cann);
}

/* torch_npu reads the text in the thread that launched, a queue of its own, and once more where the user waits for the result.
 * So a text is kept for its thread, and once for a thread that has none. */
static pthread_mutex_t error_lock = PTHREAD_MUTEX_INITIALIZER;
static char shared_text[4096];
static int shared_unread = 0;

static int is_main_thread(void) { return (pid_t)syscall(SYS_gettid) == getpid(); }

EXPORT void emulator_set_error(const char *text) {
    if (text != error_text) snprintf(error_text, sizeof error_text, "%s", text);
    error_unread = 1;
    emulator_thread_failed();
    pthread_mutex_lock(&error_lock);
    snprintf(shared_text, sizeof shared_text, "%s", text);
    shared_unread = 1;
    pthread_mutex_unlock(&error_lock);
}

static int fail(int code, const char *text) {
    emulator_set_error(text);
    return code;
}

static int not_emulated(const char *name) {
    snprintf(error_text, sizeof error_text, "%s is not emulated", name);
    emulator_set_error(error_text);
    return NOT_SUPPORTED;
}

EXPORT const char *aclGetRecentErrMsg(void) {
    pthread_mutex_lock(&error_lock);
    int found = error_unread || shared_unread;
    if (!error_unread && shared_unread) snprintf(error_text, sizeof error_text, "%s", shared_text);
    if (!error_unread || is_main_thread()) shared_unread = 0;
    error_unread = 0;
    pthread_mutex_unlock(&error_lock);
    return found ? error_text : NULL;
}

/* -------------------------------------------------------------------------------------------------------------- operators */

enum {
#define OPERATOR(index, name) COUNTED_##index,
#include "names.inc"
#undef OPERATOR
    OPERATOR_COUNT
};

static const char *const operator_names[] = {
#define OPERATOR(index, name) #name,
#include "names.inc"
#undef OPERATOR
    NULL};

typedef int (*execute_t)(void *executor);
static execute_t execute_callback;

EXPORT int emulator_operator_count(void) { return OPERATOR_COUNT; }
EXPORT const char *emulator_operator_name(int index) { return operator_names[index]; }

/* Where the GetWorkspaceSize of each operator goes: a callback that Python sets, or operator_unknown. */
__attribute__((visibility("hidden"))) void *emulator_slots[OPERATOR_COUNT + 1];

__attribute__((visibility("hidden"), used)) int emulator_unknown(int index) {
    snprintf(error_text, sizeof error_text,
             "%s is not emulated: the emulated CANN has no entry for this operator in its table", operator_names[index]);
    emulator_set_error(error_text);
    return NOT_SUPPORTED;
}

EXPORT void emulator_set_operator(int index, void *callback) { emulator_slots[index] = callback; }
EXPORT void emulator_set_execute(execute_t callback) { execute_callback = callback; }

/* Some callers go on after GetWorkspaceSize failed: without an executor there is nothing to compute. */
__attribute__((visibility("hidden"), used)) int emulator_execute(void *workspace, uint64_t size, void *executor, void *stream, int index) {
    (void)workspace; (void)size; (void)stream;
    if (!executor) return emulator_unknown(index);
    emulator_begin_operator();
    return emulator_end_operator(execute_callback(executor));
}

/* Each entry leaves the arguments where they are and jumps, so that one line serves every signature. The scratch register
 * carries the operator's index for emulator_unknown. */
#if defined(__x86_64__)
#define ENTRY(index, name)                                                                   \
    __asm__(".text\n.globl " #name "GetWorkspaceSize\n.type " #name "GetWorkspaceSize,@function\n" \
            #name "GetWorkspaceSize:\n movl $" #index ", %r10d\n jmp emulator_dispatch\n"     \
            ".globl " #name "\n.type " #name ",@function\n" #name ":\n movl $" #index ", %r8d\n jmp emulator_execute\n");
__asm__(".text\nemulator_dispatch:\n"
        " leaq emulator_slots(%rip), %r11\n movq (%r11,%r10,8), %r11\n testq %r11, %r11\n jz 1f\n jmp *%r11\n"
        "1: movl %r10d, %edi\n jmp emulator_unknown\n");
#elif defined(__aarch64__)
#define ENTRY(index, name)                                                                   \
    __asm__(".text\n.globl " #name "GetWorkspaceSize\n.type " #name "GetWorkspaceSize,%function\n" \
            #name "GetWorkspaceSize:\n mov w16, #" #index "\n b emulator_dispatch\n"          \
            ".globl " #name "\n.type " #name ",%function\n" #name ":\n mov w4, #" #index "\n b emulator_execute\n");
__asm__(".text\nemulator_dispatch:\n"
        " adrp x17, emulator_slots\n add x17, x17, :lo12:emulator_slots\n ldr x17, [x17, x16, lsl #3]\n cbz x17, 1f\n br x17\n"
        "1: mov w0, w16\n b emulator_unknown\n");
#else
#error "the emulated CANN knows x86-64 and aarch64"
#endif
#define OPERATOR(index, name) ENTRY(index, name)
#include "names.inc"
#undef OPERATOR

/* ---------------------------------------------------------------------------------- what operators are called with: values */

/* Python reads these by their layout: keep it in step with values.py. Handles never reach anybody else. */
enum { TENSOR = 1, SCALAR, INT_ARRAY, BOOL_ARRAY, FLOAT_ARRAY, TENSOR_LIST, SCALAR_LIST, DESCRIPTION };
#define MAX_DIMS 16

typedef struct {
    int64_t kind, dtype, format, dims, offset, data, storage_dims;
    int64_t shape[MAX_DIMS], strides[MAX_DIMS], storage[MAX_DIMS];
} tensor_t;

typedef struct { int64_t kind, dtype; char value[16]; } scalar_t;
typedef struct { int64_t kind, count; char values[]; } array_t;

EXPORT void *aclCreateTensor(const int64_t *shape, uint64_t dims, int dtype, const int64_t *strides, int64_t offset, int format,
                             const int64_t *storage, uint64_t storage_dims, void *data) {
    if (dims > MAX_DIMS || storage_dims > MAX_DIMS) return NULL;
    tensor_t *tensor = calloc(1, sizeof *tensor);
    tensor->kind = TENSOR;
    tensor->dtype = dtype;
    tensor->format = format;
    tensor->dims = (int64_t)dims;
    tensor->offset = offset;
    tensor->data = (int64_t)(intptr_t)data;
    tensor->storage_dims = (int64_t)storage_dims;
    if (dims) memcpy(tensor->shape, shape, dims * sizeof *shape);
    if (dims && strides) memcpy(tensor->strides, strides, dims * sizeof *strides);
    if (dims && !strides)
        for (int64_t stride = 1, i = (int64_t)dims - 1; i >= 0; i--) tensor->strides[i] = stride, stride *= shape[i];
    if (storage_dims) memcpy(tensor->storage, storage, storage_dims * sizeof *storage);
    return tensor;
}

static int size_of(int dtype) {
    switch (dtype) {
        case 9: case 10: case 11: case 16: return 8;      /* int64, uint64, double, complex64 */
        case 17: return 16;                               /* complex128 */
        case 1: case 6: case 7: case 27: return 2;        /* float16, int16, uint16, bfloat16 */
        case 2: case 4: case 12: return 1;
        default: return 4;
    }
}

EXPORT void *aclCreateScalar(void *value, int dtype) {
    scalar_t *scalar = calloc(1, sizeof *scalar);
    scalar->kind = SCALAR;
    scalar->dtype = dtype;
    memcpy(scalar->value, value, (size_t)size_of(dtype));
    return scalar;
}

static void *array(int kind, const void *values, uint64_t count, size_t size) {
    array_t *made = calloc(1, sizeof *made + count * size + 8);
    made->kind = kind;
    made->count = (int64_t)count;
    if (count) memcpy(made->values, values, count * size);
    return made;
}

EXPORT void *aclCreateIntArray(const int64_t *values, uint64_t count) { return array(INT_ARRAY, values, count, 8); }
EXPORT void *aclCreateBoolArray(const void *values, uint64_t count) { return array(BOOL_ARRAY, values, count, 1); }
EXPORT void *aclCreateFloatArray(const float *values, uint64_t count) { return array(FLOAT_ARRAY, values, count, 4); }
EXPORT void *aclCreateTensorList(void *const *values, uint64_t count) { return array(TENSOR_LIST, values, count, 8); }
EXPORT void *aclCreateScalarList(void *const *values, uint64_t count) { return array(SCALAR_LIST, values, count, 8); }

static int release(void *value) { free(value); return OK; }
EXPORT int aclDestroyTensor(void *value) { return release(value); }
EXPORT int aclDestroyScalar(void *value) { return release(value); }
EXPORT int aclDestroyIntArray(void *value) { return release(value); }
EXPORT int aclDestroyBoolArray(void *value) { return release(value); }
EXPORT int aclDestroyFloatArray(void *value) { return release(value); }

static int release_list(array_t *list) { /* CANN's lists own what they hold */
    void **values = (void **)list->values;
    for (int64_t i = 0; i < list->count; i++) free(values[i]);
    return release(list);
}

EXPORT int aclDestroyTensorList(void *value) { return value ? release_list(value) : OK; }
EXPORT int aclDestroyScalarList(void *value) { return value ? release_list(value) : OK; }
EXPORT int aclDestroyAclOpExecutor(void *executor) { (void)executor; return OK; }

/* Of an output whose shape the operator decides: it lies densely at the start of the room that was made for it. */
EXPORT void emulator_set_shape(tensor_t *tensor, const int64_t *shape, int64_t dims) {
    tensor->dims = dims;
    memcpy(tensor->shape, shape, (size_t)dims * sizeof *shape);
}

EXPORT int aclGetViewShape(const tensor_t *tensor, int64_t **shape, uint64_t *dims) {
    *dims = (uint64_t)tensor->dims;
    *shape = calloc((size_t)tensor->dims + 1, sizeof **shape);
    memcpy(*shape, tensor->shape, (size_t)tensor->dims * sizeof **shape);
    return OK;
}

/* ---------------------------------------------------------------------------------------------------------------- devices */

/* A process that an emulated program started, such as a worker that was spawned, finds these libraries by LD_LIBRARY_PATH when it
 * imports torch_npu. The machine it plays stands in its environment; the operators come from Python, which is asked here. */
static int attach(void) {
    int (*ensure)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    void (*release_gil)(int) = (void (*)(int))dlsym(RTLD_DEFAULT, "PyGILState_Release");
    int (*run)(const char *, void *) = (int (*)(const char *, void *))dlsym(RTLD_DEFAULT, "PyRun_SimpleStringFlags");
    if (!ensure || !release_gil || !run) return fail(NOT_SUPPORTED, "the emulated CANN computes in Python, and this process has none");
    int state = ensure();
    int status = run("import harness.emulator.runtime as runtime; runtime.attach(); del runtime", NULL);
    release_gil(state);
    return status || !execute_callback ? fail(NOT_SUPPORTED, "the emulated CANN could not load its operators in this process") : OK;
}

__attribute__((constructor)) static void read_environment(void) {
    const char *text = getenv("EMULATED_CANN_MACHINE"); /* devices memory name cann, as runtime.py writes it */
    int devices;
    unsigned long long memory;
    char name[64], cann[64];
    if (text && sscanf(text, "%d %llu %63s %63s", &devices, &memory, name, cann) == 4) emulator_configure(devices, name, memory, cann);
}

/* waits.c keeps torch_npu's queue from being waited for with the GIL. Where the library of torch_npu cannot be led there, as on a
 * system that forbids to change a page, there is no queue: what is launched is computed at once, in the thread that launches it. */
static void lead_waits(void) {
    const char *queue = getenv("TASK_QUEUE_ENABLE");
    if (emulator_lead_waits()) return;
    if (!queue || strcmp(queue, "0"))
        fprintf(stderr, "the emulated CANN cannot serve torch_npu's queue in this process and sets TASK_QUEUE_ENABLE=0\n");
    setenv("TASK_QUEUE_ENABLE", "0", 1);
}

EXPORT int aclInit(const char *config) {
    (void)config;
    lead_waits();
    return execute_callback ? OK : attach();
}
EXPORT int aclFinalize(void) { return OK; }
EXPORT void aclAppLog(int level, const char *function, const char *file, uint32_t line, const char *format, ...) {
    (void)level; (void)function; (void)file; (void)line; (void)format;
}

/* How many devices ASCEND_RT_VISIBLE_DEVICES leaves of those that there are, as torch_npu reads it (_device_count_ascend_hal):
 * numbers and commas, what follows another letter is not read, numbers must ascend, and the first that no device has ends the list. */
static int visible_devices(void) {
    const char *text = getenv("ASCEND_RT_VISIBLE_DEVICES");
    long before = -1;
    int count = 0;
    if (!text) return device_count;
    while (*text >= '0' && *text <= '9') {
        char *end;
        long number = strtol(text, &end, 10);
        if (number <= before) return 0;
        if (number >= device_count) return count;
        before = number;
        count++;
        if (*end != ',') return count;
        text = end + 1;
    }
    return count;
}

/* The driver's library, by which torch.npu.device_count() counts before it reads the variable itself. */
EXPORT int drvGetDevNum(int *count) { *count = device_count; return OK; }

static char active[MAX_DEVICES]; /* the devices that this process has set: those have a primary context */
static int settled_count = -1;   /* the number of devices from the first that was set on: the variable is not read again */

static int count_devices(void) { return settled_count < 0 ? visible_devices() : settled_count; }

EXPORT int aclrtSetDevice(int device) {
    if (device < 0 || device >= count_devices()) return fail(107001, "no such device"); /* ACL_ERROR_RT_INVALID_DEVICEID */
    settled_count = count_devices();
    current_device = device;
    active[device] = 1;
    return OK;
}
static int reset_device(int device) {
    if (device >= 0 && device < MAX_DEVICES) active[device] = 0;
    return OK;
}
EXPORT int aclrtResetDevice(int device) { return reset_device(device); }
EXPORT int aclrtResetDeviceForce(int device) { return reset_device(device); }
EXPORT int aclrtGetDevice(int *device) { *device = current_device; return OK; }
EXPORT int aclrtGetDeviceCount(uint32_t *count) { *count = (uint32_t)count_devices(); return OK; }
EXPORT const char *aclrtGetSocName(void) { return soc_name; }
EXPORT int aclrtSynchronizeDevice(void) { return OK; }
EXPORT int aclrtSynchronizeDeviceWithTimeout(int timeout) { (void)timeout; return OK; }
EXPORT int aclrtDeviceCanAccessPeer(int *can, int device, int peer) { *can = device != peer; return OK; }
EXPORT int aclrtDeviceEnablePeerAccess(int peer, uint32_t flags) { (void)peer; (void)flags; return OK; }
EXPORT int aclrtGetCurrentContext(void **context) { *context = (void *)(intptr_t)(current_device + 1); return OK; }
EXPORT int aclrtSetCurrentContext(void *context) {
    int device = (int)(intptr_t)context - 1;
    return device < 0 ? OK : aclrtSetDevice(device);
}
EXPORT int aclrtGetPrimaryCtxState(int device, uint32_t *flags, int *is_active) {
    if (flags) *flags = 0;
    *is_active = device >= 0 && device < MAX_DEVICES && active[device];
    return OK;
}
EXPORT int aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *value) {
    (void)device;
    switch (attribute) {
        case 1: *value = 6; return OK;                      /* AI CPUs */
        case 101: case 102: *value = 20; return OK;         /* AI cores, cube cores of a 910B4 */
        case 201: *value = 40; return OK;                   /* vector cores */
        case 301: *value = (int64_t)memory_total; return OK;
        case 302: *value = 96 << 20; return OK;             /* second-level cache */
        default: *value = 0; return OK;
    }
}
EXPORT int aclGetDeviceCapability(uint32_t device, int info, int64_t *value) { (void)device; (void)info; *value = 20; return OK; }
EXPORT int aclrtPeekAtLastError(int level) { (void)level; return OK; }
EXPORT int aclrtGetLastError(int level) { (void)level; return OK; }
EXPORT int aclrtDeviceGetBareTgid(int32_t *pid) { *pid = 0; return OK; }

static int64_t system_options[64]; /* 0: deterministic, … */
EXPORT int aclrtSetSysParamOpt(int option, int64_t value) {
    if (option < 0 || option >= 64) return fail(INVALID, "no such system option");
    system_options[option] = value;
    return OK;
}
EXPORT int aclrtGetSysParamOpt(int option, int64_t *value) {
    if (option < 0 || option >= 64) return fail(INVALID, "no such system option");
    *value = system_options[option];
    return OK;
}
EXPORT int aclrtCtxSetSysParamOpt(int option, int64_t value) { return aclrtSetSysParamOpt(option, value); }
EXPORT int aclrtCtxGetSysParamOpt(int option, int64_t *value) { return aclrtGetSysParamOpt(option, value); }
EXPORT int aclrtSetOpExecuteTimeOut(uint32_t timeout) { (void)timeout; return OK; }
EXPORT int aclrtSetOpWaitTimeout(uint32_t timeout) { (void)timeout; return OK; }
EXPORT int emulator_saturation_mode = 1; /* 0: half results that overflow are cut to the largest number; 1: Inf and NaN, as a 910B comes */
EXPORT int aclrtSetDeviceSatMode(int mode) { emulator_saturation_mode = mode; return OK; }
EXPORT int aclrtGetDeviceSatMode(int *mode) { *mode = emulator_saturation_mode; return OK; }

static int version(char *text) {
    if (!cann_version[0]) return fail(INVALID, "the emulated CANN was given no version");
    snprintf(text, 64, "%s", cann_version);
    return OK;
}
typedef struct { char version[128]; char fields[256]; } cann_version_t;
EXPORT int aclsysGetCANNVersion(int package, cann_version_t *found) {
    (void)package;
    memset(found->version, 0, sizeof found->version);
    return version(found->version);
}
EXPORT int aclsysGetVersionStr(char *package, char *text) {
    if (package && strstr(package, "driver")) { text[0] = 0; return INVALID; } /* there is no driver */
    return version(text);
}

/* --------------------------------------------------------------------------------------------------------------- memory */

static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t memory_used[MAX_DEVICES];
typedef struct { uint64_t magic, size; int device; char pad[44]; } block_t; /* 64 bytes, in front of every allocation */
#define HUGE_PAGE ((size_t)2 << 20)
#define BLOCK_MAGIC 0x636e6e5f656d756cULL

EXPORT int aclrtMalloc(void **pointer, size_t size, int policy) {
    (void)policy;
    *pointer = NULL;
    pthread_mutex_lock(&memory_lock);
    int fits = memory_used[current_device] + size <= memory_total;
    if (fits) memory_used[current_device] += size;
    pthread_mutex_unlock(&memory_lock);
    if (!fits) return fail(OUT_OF_MEMORY, "out of memory on the emulated device");
    block_t *block = NULL;
    size_t whole = 512 + size + 64, alignment = size >= HUGE_PAGE ? HUGE_PAGE : 512;
    if (posix_memalign((void **)&block, alignment, whole)) {
        pthread_mutex_lock(&memory_lock);
        memory_used[current_device] -= size;
        pthread_mutex_unlock(&memory_lock);
        return fail(OUT_OF_MEMORY, "out of memory on the host that emulates the device");
    }
    if (alignment == HUGE_PAGE) madvise(block, whole, MADV_HUGEPAGE); /* else a gigabyte costs seconds of page faults */
    char *start = (char *)block + 512;
    block = (block_t *)(start - sizeof(block_t));
    block->magic = BLOCK_MAGIC;
    block->size = size;
    block->device = current_device;
    *pointer = start;
    return OK;
}
EXPORT int aclrtMallocAlign32(void **pointer, size_t size, int policy) { return aclrtMalloc(pointer, size, policy); }

EXPORT int aclrtFree(void *pointer) {
    if (!pointer) return OK;
    block_t *block = (block_t *)((char *)pointer - sizeof(block_t));
    if (block->magic != BLOCK_MAGIC) return fail(INVALID, "aclrtFree of something that aclrtMalloc did not give");
    pthread_mutex_lock(&memory_lock);
    memory_used[block->device] -= block->size;
    pthread_mutex_unlock(&memory_lock);
    block->magic = 0;
    free((char *)pointer - 512);
    return OK;
}

EXPORT int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total) {
    (void)kind;
    pthread_mutex_lock(&memory_lock);
    *free_bytes = memory_total - memory_used[current_device];
    pthread_mutex_unlock(&memory_lock);
    *total = memory_total;
    return OK;
}

EXPORT int aclrtMallocHost(void **pointer, size_t size) {
    return posix_memalign(pointer, 64, size ? size : 64) ? fail(OUT_OF_MEMORY, "out of host memory") : OK;
}
EXPORT int aclrtFreeHost(void *pointer) { return release(pointer); }

static int copy(void *to, size_t room, const void *from, size_t size) {
    if (size > room) return fail(INVALID, "a copy is larger than its destination");
    if (size) memmove(to, from, size);
    return OK;
}
EXPORT uint64_t emulator_bytes_to_host; /* copied from devices so far: an operator that brings its inputs back computes on the CPU */
static int copy_as(void *to, size_t room, const void *from, size_t size, int kind) {
    if (kind == 2) __sync_add_and_fetch(&emulator_bytes_to_host, size); /* ACL_MEMCPY_DEVICE_TO_HOST */
    return copy(to, room, from, size);
}
EXPORT int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) { return copy_as(to, room, from, size, kind); }
EXPORT int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    (void)stream;
    return copy_as(to, room, from, size, kind);
}
EXPORT int aclrtMemset(void *to, size_t room, int32_t value, size_t size) {
    if (size > room) return fail(INVALID, "a fill is larger than its destination");
    memset(to, value, size);
    return OK;
}
EXPORT int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t size, void *stream) { (void)stream; return aclrtMemset(to, room, value, size); }

/* ------------------------------------------------------------------------------------------------------- streams, events */

typedef struct { int32_t id; int device; } stream_t;
static int32_t stream_count;

EXPORT int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) {
    (void)priority; (void)flag;
    stream_t *made = calloc(1, sizeof *made);
    made->id = __sync_add_and_fetch(&stream_count, 1);
    made->device = current_device;
    *stream = made;
    return OK;
}
EXPORT int aclrtCreateStream(void **stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }
EXPORT int aclrtDestroyStream(void *stream) { return release(stream); }
EXPORT int aclrtDestroyStreamForce(void *stream) { return release(stream); }
EXPORT int aclrtSynchronizeStream(void *stream) { (void)stream; return OK; }
EXPORT int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t timeout) { (void)stream; (void)timeout; return OK; }
EXPORT int aclrtStreamQuery(void *stream, int *status) { (void)stream; *status = 0; return OK; } /* complete */
EXPORT int aclrtStreamGetId(void *stream, int32_t *id) { *id = stream ? ((stream_t *)stream)->id : 0; return OK; }
EXPORT int aclrtSetStreamFailureMode(void *stream, uint64_t mode) { (void)stream; (void)mode; return OK; }
EXPORT int aclrtSetStreamOverflowSwitch(void *stream, uint32_t flag) { (void)stream; (void)flag; return OK; }
EXPORT int aclrtGetStreamOverflowSwitch(void *stream, uint32_t *flag) { (void)stream; *flag = 0; return OK; }

typedef struct { double recorded_ms; int recorded; } event_t;
static pthread_mutex_t event_lock = PTHREAD_MUTEX_INITIALIZER;

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

EXPORT int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { (void)flag; *event = calloc(1, sizeof(event_t)); return OK; }
EXPORT int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }
EXPORT int aclrtCreateEvent(void **event) { return aclrtCreateEventExWithFlag(event, 0); }
EXPORT int aclrtDestroyEvent(void *event) { return release(event); }

EXPORT int aclrtRecordEvent(void *handle, void *stream) {
    (void)stream;
    event_t *event = handle;
    pthread_mutex_lock(&event_lock);
    event->recorded_ms = now_ms();
    event->recorded = 1;
    pthread_mutex_unlock(&event_lock);
    return OK;
}
EXPORT int aclrtResetEvent(void *handle, void *stream) {
    (void)stream;
    pthread_mutex_lock(&event_lock);
    ((event_t *)handle)->recorded = 0;
    pthread_mutex_unlock(&event_lock);
    return OK;
}
/* torch_npu holds a wait back until its own queue has recorded the event, so there is nothing left to wait for. */
EXPORT int aclrtStreamWaitEvent(void *stream, void *event) { (void)stream; (void)event; return OK; }
EXPORT int aclrtSynchronizeEvent(void *event) { (void)event; return OK; }
EXPORT int aclrtSynchronizeEventWithTimeout(void *event, int32_t timeout) { (void)event; (void)timeout; return OK; }

static int recorded(void *handle, int *status) {
    pthread_mutex_lock(&event_lock);
    *status = ((event_t *)handle)->recorded;
    pthread_mutex_unlock(&event_lock);
    return OK;
}
EXPORT int aclrtQueryEventStatus(void *event, int *status) { return recorded(event, status); }
EXPORT int aclQueryEventRecordedStatus(void *event, int *status) { return recorded(event, status); }
EXPORT int aclrtQueryEventWaitStatus(void *event, int *status) { (void)event; *status = 0; return OK; }
EXPORT int aclQueryEventWaitStatus(void *event, int *status) { (void)event; *status = 0; return OK; }
EXPORT int aclrtEventElapsedTime(float *milliseconds, void *begin, void *end) {
    event_t *from = begin, *to = end;
    pthread_mutex_lock(&event_lock);
    int both = from->recorded && to->recorded;
    *milliseconds = (float)(to->recorded_ms - from->recorded_ms);
    pthread_mutex_unlock(&event_lock);
    return both ? OK : fail(INVALID, "elapsed time asked of an event that was never recorded");
}
EXPORT int aclrtEventGetTimestamp(void *event, uint64_t *microseconds) {
    *microseconds = (uint64_t)(((event_t *)event)->recorded_ms * 1e3);
    return OK;
}

/* -------------------------------------------------------------------- the older operator path: a type, descriptions, attributes */

/* An aclTensorDesc: a tensor whose memory comes with the call, from the buffer beside it. Each call has its own. */
typedef struct {
    tensor_t tensor; /* shape: the dimensions that the program sees; storage: those that lie in memory, in `format` */
    int64_t origin_format, placement, room; /* placement: 0 device, else host; room: bytes behind tensor.data */
    char name[64];
} description_t;

typedef struct { void *data; size_t size; } buffer_t;

EXPORT void *aclCreateDataBuffer(void *data, size_t size) {
    buffer_t *buffer = calloc(1, sizeof *buffer);
    buffer->data = data;
    buffer->size = size;
    return buffer;
}
EXPORT int aclDestroyDataBuffer(void *buffer) { return release(buffer); }

EXPORT int aclSetTensorShape(description_t *description, int dims, const int64_t *shape) {
    if (dims < 0 || dims > MAX_DIMS) return fail(INVALID, "a description has 0 to 16 dimensions");
    description->tensor.storage_dims = dims;
    if (dims) memcpy(description->tensor.storage, shape, (size_t)dims * sizeof *shape);
    return OK;
}
EXPORT void *aclCreateTensorDesc(int dtype, int dims, const int64_t *shape, int format) {
    if (dims < 0 || dims > MAX_DIMS) return NULL;
    description_t *made = calloc(1, sizeof *made);
    tensor_t *tensor = &made->tensor;
    tensor->kind = DESCRIPTION;
    tensor->dtype = dtype;
    tensor->format = made->origin_format = format;
    tensor->dims = dims;
    if (dims) memcpy(tensor->shape, shape, (size_t)dims * sizeof *shape);
    for (int64_t stride = 1, i = dims - 1; i >= 0; i--) tensor->strides[i] = stride, stride *= shape[i];
    aclSetTensorShape(made, dims, shape);
    return made;
}
EXPORT void aclDestroyTensorDesc(void *description) { free(description); }
EXPORT int aclSetTensorFormat(description_t *description, int format) { description->tensor.format = format; return OK; }
EXPORT int aclSetTensorPlaceMent(description_t *description, int placement) { description->placement = placement; return OK; }
EXPORT void aclSetTensorDescName(description_t *description, const char *name) {
    snprintf(description->name, sizeof description->name, "%s", name);
}
EXPORT int aclGetTensorDescType(const description_t *description) { return (int)description->tensor.dtype; }
EXPORT int aclGetTensorDescFormat(const description_t *description) { return (int)description->tensor.format; }
EXPORT size_t aclGetTensorDescNumDims(const description_t *description) { return (size_t)description->tensor.dims; }
EXPORT int aclGetTensorDescDimV2(const description_t *description, size_t index, int64_t *size) {
    if (index >= (size_t)description->tensor.dims) return fail(INVALID, "a description was asked for a dimension that it lacks");
    *size = description->tensor.shape[index];
    return OK;
}

/* Attributes: records one behind the other, {kind, bytes of name, bytes of value}, name, value. Python walks them. */
enum { ATTR_BOOL = 1, ATTR_INT, ATTR_FLOAT, ATTR_STRING, ATTR_DTYPE, ATTR_BOOLS, ATTR_INTS, ATTR_FLOATS, ATTR_INT_LISTS };
typedef struct { int64_t used, room; char *records; } attributes_t;

EXPORT void *aclopCreateAttr(void) { return calloc(1, sizeof(attributes_t)); }
EXPORT void aclopDestroyAttr(attributes_t *attributes) {
    if (attributes) free(attributes->records);
    free(attributes);
}

static char *record(attributes_t *attributes, const char *name, int64_t kind, size_t size) {
    int64_t header[3] = {kind, (int64_t)strlen(name), (int64_t)size};
    int64_t whole = (int64_t)sizeof header + header[1] + header[2];
    if (attributes->used + whole > attributes->room) {
        attributes->room = 2 * (attributes->used + whole);
        attributes->records = realloc(attributes->records, (size_t)attributes->room);
    }
    char *at = attributes->records + attributes->used;
    attributes->used += whole;
    memcpy(at, header, sizeof header);
    memcpy(at + sizeof header, name, (size_t)header[1]);
    return at + sizeof header + header[1];
}
static int attribute(attributes_t *attributes, const char *name, int kind, const void *value, size_t size) {
    char *at = record(attributes, name, kind, size);
    if (size) memcpy(at, value, size);
    return OK;
}
EXPORT int aclopSetAttrBool(attributes_t *to, const char *name, uint8_t value) { return attribute(to, name, ATTR_BOOL, &value, 1); }
EXPORT int aclopSetAttrInt(attributes_t *to, const char *name, int64_t value) { return attribute(to, name, ATTR_INT, &value, 8); }
EXPORT int aclopSetAttrFloat(attributes_t *to, const char *name, float value) { return attribute(to, name, ATTR_FLOAT, &value, 4); }
EXPORT int aclopSetAttrString(attributes_t *to, const char *name, const char *text) { return attribute(to, name, ATTR_STRING, text, strlen(text)); }
EXPORT int aclopSetAttrDataType(attributes_t *to, const char *name, int value) {
    int64_t dtype = value;
    return attribute(to, name, ATTR_DTYPE, &dtype, 8);
}
EXPORT int aclopSetAttrListBool(attributes_t *to, const char *name, int count, const uint8_t *values) {
    return attribute(to, name, ATTR_BOOLS, values, (size_t)count);
}
EXPORT int aclopSetAttrListInt(attributes_t *to, const char *name, int count, const int64_t *values) {
    return attribute(to, name, ATTR_INTS, values, (size_t)count * 8);
}
EXPORT int aclopSetAttrListFloat(attributes_t *to, const char *name, int count, const float *values) {
    return attribute(to, name, ATTR_FLOATS, values, (size_t)count * 4);
}
EXPORT int aclopSetAttrListListInt(attributes_t *to, const char *name, int lists, const int *counts, const int64_t *const values[]) {
    size_t size = 0;
    for (int i = 0; i < lists; i++) size += 8 + (size_t)counts[i] * 8;
    char *at = record(to, name, ATTR_INT_LISTS, size);
    for (int i = 0; i < lists; i++) {
        int64_t count = counts[i];
        memcpy(at, &count, 8);
        if (count) memcpy(at + 8, values[i], (size_t)count * 8);
        at += 8 + count * 8;
    }
    return OK;
}

typedef int (*older_t)(const char *type, int inputs, void *in, int outputs, void *out, const void *attributes, int decides);
static older_t older_callback;
EXPORT void emulator_set_older(older_t callback) { older_callback = callback; }

static int older(const char *type, int inputs, description_t *const *in, buffer_t *const *in_buffers, int outputs,
                 description_t *const *out, buffer_t *const *out_buffers, const void *attributes, int decides) {
    for (int i = 0; i < inputs; i++) in[i]->tensor.data = (int64_t)(intptr_t)in_buffers[i]->data, in[i]->room = (int64_t)in_buffers[i]->size;
    for (int i = 0; i < outputs; i++) out[i]->tensor.data = (int64_t)(intptr_t)out_buffers[i]->data, out[i]->room = (int64_t)out_buffers[i]->size;
    if (!older_callback) return not_emulated(type);
    emulator_begin_operator();
    return emulator_end_operator(older_callback(type, inputs, (void *)in, outputs, (void *)out, attributes, decides));
}
EXPORT int aclopCompileAndExecute(const char *type, int inputs, description_t *const in[], buffer_t *const in_buffers[], int outputs,
                                  description_t *const out[], buffer_t *const out_buffers[], const void *attributes, int engine,
                                  int flag, const char *path, void *stream) {
    (void)engine; (void)flag; (void)path; (void)stream;
    return older(type, inputs, in, in_buffers, outputs, out, out_buffers, attributes, 0);
}
/* The second version waits for the result and may then say other shapes of it. */
EXPORT int aclopCompileAndExecuteV2(const char *type, int inputs, description_t *const in[], buffer_t *const in_buffers[], int outputs,
                                    description_t *const out[], buffer_t *const out_buffers[], const void *attributes, int engine,
                                    int flag, const char *path, void *stream) {
    (void)engine; (void)flag; (void)path; (void)stream;
    return older(type, inputs, in, in_buffers, outputs, out, out_buffers, attributes, 1);
}

/* What a cast to another format takes, in the pairs that CANN casts; for others torch_npu goes the older way. */
enum { NCHW = 0, ND = 2, NC1HWC0 = 3, FRACTAL_Z = 4, FRACTAL_NZ = 29, NCDHW = 30, NDC1HWC0 = 32, FRACTAL_Z_3D = 33, NCL = 47 };

EXPORT int aclnnNpuFormatCastCalculateSizeAndFormat(const tensor_t *from, int format, int base_dtype, int64_t **shape, uint64_t *dims, int *actual) {
    int64_t view[MAX_DIMS + 2], n = from->dims, count = n, block = 32 / size_of(base_dtype < 0 ? (int)from->dtype : base_dtype);
    int plain = from->format == ND || from->format == NCL || from->format == NCHW || from->format == NCDHW;
    memcpy(view, from->shape, sizeof from->shape);
#define BLOCKS(size, block) (((size) + (block) - 1) / (block))
    if (n < 2 || n > 6) return 161002; /* ACLNN_ERR_PARAM_INVALID */
    for (int64_t i = 0; i < n; i++) if (!view[i]) return 161002;
    if (from->format == format) return 161002;
    if (format == FRACTAL_NZ && plain) {
        int64_t rows = view[n - 2], columns = view[n - 1];
        view[n - 2] = BLOCKS(columns, block), view[n - 1] = BLOCKS(rows, 16), view[n] = 16, view[n + 1] = block;
        count = n + 2;
    } else if (format == NC1HWC0 && from->format == NCHW && n == 4) {
        view[1] = BLOCKS(view[1], block), view[4] = block;
        count = 5;
    } else if (format == FRACTAL_Z && from->format == NCHW && n == 4) {
        view[0] = BLOCKS(view[1], block) * view[2] * view[3], view[1] = BLOCKS(from->shape[0], 16), view[2] = 16, view[3] = block;
    } else if (format == NDC1HWC0 && from->format == NCDHW && n == 5) {
        view[1] = from->shape[2], view[2] = BLOCKS(from->shape[1], block), view[5] = block;
        count = 6;
    } else if (format == FRACTAL_Z_3D && from->format == NCDHW && n == 5) {
        view[0] = view[2] * BLOCKS(view[1], block) * view[3] * view[4], view[1] = BLOCKS(from->shape[0], 16), view[2] = 16, view[3] = block;
        count = 4;
    } else if (!(from->format == FRACTAL_NZ && (format == ND || format == NCL || format == NCHW || format == NCDHW)) &&
               !((from->format == NC1HWC0 || from->format == FRACTAL_Z) && format == NCHW) &&
               !((from->format == NDC1HWC0 || from->format == FRACTAL_Z_3D) && format == NCDHW)) {
        return 361001; /* ACLNN_ERR_RUNTIME_ERROR */
    }
    *shape = malloc((size_t)count * sizeof **shape);
    memcpy(*shape, view, (size_t)count * sizeof **shape);
    *dims = (uint64_t)count;
    *actual = format;
    return OK;
}

/* Compile options, as a 910B has them: nothing is compiled when it is called, and dtypes are kept. */
#define JIT_COMPILE 10
#define COMPILE_OPTIONS 32
static char compile_options[COMPILE_OPTIONS][128] = {[0] = "must_keep_origin_dtype", [JIT_COMPILE] = "disable"};

EXPORT size_t aclGetCompileoptSize(int option) { return option >= 0 && option < COMPILE_OPTIONS ? sizeof compile_options[0] : 0; }
EXPORT int aclGetCompileopt(int option, char *value, size_t size) {
    if (option < 0 || option >= COMPILE_OPTIONS) return fail(INVALID, "no such compile option");
    snprintf(value, size, "%s", compile_options[option]);
    return OK;
}
EXPORT int aclSetCompileopt(int option, const char *value) {
    if (option < 0 || option >= COMPILE_OPTIONS) return fail(INVALID, "no such compile option");
    snprintf(compile_options[option], sizeof compile_options[0], "%s", value);
    return OK;
}
EXPORT int aclmdlInitDump(void) { return OK; }
EXPORT int aclmdlSetDump(const char *path) { (void)path; return not_emulated("aclmdlSetDump"); }
EXPORT int aclmdlFinalizeDump(void) { return OK; }
EXPORT int aclrtSubscribeReport(uint64_t thread, void *stream) { (void)thread; (void)stream; return OK; }
EXPORT int aclrtUnSubscribeReport(uint64_t thread, void *stream) { (void)thread; (void)stream; return OK; }
EXPORT int aclrtProcessReport(int32_t timeout) { (void)timeout; return OK; }
EXPORT int aclrtLaunchCallback(void (*function)(void *), void *data, int block, void *stream) {
    (void)block; (void)stream;
    function(data);
    return OK;
}

EXPORT int HcclSetConfig(int option, ...) { (void)option; return OK; } /* of collectives, which are not emulated */

/* ------------------------------------------- what the wheel links against and the emulator does not do: wanted.inc, made too */
#define WANTED(name) EXPORT int name(void) { return not_emulated(#name); }
#define QUIET(name) EXPORT int name(void) { return OK; } /* profiling: nothing listens */
#include "wanted.inc"
