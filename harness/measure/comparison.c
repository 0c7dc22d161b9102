/* What comparison.py measures between two contiguous tensors, in one pass.

   A tensor is cut into parts: some whole rows each, or a piece of one row where a row is longer than a part. Threads
   take the parts one by one (`harness_work`), and what each part gave is put together in the order of the parts
   (`harness_advance`), so that no number depends on how many threads there are. A part is read in blocks that stay in
   the processor's first cache: converted to double, then read by several short loops. Sums are made in vectors.

   Several pairs of tensors of one shape are measured together, part by part: what they share comes from memory once and
   from the cache afterwards, and `expected` that several pairs have is surveyed once.

   comparison.py says what each number is; its torch code is the reference that tests hold this file against. */

#include "reading.h"

#define BLOCK 1024 /* elements; a multiple of 8 */
#define BINS 1024
#define TABLES 4 /* histograms that neighbours are counted in, since a counter that was just written is slow to read */

enum { SURVEY, FILL, MAIN, WIDE, END };

/* compiled_comparison.py reads these structures here; each field takes 8 bytes. */
typedef struct {
    double diff2, actual2, expected2, dot;           /* sums of one row */
    double actual_top, expected_top, expected_there; /* largest elements; expected where actual has its largest */
    int64_t actual_at, expected_at;                  /* their index in the tensor; -1: none yet */
} Row;

typedef struct {
    double low, high, square, rest; /* of expected: its range, the sum of its squares, the largest beside the fill */
    int64_t finite, filled;
    double diff2, actual2, expected2, dot, gained, shifted, abs_diff, size, relative, ulps; /* sums */
    double max_diff, worst_actual, worst_expected, differ_actual, differ_expected;
    double close_excess, dynamo_excess, scaled_max, relative_max, ulps_max;
    double token_diff2, token_distance, flip_margin, flip_value;
    int64_t worst, first_differ, worst_token_diff, worst_token, first_flip; /* elements or rows; -1: none */
    int64_t above, unequal, within, flips, nan_actual, nan_expected, inf_actual, inf_expected, nonfinite_differ;
    double scale; /* of a piece of a row: what is added to the size of each element */
    Row row;      /* what a piece of a row gives of it */
} Part;

typedef struct {
    const void *actual, *expected;
    Part *parts; /* one a part, and behind them their total */
    int64_t *histogram;
    int64_t actual_kind, expected_kind, count, width, step, number; /* elements of all, a row and a part; parts */
    int64_t tokens, rows, filled, places, brief; /* brief: the sums of squares and the largest difference alone */
    int64_t same, stage, closed; /* an earlier job with the same expected, -1: none; whether no part is left to do */
    double fill, rms, close_relative, close_absolute, dynamo_relative, smallest;
} Job;

#define JOBS 8 /* at most */
typedef struct { /* jobs that are done together: of tensors of one shape, cut into the same parts */
    Job *jobs[JOBS];
    int64_t count, number, stage, next; /* jobs; parts; the stage that is done now, and its next part */
} Work;

typedef struct { /* what a thread works in; a vector more than a block, for the zeros behind the last element */
    double actual[BLOCK + 8], expected[BLOCK + 8], diff[BLOCK + 8];
    double diff2[BLOCK + 8], actual2[BLOCK + 8], expected2[BLOCK + 8], dot[BLOCK + 8], distance[BLOCK + 8];
    int32_t bins[BLOCK];
    uint32_t tables[TABLES][BINS];
} __attribute__((aligned(64))) Room;

int64_t harness_sizes(int64_t which)
{
    return which == 0 ? sizeof(Job) : which == 1 ? sizeof(Part) : which == 2 ? sizeof(Row) : sizeof(Work);
}

/* -------- expected alone: its range, its size, its fill value */

