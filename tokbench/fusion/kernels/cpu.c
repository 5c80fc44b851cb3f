// The kernels of cpu.py, which says what each computes. All is float32; torch makes the products of matrices.
// Images are shared between the threads that torch uses.

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { DONE, NO_TOKEN, ALONE = 1 << 15 };  // ALONE: so many numbers are not worth waking a thread for
typedef int64_t count;

// Unlike fmaxf, which treats NaN apart, this becomes one instruction for many numbers.
static inline float larger(float a, float b) { return a > b ? a : b; }

// e^x for x ≤ 0, to about 10⁻⁷: 2^(n + f), n whole and |f| ≤ 1/2.
static inline float exponential(float x)
{
    const float t = x * 1.44269504f;
    const int32_t n = (int32_t)(t - 0.5f), all = -!(t < -126);  // a mask, for a branch would keep this out of vectors
    int32_t bits = (n + 127) << 23;
    const float f = t - n;
    float power;
    memcpy(&power, &bits, sizeof power);
    power *= 1 + f * (0.693147182f + f * (0.240226462f + f * (0.0555041373f + f * (0.00961803221f
             + f * (0.00133276579f + f * 0.000155105107f)))));
    memcpy(&bits, &power, sizeof bits);
    bits &= all;
    memcpy(&power, &bits, sizeof power);
    return power;
}

