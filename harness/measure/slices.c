/* What slices.py sums of several contiguous matrices of one shape, in one pass: the squares of the first, golden, and
   of the differences of the others from it. An element that is not finite in one of them counts as zero in all.

   The rows are divided into a fixed number of parts, each with sums of its own, and threads take the parts one by one:
   no number depends on how many threads there are. */

#include "reading.h"

#define RUNS 16 /* matrices at most */
#define PIECE 512 /* elements of a row that are read at a time; a multiple of 8 */
#define BLOCKS 16
#define RANGE 2200 /* exponents, from -SHIFT on */
#define SHIFT 1100
#define TABLES 2 /* of magnitudes, since a sum that was just written is slow to read */

typedef struct {
    const void *runs[RUNS];
    int64_t kinds[RUNS];
    double *sums;   /* of each row: (runs, stop - start) */
    double *blocks; /* of each of `BLOCKS` blocks of a row: (runs, rows of all, BLOCKS); NULL: not wanted */
    double *own;    /* of each part: columns (runs, width), where wanted, and tables (TABLES, RANGE, runs + 1) */
    int64_t number, width, all, start, stop; /* runs, elements of a row, rows of all, the rows that are read now */
    int64_t columns, stride, parts, next;    /* whether columns are summed; doubles of a part's own; parts */
} Slices;

typedef struct {
    double wide[RUNS][PIECE + 8];
    int32_t exponents[PIECE + 8];
} __attribute__((aligned(64))) Room;

int64_t harness_slices_size(void) { return sizeof(Slices); }

/* Where a number lies between powers of two, as frexp says. */
static void find_exponents(Room *room, int64_t n)
{
    const double *x = room->wide[0];
    int64_t tiny = 0;
    for (int64_t i = 0; i < n; i++) {
        uint64_t bits;
        memcpy(&bits, x + i, sizeof bits);
        int32_t exponent = (int32_t)(bits >> 52 & 0x7FF);
        tiny |= exponent == 0 && bits << 1;
        room->exponents[i] = exponent == 0 || exponent == 0x7FF ? SHIFT : exponent - 1022 + SHIFT;
    }
    for (int64_t i = 0; tiny && i < n; i++) {
        int exponent;
        if (fabs(x[i]) < 0x1p-1022 && x[i] != 0)
            frexp(x[i], &exponent), room->exponents[i] = exponent + SHIFT;
    }
}

/* Squares in place of the numbers of every run; their sums. */
static void square(Room *room, int64_t number, int64_t n, double *sums)
{
    vec lanes[RUNS];
    for (int64_t run = 0; run < number; run++)
        lanes[run] = all(0);
    for (int64_t i = 0; i < n; i += LANES) {
        vec golden = *(vec *)(room->wide[0] + i), none = golden - golden, wide[RUNS];
        wide[0] = golden;
        for (int64_t run = 1; run < number; run++)
            wide[run] = *(vec *)(room->wide[run] + i) - golden, none += wide[run] - wide[run];
        ints finite = (ints)(none == 0);
        for (int64_t run = 0; run < number; run++) {
            vec x = (vec)((ints)wide[run] & finite);
            lanes[run] += x * x;
            *(vec *)(room->wide[run] + i) = x * x;
        }
    }
    for (int64_t run = 0; run < number; run++)
        sums[run] = sum(lanes[run]);
}

static void add_row(const Slices *job, Room *room, int64_t row, double *columns, double *tables)
{
    int64_t number = job->number, block = job->width / BLOCKS, entry = number + 1;
    double total[RUNS] = {0};
    for (int64_t at = 0, n; at < job->width; at += n) {
        int64_t end = at + PIECE < job->width ? at + PIECE : job->width, inside = job->blocks && at < block * BLOCKS;
        if (inside && at / block * block + block < end)
            end = at / block * block + block;
        n = end - at;
        for (int64_t run = 0; run < number; run++)
            load(room->wide[run], job->runs[run], job->kinds[run], row * job->width + at, n);
        find_exponents(room, n);
        double sums[RUNS];
        square(room, number, n, sums);
        for (int64_t run = 0; run < number; run++) {
            total[run] += sums[run];
            if (inside)
                job->blocks[(run * job->all + row) * BLOCKS + at / block] += sums[run];
            double *column = columns + run * job->width + at;
            for (int64_t i = 0; job->columns && i < n; i++)
                column[i] += room->wide[run][i];
        }
        for (int64_t i = 0; i < n; i++) {
            double *table = tables + (i % TABLES * RANGE + room->exponents[i]) * entry;
            for (int64_t run = 0; run < number; run++)
                table[run] += room->wide[run][i];
            table[number] += 1;
        }
    }
    for (int64_t run = 0; run < number; run++)
        job->sums[run * (job->stop - job->start) + row - job->start] = total[run];
}

/* Take parts until none is left. Several threads may call it at once. */
void harness_slices(Slices *job)
{
    Room room;
    int64_t rows = job->stop - job->start;
    for (int64_t part; (part = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->parts;) {
        double *columns = job->own + part * job->stride;
        double *tables = columns + (job->columns ? job->number * job->width : 0);
        int64_t stop = job->start + rows * (part + 1) / job->parts;
        for (int64_t row = job->start + rows * part / job->parts; row < stop; row++)
            add_row(job, &room, row, columns, tables);
    }
}