static void survey(const Job *job, int64_t start, int64_t stop, Part *part, Room *room)
{
    double *x = room->expected;
    part->low = INFINITY, part->high = -INFINITY;
    for (int64_t n; start < stop; start += n) {
        n = stop - start < BLOCK ? stop - start : BLOCK;
        load(x, job->expected, job->expected_kind, start, n);
        vec square = all(0), low = all(INFINITY), high = all(-INFINITY);
        for (int64_t i = 0; i < n; i += LANES) {
            vec v = *(vec *)(x + i);
            square += v * v;
            low = either((ints)(v < low), v, low), high = larger(v, high);
        }
        double squares = sum(square);
        int64_t finite = n;
        if (!isfinite(squares)) {
            squares = 0, finite = 0;
            for (int64_t i = 0; i < n; i++) {
                if (isfinite(x[i]))
                    squares += x[i] * x[i], finite++;
                else if (isnan(x[i]))
                    part->low = NAN;
            }
        }
        part->square += squares, part->finite += finite;
        double least = -largest(-low), most = largest(high);
        part->low = least < part->low ? least : part->low; /* stays NaN */
        part->high = most > part->high ? most : part->high;
    }
}

/* The squares without the candidate for a fill value. Returns whether the rest is too large for it to be one. */
static int look_for_fill(const Job *job, int64_t start, int64_t stop, Part *part, Room *room)
{
    double *x = room->expected;
    part->square = 0;
    for (int64_t n; start < stop; start += n) {
        n = stop - start < BLOCK ? stop - start : BLOCK;
        load(x, job->expected, job->expected_kind, start, n);
        vec square = all(0), rest = all(0);
        ints filled = {0};
        for (int64_t i = 0; i < n; i += LANES) {
            vec v = *(vec *)(x + i);
            ints same = (ints)(v == job->fill);
            filled -= same;
            v = (vec)(~same & (ints)v);
            square += v * v;
            rest = larger(size_of(v), rest);
        }
        part->square += sum(square), part->filled += total(filled);
        double most = largest(rest);
        part->rest = most > part->rest ? most : part->rest;
        if (part->rest * 1e3 > fabs(job->fill))
            return 1;
    }
    return 0;
}

/* -------- rows */

static void row_sums(const double *d, const double *a, const double *e, int64_t width, double result[4])
{
    vec diff2 = all(0), actual2 = all(0), expected2 = all(0), dot = all(0);
    double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        vec x = *(const loose *)(d + i), y = *(const loose *)(a + i), z = *(const loose *)(e + i);
        diff2 += x * x, actual2 += y * y, expected2 += z * z, dot += y * z;
    }
    for (; i < width; i++)
        s0 += d[i] * d[i], s1 += a[i] * a[i], s2 += e[i] * e[i], s3 += a[i] * e[i];
    if (width >= LANES)
        s0 += sum(diff2), s1 += sum(actual2), s2 += sum(expected2), s3 += sum(dot);
    result[0] = s0, result[1] = s1, result[2] = s2, result[3] = s3;
}

/* The first of the largest elements; a NaN is larger than any. */
static int64_t argmax(const double *x, int64_t width, int finite)
{
    int64_t at = 0, i = 1;
    if (!finite) {
        for (i = 0; i < width; i++)
            if (isnan(x[i]))
                return i;
        i = 1;
    } else if (width >= 16) {
        vec most = *(const loose *)x;
        ints where;
        for (int lane = 0; lane < LANES; lane++)
            where[lane] = lane;
        ints now = where + LANES;
        for (i = LANES; i + LANES <= width; i += LANES, now += LANES) {
            vec v = *(const loose *)(x + i);
            ints more = (ints)(v > most);
            most = either(more, v, most), where = (more & now) | (~more & where);
        }
        at = where[0];
        for (int lane = 1; lane < LANES; lane++)
            if (most[lane] > x[at] || (most[lane] == x[at] && where[lane] < at))
                at = where[lane];
    }
    for (; i < width; i++)
        if (x[i] > x[at])
            at = i;
    return at;
}

/* Put what a piece says of the largest elements to what earlier ones of its row did; `next` is behind them. */
static void add_tops(Row *row, const Row *next)
{
    if (row->actual_at < 0 || next->actual_top > row->actual_top ||
        (isnan(next->actual_top) && !isnan(row->actual_top)))
        row->actual_top = next->actual_top, row->actual_at = next->actual_at,
        row->expected_there = next->expected_there;
    if (row->expected_at < 0 || next->expected_top > row->expected_top ||
        (isnan(next->expected_top) && !isnan(row->expected_top)))
        row->expected_top = next->expected_top, row->expected_at = next->expected_at;
}