// A whole number in the order of floats; NaN is beyond all others, and equals itself.
static inline int32_t order(float score)
{
    int32_t bits;
    memcpy(&bits, &score, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// How many keys come before key m: larger ones, and equal ones further left.
static count rank(const int32_t *key, count keys, count m)
{
    int32_t before = 0;
    for (count o = 0; o < m; o++) before += key[o] >= key[m];
    for (count o = m + 1; o < keys; o++) before += key[o] > key[m];
    return before;
}

static float length_of(const float *token, count channels)
{
    float square = 0;
    for (count c = 0; c < channels; c++) square += token[c] * token[c];
    return sqrtf(square);
}

void mean_heads(const float *keys, count images, count heads, count tokens, count channels, count image_step,
                count head_step, count token_step, float *out)
{
#pragma omp parallel for collapse(2) if (images * heads * tokens * channels > ALONE)
    for (count i = 0; i < images; i++)
        for (count n = 0; n < tokens; n++) {
            const float *key = keys + i * image_step + n * token_step;
            float *restrict mean = out + (i * tokens + n) * channels;
            for (count c = 0; c < channels; c++) mean[c] = key[c];
            for (count h = 1; h < heads; h++)
                for (count c = 0; c < channels; c++) mean[c] += key[h * head_step + c];
            for (count c = 0; c < channels; c++) mean[c] /= heads;
        }
}

void unit(const float *x, count images, count tokens, count channels, count image_step, count token_step, float *out)
{
#pragma omp parallel for collapse(2) if (images * tokens * channels > ALONE)
    for (count i = 0; i < images; i++)
        for (count n = 0; n < tokens; n++) {
            const float *token = x + i * image_step + n * token_step;
            const float length = larger(length_of(token, channels), 1e-12f);
            float *restrict row = out + (i * tokens + n) * channels;
            for (count c = 0; c < channels; c++) row[c] = token[c] / length;
        }
}

// One image's proposals: see best_proposals in cpu.py. Scores become whole numbers where they are. Sets begin at tokens a
// and b, and have every other one; `goes` and `joins` have forth + back places.
static void propose(float *scores, count as, count bs, count prefix, count a, count b, count forth, count back,
                    int by_score, const float *alone, int64_t *stays, int64_t *goes, int64_t *joins)
{
    int32_t *keys = (int32_t *)scores, best[as], partner[as], best_back[bs], partner_back[bs];
    const count left = prefix + as - forth;
    count place[as], place_back[bs], next = prefix;
    float own[bs];
    for (count n = 0; n < bs && alone; n++) own[n] = alone[b + 2 * n];
    for (count m = 0; m < as; m++) {
        float *score = scores + m * bs;
        int32_t *key = keys + m * bs, top = INT32_MIN, where = 0;
        const float factor = alone ? alone[a + 2 * m] : 1;
        for (count n = 0; n < bs && alone; n++) score[n] = larger((score[n] + 1) / 2, 0) * factor * own[n];
        for (count n = 0; n < bs; n++) {
            key[n] = order(score[n]);
            top = key[n] > top ? key[n] : top;
        }
        while (key[where] != top) where++;
        best[m] = top, partner[m] = where;
    }
    for (count n = 0; n < prefix; n++) stays[n] = n;
    for (count m = 0; m < as; m++) {
        const count at = rank(best, as, m);
        place[m] = at < forth ? -1 : by_score ? prefix + at - forth : next++;
        if (at < forth) goes[at] = a + 2 * m, joins[at] = partner[m];
        else stays[place[m]] = a + 2 * m;
    }
    for (count n = 0; n < bs; n++) best_back[n] = INT32_MIN, partner_back[n] = -1;
    for (count m = 0; m < as && back; m++) {
        if (place[m] < 0) continue;
        for (count n = 0; n < bs; n++) {
            const int more = keys[m * bs + n] > best_back[n] || partner_back[n] < 0;
            partner_back[n] = more ? (int32_t)place[m] : partner_back[n];
            best_back[n] = more ? keys[m * bs + n] : best_back[n];
        }
    }
    for (count n = 0; n < bs; n++) {
        const count at = back ? rank(best_back, bs, n) : n;
        place_back[n] = at < back ? partner_back[n] : left + at - back;
        if (at < back) goes[forth + at] = b + 2 * n, joins[forth + at] = place_back[n];
        else stays[place_back[n]] = b + 2 * n;
    }
    for (count at = 0; at < forth; at++) joins[at] = place_back[joins[at]];
}

void best_proposals(float *scores, count images, count tokens, count prefix, count forth, count back,
                    const float *alone, int64_t *kept, int64_t *source, int64_t *slot)
{
    const count a = prefix + prefix % 2, b = prefix + 1 - prefix % 2, r = forth + back;
    const count as = (tokens - a + 1) / 2, bs = (tokens - b + 1) / 2;
#pragma omp parallel for if (images > 1)
    for (count i = 0; i < images; i++)
        propose(scores + i * as * bs, as, bs, prefix, a, b, forth, back, 0, alone ? alone + i * tokens : 0,
                kept + i * (tokens - r), source + i * r, slot + i * r);
}

void by_energy(const float *cosine, count images, count patches, count prefix, count r, count matched, float margin,
               float *room, int64_t *kept, int64_t *source, int64_t *slot)
{
    const count as = (matched + 1) / 2, bs = matched / 2, outputs = prefix + patches - r, apart = patches - matched;
#pragma omp parallel for if (images > 1)
    for (count i = 0; i < images; i++) {
        const float *line = cosine + i * patches * patches;
        float sum[patches];
        int32_t energy[patches];
        count sorted[patches];
        for (count m = 0; m < patches; m++) sum[m] = larger(1 - margin, 0) + exponential(-larger(margin - 1, 0)) - 1;
        for (count m = 0; m < patches; m++, line += patches) {
            float own = 0;
            for (count n = m + 1; n < patches; n++) {  // both ways alike
                const float z = line[n] - margin, elu = larger(z, 0) + exponential(z - larger(z, 0)) - 1;
                own += elu, sum[n] += elu;
            }
            energy[m] = order(sum[m] + own);
        }
        for (count m = 0; m < patches; m++) sorted[rank(energy, patches, m)] = m;
        line = cosine + i * patches * patches;
        float *scores = room + i * as * bs;
        for (count m = 0; m < as; m++)
            for (count n = 0; n < bs; n++) scores[m * bs + n] = line[sorted[2 * m] * patches + sorted[2 * n + 1]];
        int64_t *stays = kept + i * outputs, *goes = source + i * r, *joins = slot + i * r;
        propose(scores, as, bs, 0, 0, 1, r, 0, 1, 0, stays + prefix + apart, goes, joins);
        for (count n = 0; n < prefix; n++) stays[n] = n;
        for (count n = 0; n < apart; n++) stays[prefix + n] = prefix + sorted[matched + n];
        for (count n = prefix + apart; n < outputs; n++) stays[n] = prefix + sorted[stays[n]];
        for (count n = 0; n < r; n++) goes[n] = prefix + sorted[goes[n]], joins[n] += prefix + apart;
    }
}

void softmax(float *logits, count images, count heads, count tokens, float scale, const float *log_size, float *received)
{
#pragma omp parallel for
    for (count h = 0; h < images * heads; h++) {
        float *sum = received + h * tokens, bias[tokens];
        for (count n = 0; n < tokens; n++) sum[n] = 0, bias[n] = log_size ? log_size[h / heads * tokens + n] : 0;
        for (count row = 0; row < tokens; row++) {
            float *restrict line = logits + (h * tokens + row) * tokens, most = -INFINITY, total = 0;
            for (count n = 0; n < tokens; n++) {
                line[n] = line[n] * scale + bias[n];
                most = larger(line[n], most);
            }
            for (count n = 0; n < tokens; n++) total += line[n] = exponential(line[n] - most);
            for (count n = 0; n < tokens; n++) sum[n] += line[n] *= 1 / total;
        }
        for (count n = 0; n < tokens; n++) sum[n] /= heads * tokens;
    }
}

void criteria(const float *received, const float *size, count images, count tokens, float tau_info, float tau_size,
              float *alone, float *weight)
{
    for (count i = 0; i < images; i++, received += tokens, alone += tokens, weight += tokens, size += size ? tokens : 0) {
        float most = 0, largest = 0, rarest = 0;
        for (count n = 0; n < tokens; n++) {
            weight[n] = larger(received[n], 1e-30f), alone[n] = 1 / weight[n];
            most = larger(alone[n], most);
            if (size) largest = larger(size[n], largest), rarest = larger(1 / size[n], rarest);
        }
        for (count n = 0; n < tokens; n++) {
            alone[n] = powf(alone[n] / most, 1 / tau_info);
            if (size) alone[n] *= powf(1 / size[n] / rarest, 1 / tau_size), weight[n] *= size[n] / largest;
        }
    }
}

static int within(const int64_t *index, count number, count end)
{
    uint64_t largest = 0;
    for (count n = 0; n < number; n++) largest = (uint64_t)index[n] > largest ? (uint64_t)index[n] : largest;
    return number == 0 || largest < (uint64_t)end;
}

int join(const float *x, count images, count tokens, count channels, count image_step, count token_step,
         const int64_t *kept, count outputs, const int64_t *source, const int64_t *slot, count merged,
         const float *weight, const float *counted, int longest, float *out, float *total)
{
    if (!within(kept, images * outputs, tokens) || !within(source, images * merged, tokens)
        || !within(slot, images * merged, outputs))
        return NO_TOKEN;
#pragma omp parallel for if (images > 1)
    for (count i = 0; i < images; i++) {
        const float *in = x + i * image_step, *w = weight + i * tokens, *of = counted + i * tokens;
        const int64_t *stay = kept + i * outputs, *from = source + i * merged, *to = slot + i * merged;
        float *all = total + i * outputs, *rows = out + i * outputs * channels, sum[outputs], length[outputs];
        memset(length, 0, sizeof length);
        for (count m = 0; m < outputs; m++) {
            sum[m] = w[stay[m]], all[m] = of[stay[m]];
            memcpy(rows + m * channels, in + stay[m] * token_step, channels * sizeof *rows);
        }
        for (count m = 0; m < merged; m++) sum[to[m]] += w[from[m]], all[to[m]] += of[from[m]];
        for (count m = 0; m < merged; m++) {
            const float share = w[from[m]] / sum[to[m]];
            const float *more = in + from[m] * token_step, *own = in + stay[to[m]] * token_step;
            float *restrict row = rows + to[m] * channels;
            for (count c = 0; c < channels; c++) row[c] += (more[c] - own[c]) * share;
            if (longest)
                length[to[m]] = larger(length[to[m]], larger(length_of(own, channels), length_of(more, channels)));
        }
        for (count m = 0; m < outputs; m++) {
            float *row = rows + m * channels;
            const float now = length[m] ? larger(length_of(row, channels), 1.17549435e-38f) : 0;
            for (count c = 0; c < channels && length[m]; c++) row[c] = row[c] / now * length[m];
        }
    }
    return DONE;
}