static void find_tops(Row *row, const double *a, const double *e, int64_t start, int64_t width, int finite)
{
    int64_t left = argmax(a, width, finite), right = argmax(e, width, finite);
    Row next = {.actual_top = a[left], .expected_top = e[right], .expected_there = e[left],
                .actual_at = start + left, .expected_at = start + right};
    add_tops(row, &next);
}

/* Count a row whose largest element is another one. */
static void add_flip(Part *part, const Row *row, int64_t number)
{
    double gap = row->actual_at == row->expected_at ? 0 : row->expected_top - row->expected_there;
    part->flips += gap > 0; /* not where it is NaN */
    if (gap > part->flip_margin)
        part->flip_margin = gap, part->first_flip = number, part->flip_value = row->expected_top;
}

static double cos_distance(double diff2, double actual2, double expected2, double dot)
{
    double left = sqrt(actual2), right = sqrt(expected2), product = left * right, gap = left - right;
    double plain = 1 - dot / product, near = (diff2 - gap * gap) / (2 * product);
    double distance = plain > 0.01 ? plain : near;
    distance = distance < 0 ? 0 : distance > 2 ? 2 : distance;
    return actual2 == 0 || expected2 == 0 ? actual2 != expected2 : distance;
}

/* Keep the first of the largest; a NaN is larger than any. */
static void add_token(Part *part, double diff2, double distance, int64_t row)
{
    if (part->worst_token_diff < 0 || (!(diff2 <= part->token_diff2) && !isnan(part->token_diff2)))
        part->token_diff2 = diff2, part->worst_token_diff = row;
    if (part->worst_token < 0 || (!(distance <= part->token_distance) && !isnan(part->token_distance)))
        part->token_distance = distance, part->worst_token = row;
}

static double scale_of(const Job *job, double expected2)
{
    double least = job->tokens ? job->rms / 10 : job->rms;
    double own = job->tokens ? sqrt(expected2 / (double)job->width) : least;
    return own < least ? least : own;
}

/* The largest difference over the size of the element and `scale`; nothing of nothing is passed over. */
static double scaled(const double *d, const double *e, int64_t width, double scale)
{
    vec most = all(0);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
        most = larger(size_of(*(const loose *)(d + i)) / (size_of(*(const loose *)(e + i)) + scale), most);
    double result = width >= LANES ? largest(most) : 0;
    for (; i < width; i++) {
        double quotient = fabs(d[i]) / (fabs(e[i]) + scale);
        result = quotient > result ? quotient : result;
    }
    return result;
}

/* -------- a block */

/* The differences, how many elements are unequal, and whether all of them are finite. */
static int subtract(Part *part, Room *room, int64_t n)
{
    ints unequal = {0};
    vec none = all(0);
    for (int64_t i = 0; i < n; i += LANES) {
        vec a = *(vec *)(room->actual + i), e = *(vec *)(room->expected + i), d = a - e;
        unequal -= (ints)(a != e);
        none += (a - a) + (e - e);
        *(vec *)(room->diff + i) = d;
    }
    part->unequal += total(unequal);
    return sum(none) == 0;
}

/* Count what is not finite; infinities that both sides share become zeros. */
static void add_nonfinite(Part *part, Room *room, int64_t start, int64_t n)
{
    double *a = room->actual, *e = room->expected;
    int64_t differ = 0;
    for (int64_t i = 0; i < n; i++) {
        int nan_a = a[i] != a[i], nan_e = e[i] != e[i], inf_a = fabs(a[i]) == INFINITY, inf_e = fabs(e[i]) == INFINITY;
        int shared = inf_a & (a[i] == e[i]);
        part->nan_actual += nan_a, part->nan_expected += nan_e;
        part->inf_actual += inf_a, part->inf_expected += inf_e;
        differ += (nan_a | nan_e | inf_a | inf_e) & !shared & !(nan_a & nan_e);
        if (differ && part->first_differ < 0)
            part->first_differ = start + i, part->differ_actual = a[i], part->differ_expected = e[i];
        if (shared)
            a[i] = e[i] = room->diff[i] = 0;
    }
    part->nonfinite_differ += differ;
}

static void clear_fill(const Job *job, Room *room, int64_t n)
{
    for (int64_t i = 0; i < n; i += LANES) {
        vec a = *(vec *)(room->actual + i), e = *(vec *)(room->expected + i);
        ints other = ~((ints)(a == job->fill) & (ints)(e == job->fill));
        *(vec *)(room->actual + i) = (vec)((ints)a & other), *(vec *)(room->expected + i) = (vec)((ints)e & other);
    }
}

/* Sums over all elements, and the largest difference. */
static void add_sums(Part *part, const Room *room, int64_t start, int64_t n)
{
    vec gained = all(0), shifted = all(0), abs_diff = all(0), size = all(0), most = all(0);
    ints above = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        vec d = *(vec *)(room->diff + i), e = *(vec *)(room->expected + i), m = size_of(d);
        gained += d * e, shifted += d, abs_diff += m, size += size_of(e);
        above += (ints)(d < 0) - (ints)(d > 0);
        most = larger(m, most);
    }
    double absolute = sum(abs_diff), top = largest(most);
    part->gained += sum(gained), part->shifted += sum(shifted), part->abs_diff += absolute;
    part->size += sum(size), part->above += total(above);
    if (isnan(part->max_diff) || !(top > part->max_diff || isnan(absolute)))
        return;
    for (int64_t i = 0; i < n; i++) {
        double m = fabs(room->diff[i]);
        if (isnan(absolute) ? isnan(m) : m == top) {
            part->max_diff = m, part->worst = start + i;
            part->worst_actual = room->actual[i], part->worst_expected = room->expected[i];
            return;
        }
    }
}

/* Differences against the size of what was expected, and the bins of the histogram. */
static void weigh(const Job *job, Part *part, Room *room, int64_t n, int finite)
{
    vec relative = all(0), relative_max = all(0), ulps = all(0), ulps_max = all(0);
    vec close = all(-INFINITY), dynamo = all(-INFINITY);
    ints within = {0};
    const ints exponent = (ints)all(INFINITY);
    const vec smallest = all(job->smallest);
    for (int64_t i = 0; i < n; i += LANES) {
        vec m = size_of(*(vec *)(room->diff + i)), s = size_of(*(vec *)(room->expected + i));
        vec quotient = m / (s + 1e-7);
        relative += quotient, relative_max = larger(quotient, relative_max);
        if (job->places) {
            ints place = (ints)s & exponent;
            place = (ints)((bits)either((ints)((vec)place < smallest), smallest, (vec)place) >> 52);
            ints inverse = 0x7FE - place; /* of the exponent: a product with it is the quotient, bit for bit */
            ints most = inverse == 0, infinite = inverse < 0;
            inverse = (inverse << 52) | (most & (ints)all(0x1p-1023));
            m = m * (vec)(inverse & ~infinite);
        }
        ulps += m, ulps_max = larger(m, ulps_max);
        m = size_of(*(vec *)(room->diff + i));
        vec excess = m - s * job->close_relative;
        close = larger(excess, close), within -= (ints)(excess <= job->close_absolute);
        dynamo = larger(m - s * job->dynamo_relative, dynamo);
        *(bins *)(room->bins + i) = (bins)__builtin_convertvector(m, narrow) >> 21;
    }
    double sum_relative = sum(relative), sum_ulps = sum(ulps);
#define ADD_MOST(field, value, nan)                                                                                    \
    {                                                                                                                  \
        double top = (nan) ? NAN : (value);                                                                            \
        if (!isnan(part->field) && !(top <= part->field))                                                              \
            part->field = top;                                                                                         \
    }
    part->relative += sum_relative, part->ulps += sum_ulps;
    ADD_MOST(relative_max, largest(relative_max), isnan(sum_relative))
    ADD_MOST(ulps_max, largest(ulps_max), isnan(sum_ulps))
    part->within += total(within) - (LANES - n % LANES) % LANES; /* without the zeros behind the last element */
    int close_nan = 0, dynamo_nan = 0;
    for (int64_t i = 0; !finite && i < n; i++) {
        double m = fabs(room->diff[i]), s = fabs(room->expected[i]);
        close_nan |= isnan(m - s * job->close_relative), dynamo_nan |= isnan(m - s * job->dynamo_relative);
    }
    ADD_MOST(close_excess, largest(close), close_nan)
    ADD_MOST(dynamo_excess, largest(dynamo), dynamo_nan)
    int64_t i = 0;
    for (; i + TABLES <= n; i += TABLES)
        for (int table = 0; table < TABLES; table++)
            room->tables[table][room->bins[i + table]]++;
    for (; i < n; i++)
        room->tables[0][room->bins[i]]++;
}

static void add_tables(Room *room, int64_t *histogram)
{
    for (int64_t bin = 0; bin < BINS; bin++)
        for (int table = 0; table < TABLES; table++)
            histogram[bin] += room->tables[table][bin];
    memset(room->tables, 0, sizeof room->tables);
}

/* Read `n` elements: whole rows of `width`, or a piece of one row, of which `row` carries what is known. */
static void measure(const Job *job, Part *part, Room *room, int64_t start, int64_t n, Row *row)
{
    double *a = room->actual, *e = room->expected, *d = room->diff, most = part->scaled_max;
    int64_t width = row ? n : job->width, count = n / width;
    load(a, job->actual, job->actual_kind, start, n), load(e, job->expected, job->expected_kind, start, n);
    int finite = subtract(part, room, n);
    for (int64_t r = 0; job->rows && r < count; r++) {
        Row own = {.actual_at = -1, .expected_at = -1};
        find_tops(row ? row : &own, a + r * width, e + r * width, start + r * width, width, finite);
        if (!row)
            add_flip(part, &own, start / width + r);
    }
    if (!finite)
        add_nonfinite(part, room, start, n);
    if (job->filled)
        clear_fill(job, room, n);
    add_sums(part, room, start, n);
    if (!job->brief)
        weigh(job, part, room, n, finite);
    for (int64_t r = 0; r < count; r++) {
        double sums[4];
        row_sums(d + r * width, a + r * width, e + r * width, width, sums);
        room->diff2[r] = sums[0], room->actual2[r] = sums[1], room->expected2[r] = sums[2], room->dot[r] = sums[3];
    }
    for (int64_t r = 0; row && r < count; r++) /* one */
        row->diff2 += room->diff2[r], row->actual2 += room->actual2[r], row->expected2 += room->expected2[r],
            row->dot += room->dot[r];
    for (int64_t r = 0; !row && !job->brief && r < count; r++)
        room->distance[r] = cos_distance(room->diff2[r], room->actual2[r], room->expected2[r], room->dot[r]);
    for (int64_t r = 0; !row && r < count; r++) {
        part->diff2 += room->diff2[r], part->actual2 += room->actual2[r];
        part->expected2 += room->expected2[r], part->dot += room->dot[r];
        if (!job->brief)
            add_token(part, room->diff2[r], room->distance[r], start / width + r);
    }
    for (int64_t r = 0; (!row || !job->tokens) && !job->brief && r < count; r++) {
        double top = scaled(d + r * width, e + r * width, width, scale_of(job, room->expected2[r]));
        most = top > most ? top : most;
    }
    part->scaled_max = most;
}

/* The scaled differences of a piece of a row, once its scale is known. */
static void measure_scaled(const Job *job, Part *part, Room *room, int64_t start, int64_t stop, double scale)
{
    for (int64_t n; start < stop; start += n) {
        n = stop - start < BLOCK ? stop - start : BLOCK;
        load(room->actual, job->actual, job->actual_kind, start, n);
        load(room->expected, job->expected, job->expected_kind, start, n);
        for (int64_t i = 0; i < n; i++)
            room->diff[i] = room->actual[i] - room->expected[i]; /* 0 or NaN where both share a fill or an infinity */
        double top = scaled(room->diff, room->expected, n, scale);
        part->scaled_max = top > part->scaled_max ? top : part->scaled_max;
    }
}

/* -------- parts */

/* Whether a part is a piece of a row, and no row is whole in a part. */
static int pieces(const Job *job) { return job->width > job->step; }

static int64_t pieces_of_row(const Job *job) { return (job->width + job->step - 1) / job->step; }

static int64_t start_of(const Job *job, int64_t number)
{
    if (!pieces(job))
        return number * job->step;
    return number / pieces_of_row(job) * job->width + number % pieces_of_row(job) * job->step;
}

static void clear(Part *part)
{
    memset(part, 0, sizeof *part);
    part->max_diff = -1, part->close_excess = part->dynamo_excess = -INFINITY;
    part->first_differ = part->worst_token_diff = part->worst_token = part->first_flip = -1;
    part->row.actual_at = part->row.expected_at = -1;
}

static void add_row(const Job *job, Part *part, const Row *row, int64_t number)
{
    part->diff2 += row->diff2, part->actual2 += row->actual2;
    part->expected2 += row->expected2, part->dot += row->dot;
    if (job->tokens)
        add_token(part, row->diff2, cos_distance(row->diff2, row->actual2, row->expected2, row->dot), number);
    if (job->rows)
        add_flip(part, row, number);
}

static void measure_part(const Job *job, Part *part, Room *room, int64_t start, int64_t stop)
{
    if (!pieces(job) && job->width <= BLOCK) {
        int64_t most = BLOCK / job->width * job->width;
        for (int64_t n; start < stop; start += n)
            n = stop - start < most ? stop - start : most, measure(job, part, room, start, n, NULL);
        return;
    }
    while (start < stop) {
        int64_t first = start, end = pieces(job) ? stop : start + job->width;
        Row row = {.actual_at = -1, .expected_at = -1};
        for (int64_t n; start < end; start += n)
            n = end - start < BLOCK ? end - start : BLOCK, measure(job, part, room, start, n, &row);
        if (pieces(job)) {
            part->row = row;
        } else {
            add_row(job, part, &row, first / job->width);
            if (job->tokens)
                measure_scaled(job, part, room, first, end, scale_of(job, row.expected2));
        }
    }
}

static void work_part(Job *job, int64_t number, Room *room, int64_t *histogram)
{
    Part *part = job->parts + number;
    int64_t start = start_of(job, number), stop = number + 1 < job->number ? start_of(job, number + 1) : job->count;
    if (job->stage == SURVEY) {
        clear(part);
        survey(job, start, stop, part, room);
    } else if (job->stage == FILL) {
        if (look_for_fill(job, start, stop, part, room))
            __atomic_store_n(&job->closed, 1, __ATOMIC_RELAXED); /* nobody need look on */
    } else if (job->stage == MAIN) {
        clear(part);
        measure_part(job, part, room, start, stop);
        if (!job->brief)
            add_tables(room, histogram);
    } else {
        measure_scaled(job, part, room, start, stop, part->scale);
    }
}

/* Take parts of this stage until none is left. Several threads may call it at once. */
void harness_work(Work *work)
{
    Room room;
    int64_t histograms[JOBS][BINS];
    memset(histograms, 0, work->count * sizeof *histograms);
    memset(room.tables, 0, sizeof room.tables);
    for (int64_t number; (number = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->number;)
        for (int64_t i = 0; i < work->count; i++) {
            Job *job = work->jobs[i];
            int shared = job->same >= 0 && job->stage < MAIN;
            if (job->stage == work->stage && !shared && !__atomic_load_n(&job->closed, __ATOMIC_RELAXED))
                work_part(job, number, &room, histograms[i]);
        }
    for (int64_t i = 0; i < work->count; i++)
        for (int64_t bin = 0; bin < BINS; bin++)
            if (histograms[i][bin])
                __atomic_fetch_add(work->jobs[i]->histogram + bin, histograms[i][bin], __ATOMIC_RELAXED);
}

static double root_mean(double square, int64_t count) { return count ? sqrt(square / (double)count) : 0; }

/* The range of expected says which value may be a fill value. */
static int64_t end_survey(Job *job)
{
    double low = INFINITY, high = -INFINITY, square = 0;
    int64_t finite = 0;
    for (int64_t number = 0; number < job->number; number++) {
        const Part *part = job->parts + number;
        low = isnan(part->low) || part->low < low ? part->low : low; /* stays NaN */
        high = part->high > high ? part->high : high;
        square += part->square, finite += part->finite;
    }
    job->rms = root_mean(square, finite);
    job->fill = -low > high ? low : high;
    return job->expected_kind <= BFLOAT16 && !isnan(low) && isfinite(job->fill) && job->fill != 0 ? FILL : MAIN;
}

static int64_t end_fill(Job *job)
{
    double square = 0, rest = 0;
    int64_t filled = 0;
    for (int64_t number = 0; number < job->number; number++) {
        const Part *part = job->parts + number;
        square += part->square, filled += part->filled, rest = part->rest > rest ? part->rest : rest;
    }
    job->filled = filled > 1 && rest > 0 && !(rest * 1e3 > fabs(job->fill));
    if (job->filled)
        job->rms = root_mean(square, job->count - filled);
    return MAIN;
}

#define SUM(field) all->field += part->field;
#define MOST(field)                                                                                                    \
    if (!isnan(all->field) && !(part->field <= all->field))                                                            \
        all->field = part->field;

static void add_part(Part *all, const Part *part)
{
    SUM(diff2) SUM(actual2) SUM(expected2) SUM(dot) SUM(gained) SUM(shifted) SUM(abs_diff) SUM(size)
    SUM(relative) SUM(ulps) SUM(above) SUM(unequal) SUM(within) SUM(flips) SUM(nan_actual) SUM(nan_expected)
    SUM(inf_actual) SUM(inf_expected) SUM(nonfinite_differ)
    if (!isnan(all->max_diff) && !(part->max_diff <= all->max_diff))
        all->max_diff = part->max_diff, all->worst = part->worst, all->worst_actual = part->worst_actual,
        all->worst_expected = part->worst_expected;
    if (all->first_differ < 0)
        all->first_differ = part->first_differ, all->differ_actual = part->differ_actual,
        all->differ_expected = part->differ_expected;
    MOST(close_excess) MOST(dynamo_excess) MOST(scaled_max) MOST(relative_max) MOST(ulps_max)
    if (part->worst_token_diff >= 0 && (all->worst_token_diff < 0 || (!isnan(all->token_diff2) &&
                                                                     !(part->token_diff2 <= all->token_diff2))))
        all->token_diff2 = part->token_diff2, all->worst_token_diff = part->worst_token_diff;
    if (part->worst_token >= 0 && (all->worst_token < 0 || (!isnan(all->token_distance) &&
                                                           !(part->token_distance <= all->token_distance))))
        all->token_distance = part->token_distance, all->worst_token = part->worst_token;
    if (part->flip_margin > all->flip_margin)
        all->flip_margin = part->flip_margin, all->first_flip = part->first_flip, all->flip_value = part->flip_value;
}

static int64_t end_main(Job *job)
{
    Part *all = job->parts + job->number;
    clear(all);
    for (int64_t number = 0; number < job->number; number++)
        add_part(all, job->parts + number);
    if (!pieces(job))
        return END;
    int64_t many = pieces_of_row(job);
    for (int64_t first = 0; first < job->number; first += many) {
        Row row = {.actual_at = -1, .expected_at = -1};
        for (int64_t number = first; number < first + many; number++) {
            const Row *next = &job->parts[number].row;
            row.diff2 += next->diff2, row.actual2 += next->actual2;
            row.expected2 += next->expected2, row.dot += next->dot;
            if (job->rows)
                add_tops(&row, next);
        }
        add_row(job, all, &row, first / many);
        for (int64_t number = first; number < first + many; number++)
            job->parts[number].scale = scale_of(job, row.expected2);
    }
    return job->tokens && !job->brief ? WIDE : END;
}

static int64_t end_wide(Job *job)
{
    Part *all = job->parts + job->number;
    for (int64_t number = 0; number < job->number; number++) {
        const Part *part = job->parts + number;
        MOST(scaled_max)
    }
    return END;
}

static void advance(Job *job)
{
    int64_t stage = job->stage;
    job->stage = stage == SURVEY ? end_survey(job) : stage == FILL ? end_fill(job) : stage == MAIN ? end_main(job)
                                                                                                    : end_wide(job);
    job->closed = 0;
    if (job->stage == END && isnan(job->parts[job->number].abs_diff))
        job->parts[job->number].scaled_max = NAN;
}

/* Put together what the parts gave, once every thread is back, and say whether `harness_work` has more to do. A job that
   is ahead waits for the others, so that all are in the same stage. */
int64_t harness_advance(Work *work)
{
    int64_t least = END;
    for (int64_t i = 0; i < work->count; i++) {
        Job *job = work->jobs[i];
        if (job->stage == work->stage && job->same >= 0 && job->stage < MAIN) {
            const Job *first = work->jobs[job->same];
            job->stage = first->stage, job->rms = first->rms, job->fill = first->fill, job->filled = first->filled;
        } else if (job->stage == work->stage) {
            advance(job);
        }
        least = job->stage < least ? job->stage : least;
    }
    work->stage = least, work->next = 0;
    return least != END;
}

/* All of it in this thread. */
void harness_compare(Work *work)
{
    do
        harness_work(work);
    while (harness_advance(work));
}
