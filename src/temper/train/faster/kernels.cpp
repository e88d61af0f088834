// What training a decoder on a CPU does between its matrix products, each in one pass over memory.
//
// Vectors are GCC's, so one text serves AVX-512, AVX2 and NEON. Numbers are stored as T (float or bf16) and computed in float. A
// row, a block of rows or a head of a sequence is always computed by one thread in one order: results do not depend on threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats of a vector
constexpr int MR = 8;  // rows of a tile whose sums stay in registers
#else
constexpr int W = 8;
constexpr int MR = 4;
#endif
constexpr int NR = 2 * W;  // columns of a tile

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ints __attribute__((vector_size(4 * W)));
typedef uint32_t words __attribute__((vector_size(4 * W)));
typedef uint16_t halves __attribute__((vector_size(2 * W)));
typedef int64_t Int;
using Whole = std::integral_constant<int, W>;  // a vector's worth of numbers, known when compiled

struct bf16 {
    uint16_t bits;
};

// n numbers, the rest of the vector 0.
template <class N> inline vec load(const float* p, N n) {
    vec v{};
    std::memcpy(&v, p, n * sizeof(float));
    return v;
}
template <class N> inline vec load(const bf16* p, N n) {
    halves h{};
    std::memcpy(&h, p, n * sizeof(bf16));
    return (vec)(__builtin_convertvector(h, words) << 16);
}

template <class N> inline void store(float* p, vec v, N n) { std::memcpy(p, &v, n * sizeof(float)); }
template <class N> inline void store(bf16* p, vec v, N n) {
    words u = (words)v;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to the nearest, ties to even
    halves h = __builtin_convertvector(u, halves);
    std::memcpy(p, &h, n * sizeof(bf16));
}

// f(place, how many) over n numbers, a vector at a time and then the rest.
template <class F> inline void across(Int n, F f) {
    Int j = 0;
    for (; j + W <= n; j += W) f(j, Whole{});
    if (j < n) f(j, n - j);
}

inline float sum(vec v) {
    float s = 0;
    for (int i = 0; i < W; i++) s += v[i];
    return s;
}
inline float greatest(vec v) {
    float s = v[0];
    for (int i = 1; i < W; i++) s = std::max(s, v[i]);
    return s;
}
inline vec all(float x) { return vec{} + x; }

// 2^x to 2e-7 of it: x = whole + rest, |rest| <= 1/2, Taylor's series of the rest, the whole added to the exponent.
inline vec exp2(vec x) {
    x = x < -126.f ? all(-126.f) : x;
    x = x > 127.f ? all(127.f) : x;
    vec whole = (x + 12582912.f) - 12582912.f;
    vec r = (x - whole) * 0.693147180559945f;
    vec p = all(1.f / 5040);
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    return (vec)((ints)p + (__builtin_convertvector(whole, ints) << 23));
}
constexpr float LOG2E = 1.442695040888963f, LN2 = 0.693147180559945f;

// ------------------------------------------------------------------------------------------------ pointwise

template <class T> void add(const float* x, const T* y, float* out, Int n, int threads) {
    const Int piece = 4096;
#pragma omp parallel for num_threads(threads)
    for (Int start = 0; start < n; start += piece)
        across(std::min(piece, n - start), [&](Int j, auto m) {
            j += start;
            store(out + j, load(x + j, m) + load(y + j, m), m);
        });
}

// h = x rsqrt(mean(x^2) + eps) (weight + offset); the inverse root is kept where `rstd` is given, or taken from it.
template <class T>
void norm(const float* x, const float* weight, T* h, float* rstd, Int rows, Int width, Int again, double eps, double offset, int threads) {
#pragma omp parallel for num_threads(threads)
    for (Int i = 0; i < rows; i++) {
        const float* from = x + i * width;
        if (!again) {
            vec squares{};
            across(width, [&](Int j, auto m) { vec v = load(from + j, m); squares += v * v; });
            rstd[i] = 1 / std::sqrt(sum(squares) / width + (float)eps);
        }
        const float r = rstd[i];
        across(width, [&](Int j, auto m) { store(h + i * width + j, load(from + j, m) * r * (load(weight + j, m) + (float)offset), m); });
    }
}

// dx = dout + the gradient through the norm; dweight gets a row of sums for every block of `block` rows.
template <class T>
void norm_backward(const float* x, const float* rstd, const float* weight, const T* dh, const float* dout, float* dx, float* dweight,
                   Int rows, Int width, Int block, double offset, int threads) {
#pragma omp parallel for num_threads(threads)
    for (Int b = 0; b < (rows + block - 1) / block; b++) {
        float* dw = dweight + b * width;
        std::fill(dw, dw + width, 0.f);
        for (Int i = b * block; i < std::min(rows, (b + 1) * block); i++) {
            const float r = rstd[i];
            const Int at = i * width;
            vec dots{};
            across(width, [&](Int j, auto m) {
                vec n = load(x + at + j, m) * r, g = load(dh + at + j, m);
                store(dw + j, load(dw + j, m) + g * n, m);
                dots += g * n * (load(weight + j, m) + (float)offset);
            });
            const float mean = sum(dots) / width;
            across(width, [&](Int j, auto m) {
                vec n = load(x + at + j, m) * r, g = load(dh + at + j, m) * (load(weight + j, m) + (float)offset);
                store(dx + at + j, load(dout + at + j, m) + (g - n * mean) * r, m);
            });
        }
    }
}

// The activation of a gated MLP and its slope.
struct Silu {
    static inline void both(vec x, vec& y, vec& slope) {
        vec s = 1.f / (1.f + exp2(x * -LOG2E));
        y = x * s;
        slope = s * (1.f + x * (1.f - s));
    }
};
struct GeluTanh {
    static inline void both(vec x, vec& y, vec& slope) {
        const float c = 0.7978845608028654f, k = 0.044715f;
        vec u = c * (x + k * x * x * x);
        vec t = 1.f - 2.f / (1.f + exp2(u * (2 * LOG2E)));
        y = 0.5f * x * (1.f + t);
        slope = 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * c * (1.f + 3 * k * x * x);
    }
};

// made = act(gate) up; gate and up stand side by side in a row of `both`.
template <class Act, class T> void gate(const T* both, T* made, Int rows, Int width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (Int i = 0; i < rows; i++) {
        const T* row = both + i * 2 * width;
        across(width, [&](Int j, auto m) {
            vec y, slope;
            Act::both(load(row + j, m), y, slope);
            store(made + i * width + j, y * load(row + width + j, m), m);
        });
    }
}

// The gradient of `both`; `dmade` is overwritten by `made`, which the next product needs.
template <class Act, class T> void gate_backward(const T* both, T* dmade, T* dboth, Int rows, Int width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (Int i = 0; i < rows; i++) {
        const T* row = both + i * 2 * width;
        T *d = dboth + i * 2 * width, *g = dmade + i * width;
        across(width, [&](Int j, auto m) {
            vec y, slope, up = load(row + width + j, m), grad = load(g + j, m);
            Act::both(load(row + j, m), y, slope);
            store(d + j, grad * up * slope, m);
            store(d + width + j, grad * y, m);
            store(g + j, y * up, m);
        });
    }
}

inline words mix(words x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// made = x scale where the hash of its place is at least `least`, else 0.
template <class T> void drop(const T* x, T* made, Int n, uint32_t low, uint32_t high, uint32_t least, float scale, int threads) {
    words place{};
    for (int k = 0; k < W; k++) place[k] = k;
    const Int piece = 4096;
#pragma omp parallel for num_threads(threads)
    for (Int start = 0; start < n; start += piece)
        across(std::min(piece, n - start), [&](Int j, auto m) {
            j += start;
            store(made + j, mix(mix(place + (uint32_t)j + low) ^ high) >= least ? load(x + j, m) * scale : vec{}, m);
        });
}

// logprobs = log softmax(logits)[target]; with `slopes`, logits are overwritten by slope (onehot(target) - softmax(logits)).
template <class T>
void cross(T* logits, const Int* targets, const float* slopes, float* logprobs, Int rows, Int width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (Int i = 0; i < rows; i++) {
        T* row = logits + i * width;
        vec top = all(-std::numeric_limits<float>::infinity());
        across(width, [&](Int j, auto m) {
            vec v = load(row + j, m);
            if (m < W) for (int k = m; k < W; k++) v[k] = -std::numeric_limits<float>::infinity();
            top = v > top ? v : top;
        });
        const float most = greatest(top);
        vec total{};
        across(width, [&](Int j, auto m) {
            vec e = exp2((load(row + j, m) - most) * LOG2E);
            if (m < W) for (int k = m; k < W; k++) e[k] = 0;
            total += e;
        });
        const float all_of = sum(total), log = most + std::log(all_of);
        const float found = load(row + targets[i], 1)[0] - log;
        logprobs[i] = found;
        if (!slopes) continue;
        const float s = slopes[i], share = -s / all_of;
        across(width, [&](Int j, auto m) { store(row + j, exp2((load(row + j, m) - most) * LOG2E) * share, m); });
        store(row + targets[i], all(s - s * std::exp(found)), 1);
    }
}

// ------------------------------------------------------------------------------------------------ attention

// c = a b, or c += a b, for a tile of MR x NR: a[i * am + k * ak], b[k * bk + j], c[i * cm + j].
template <bool Add> inline void tile(const float* a, Int am, Int ak, const float* b, Int bk, float* c, Int cm, Int depth) {
    vec s[MR][2];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
        s[i][0] = Add ? load(c + i * cm, Whole{}) : vec{};
        s[i][1] = Add ? load(c + i * cm + W, Whole{}) : vec{};
    }
    for (Int k = 0; k < depth; k++) {
        const vec b0 = load(b + k * bk, Whole{}), b1 = load(b + k * bk + W, Whole{});
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
            const float x = a[i * am + k * ak];
            s[i][0] += x * b0;
            s[i][1] += x * b1;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
        store(c + i * cm, s[i][0], Whole{});
        store(c + i * cm + W, s[i][1], Whole{});
    }
}

inline Int up(Int n, Int step) { return (n + step - 1) / step * step; }

}  // namespace

extern "C" {

// Tokens of several sequences one after the other; token i sees the keys first[i] <= j < last[i], all of its own sequence.
// q, k, v: the numbers of token i and head h begin at i * token + h * head. cos, sin: [tokens, size] or null. q_weight, k_weight:
// [size], of a norm of each head before it is rotated, or null.
struct Attention {
    const void *q, *k, *v, *o, *dout;
    void *dq, *dk, *dv;
    const float *cos, *sin, *q_weight, *k_weight;
    float *lse, *dq_weight, *dk_weight;
    const int32_t *first, *last, *begins;
    Int q_token, q_head, k_token, k_head, v_token, v_head, sequences, tokens, heads, kv_heads, size, threads;
    double scale, eps, offset;
};
}

namespace {

constexpr int QB = 32;  // queries at a time

// Asks for what is read some rows later: rows lie too far apart for the processor to guess.
template <class T> inline void ahead(const T* p, Int n) {
    for (Int j = 0; j < n; j += 64 / sizeof(T)) __builtin_prefetch(p + j);
}
constexpr Int AHEAD = 8;

// One head of one token: normalised and rotated.
template <class T> void read(float* to, const T* from, const Attention& a, Int token, const float* weight) {
    const Int n = a.size, half = n / 2;
    float x[512];
    float* into = a.cos ? x : to;
    vec squares{};
    across(n, [&](Int j, auto m) { vec v = load(from + j, m); squares += v * v; store(into + j, v, m); });
    if (weight) {
        const float r = 1 / std::sqrt(sum(squares) / n + (float)a.eps);
        across(n, [&](Int j, auto m) { store(into + j, load(into + j, m) * r * (load(weight + j, m) + (float)a.offset), m); });
    }
    if (!a.cos) return;
    const float *cos = a.cos + token * n, *sin = a.sin + token * n;
    across(half, [&](Int j, auto m) {
        vec low = load(x + j, m), high = load(x + half + j, m);
        store(to + j, low * load(cos + j, m) - high * load(sin + j, m), m);
        store(to + half + j, high * load(cos + half + j, m) + low * load(sin + half + j, m), m);
    });
}

// The gradient of what `read` gives, times `factor`, taken back to what it read.
template <class T>
void write_back(T* to, float* g, float factor, const T* from, const Attention& a, Int token, const float* weight, float* dweight) {
    const Int n = a.size, half = n / 2;
    float x[512];
    if (a.cos) {
        const float *cos = a.cos + token * n, *sin = a.sin + token * n;
        across(half, [&](Int j, auto m) {
            vec low = load(g + j, m) * factor, high = load(g + half + j, m) * factor;
            store(x + j, low * load(cos + j, m) + high * load(sin + half + j, m), m);
            store(x + half + j, high * load(cos + half + j, m) - low * load(sin + j, m), m);
        });
    } else
        across(n, [&](Int j, auto m) { store(x + j, load(g + j, m) * factor, m); });
    if (weight) {
        vec squares{}, dots{};
        across(n, [&](Int j, auto m) { vec v = load(from + j, m); squares += v * v; });
        const float r = 1 / std::sqrt(sum(squares) / n + (float)a.eps);
        across(n, [&](Int j, auto m) {
            vec h = load(from + j, m) * r, d = load(x + j, m);
            store(dweight + j, load(dweight + j, m) + d * h, m);
            d *= load(weight + j, m) + (float)a.offset;
            dots += d * h;
            store(x + j, d, m);
        });
        const float mean = sum(dots) / n;
        across(n, [&](Int j, auto m) { store(x + j, (load(x + j, m) - load(from + j, m) * r * mean) * r, m); });
    }
    across(n, [&](Int j, auto m) { store(to + j, load(x + j, m), m); });
}

// A thread's workspace, which grows to what is asked and stays.
struct Space {
    std::vector<float> held;
    size_t used = 0;
    void begin(size_t n) { used = 0; if (held.size() < n) held.resize(n); }
    float* take(size_t n) { float* p = held.data() + used; used += n; return p; }
};
inline Space& space() { static thread_local Space s; return s; }

// to[panel][d][NR] <- row[d] of column `at`.
inline void turn(float* to, const float* row, Int at, Int n) {
    float* p = to + at / NR * n * NR + at % NR;
    for (Int d = 0; d < n; d++) p[d * NR] = row[d];
}

// S = q k^T of a block of queries, then 2^(S - most) where a query sees the key, and 0 elsewhere.
struct Block {
    Int start, rows, from, to;  // queries, keys (multiples of NR, counted within the sequence)
    Int padded() const { return up(rows, MR); }
    Int wide() const { return to - from; }
    Block(const Attention& a, Int begin, Int end, Int start) : start(start), rows(std::min<Int>(QB, end - start)), from(end), to(begin) {
        for (Int i = start; i < start + rows; i++)
            if (a.last[i] > a.first[i]) from = std::min<Int>(from, a.first[i]), to = std::max<Int>(to, a.last[i]);
        if (to <= from) from = to = begin;
        from = (from - begin) / NR * NR;
        to = up(to - begin, NR);
    }
};

inline void product(const float* q, const float* turned, float* s, const Block& b, Int size, Int n) {
    for (Int p = b.from; p < b.to; p += NR)
        for (Int i = 0; i < b.padded(); i += MR) tile<false>(q + i * n, n, 1, turned + p * n, NR, s + i * b.wide() + p - b.from, b.wide(), size);
}

// Rows of s within what query i sees, as vectors: f(place, vector of whether seen).
template <class F> inline void seen(const Attention& a, const Block& b, Int begin, Int i, F f) {
    const Int lo = a.first[i] - begin - b.from, hi = a.last[i] - begin - b.from;
    ints place{};
    for (int k = 0; k < W; k++) place[k] = k;
    for (Int j = 0; j < b.wide(); j += W) f(j, (place + (int)j >= (int)lo) & (place + (int)j < (int)hi));
}

template <class T> void attend(const Attention& a, Int sequence, Int kv) {
    const T *Q = (const T*)a.q, *K = (const T*)a.k, *V = (const T*)a.v;
    T* O = (T*)a.o;
    const Int begin = a.begins[sequence], end = a.begins[sequence + 1], length = up(end - begin, NR), n = up(a.size, NR), group = a.heads / a.kv_heads;
    Space& room = space();
    room.begin(2 * length * n + QB * (2 * n + length) + n);
    float *turned = room.take(length * n), *values = room.take(length * n), *q = room.take(QB * n), *o = room.take(QB * n), *s = room.take(QB * length), *row = room.take(n);
    std::fill(turned, turned + 2 * length * n, 0.f);
    for (Int i = begin; i < end; i++) {
        const T *k = K + i * a.k_token + kv * a.k_head, *v = V + i * a.v_token + kv * a.v_head;
        ahead(k + AHEAD * a.k_token, a.size);
        ahead(v + AHEAD * a.v_token, a.size);
        read(row, k, a, i, a.k_weight);
        turn(turned, row, i - begin, n);
        across(a.size, [&](Int j, auto m) { store(values + (i - begin) * n + j, load(v + j, m), m); });
    }
    for (Int start = begin; start < end; start += QB) {
        const Block b(a, begin, end, start);
        const Int wide = b.wide();
        for (Int h = kv * group; h < (kv + 1) * group; h++) {
            for (Int i = 0; i < b.padded(); i++) {
                float* to = q + i * n;
                if (i < b.rows) {
                    const T* from = Q + (start + i) * a.q_token + h * a.q_head;
                    ahead(from + AHEAD * a.q_token, a.size);
                    read(to, from, a, start + i, a.q_weight);
                    for (Int j = 0; j < a.size; j++) to[j] *= (float)a.scale * LOG2E;
                } else std::fill(to, to + n, 0.f);
            }
            product(q, turned, s, b, a.size, n);
            float inverse[QB];
            for (Int i = 0; i < b.padded(); i++) {
                float* r = s + i * wide;
                if (i >= b.rows) { std::fill(r, r + wide, 0.f); continue; }
                vec top = all(-std::numeric_limits<float>::infinity()), total{};
                seen(a, b, begin, start + i, [&](Int j, ints here) { vec v = load(r + j, Whole{}); v = here ? v : top; top = v > top ? v : top; });
                const float most = greatest(top);
                seen(a, b, begin, start + i, [&](Int j, ints here) {
                    vec p = exp2(load(r + j, Whole{}) - most);
                    p = here ? p : vec{};
                    total += p;
                    store(r + j, p, Whole{});
                });
                const float t = sum(total);
                inverse[i] = t > 0 ? 1 / t : 0;
                a.lse[h * a.tokens + start + i] = t > 0 ? most + std::log2(t) : std::numeric_limits<float>::infinity();
            }
            for (Int c = 0; c < n; c += NR)
                for (Int i = 0; i < b.padded(); i += MR) tile<false>(s + i * wide, wide, 1, values + b.from * n + c, n, o + i * n + c, n, wide);
            for (Int i = 0; i < b.rows; i++)
                across(a.size, [&](Int j, auto m) { store(O + ((start + i) * a.heads + h) * a.size + j, load(o + i * n + j, m) * inverse[i], m); });
        }
    }
}

template <class T> void attend_backward(const Attention& a, Int sequence, Int kv) {
    const T *Q = (const T*)a.q, *K = (const T*)a.k, *V = (const T*)a.v, *O = (const T*)a.o, *dO = (const T*)a.dout;
    T *dQ = (T*)a.dq, *dK = (T*)a.dk, *dV = (T*)a.dv;
    const Int begin = a.begins[sequence], end = a.begins[sequence + 1], length = up(end - begin, NR), n = up(a.size, NR), group = a.heads / a.kv_heads;
    Space& room = space();
    room.begin(5 * length * n + QB * (3 * n + 2 * length) + n);
    float *keys = room.take(length * n), *turned = room.take(length * n), *values = room.take(length * n), *dk = room.take(length * n), *dv = room.take(length * n);
    float *q = room.take(QB * n), *dout = room.take(QB * n), *dq = room.take(QB * n), *p = room.take(QB * length), *ds = room.take(QB * length), *row = room.take(n);
    std::fill(keys, keys + 5 * length * n, 0.f);
    std::fill(q, q + 3 * QB * n, 0.f);
    std::fill(row, row + n, 0.f);
    for (Int i = begin; i < end; i++) {
        float* key = keys + (i - begin) * n;
        const T *k = K + i * a.k_token + kv * a.k_head, *v = V + i * a.v_token + kv * a.v_head;
        ahead(k + AHEAD * a.k_token, a.size);
        ahead(v + AHEAD * a.v_token, a.size);
        read(key, k, a, i, a.k_weight);
        turn(turned, key, i - begin, n);
        across(a.size, [&](Int j, auto m) { store(row + j, load(v + j, m), m); });
        turn(values, row, i - begin, n);
    }
    const Int item = sequence * a.kv_heads + kv;
    for (Int start = begin; start < end; start += QB) {
        const Block b(a, begin, end, start);
        const Int wide = b.wide();
        for (Int h = kv * group; h < (kv + 1) * group; h++) {
            float delta[QB];
            for (Int i = 0; i < b.padded(); i++) {
                if (i >= b.rows) {
                    std::fill(q + i * n, q + (i + 1) * n, 0.f);
                    std::fill(dout + i * n, dout + (i + 1) * n, 0.f);
                    continue;
                }
                const T* from = Q + (start + i) * a.q_token + h * a.q_head;
                const Int at = ((start + i) * a.heads + h) * a.size;
                ahead(from + AHEAD * a.q_token, a.size);
                ahead(dO + at + AHEAD * a.heads * a.size, a.size);
                ahead(O + at + AHEAD * a.heads * a.size, a.size);
                read(q + i * n, from, a, start + i, a.q_weight);
                for (Int j = 0; j < a.size; j++) q[i * n + j] *= (float)a.scale * LOG2E;
                vec dots{};
                across(a.size, [&](Int j, auto m) { vec d = load(dO + at + j, m); dots += d * load(O + at + j, m); store(dout + i * n + j, d, m); });
                delta[i] = sum(dots);
            }
            product(q, turned, p, b, a.size, n);
            product(dout, values, ds, b, a.size, n);
            for (Int i = 0; i < b.padded(); i++) {
                float *r = p + i * wide, *d = ds + i * wide;
                if (i >= b.rows) { std::fill(r, r + wide, 0.f); std::fill(d, d + wide, 0.f); continue; }
                const float lse = a.lse[h * a.tokens + start + i];
                seen(a, b, begin, start + i, [&](Int j, ints here) {
                    vec e = exp2(load(r + j, Whole{}) - lse);
                    e = here ? e : vec{};
                    store(r + j, e, Whole{});
                    store(d + j, e * (load(d + j, Whole{}) - delta[i]), Whole{});
                });
            }
            for (Int c = 0; c < n; c += NR) {
                for (Int i = 0; i < b.padded(); i += MR) tile<false>(ds + i * wide, wide, 1, keys + b.from * n + c, n, dq + i * n + c, n, wide);
                for (Int j = 0; j < wide; j += MR) {
                    tile<true>(ds + j, 1, wide, q + c, n, dk + (b.from + j) * n + c, n, b.padded());
                    tile<true>(p + j, 1, wide, dout + c, n, dv + (b.from + j) * n + c, n, b.padded());
                }
            }
            for (Int i = 0; i < b.rows; i++) {
                const Int at = (start + i) * a.q_token + h * a.q_head;
                write_back(dQ + at, dq + i * n, (float)a.scale, Q + at, a, start + i, a.q_weight, a.dq_weight + item * a.size);
            }
        }
    }
    for (Int i = begin; i < end; i++) {
        const Int at = i * a.k_token + kv * a.k_head;
        write_back(dK + at, dk + (i - begin) * n, LN2, K + at, a, i, a.k_weight, a.dk_weight + item * a.size);
        T* to = dV + i * a.v_token + kv * a.v_head;
        across(a.size, [&](Int j, auto m) { store(to + j, load(dv + (i - begin) * n + j, m), m); });
    }
}

template <class F> void items(const Attention& a, F f) {
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1)
    for (Int item = 0; item < a.sequences * a.kv_heads; item++) f(a, item / a.kv_heads, item % a.kv_heads);
}

}  // namespace

extern "C" {
#define FOR(T, name)                                                                                                                       \
    void add_##name(const float* x, const T* y, float* out, Int n, Int threads) { add(x, y, out, n, threads); }                             \
    void norm_##name(const float* x, const float* w, T* h, float* r, Int rows, Int width, Int again, Int threads, double eps, double off) {  \
        norm(x, w, h, r, rows, width, again, eps, off, threads);                                                                            \
    }                                                                                                                                      \
    void norm_backward_##name(const float* x, const float* r, const float* w, const T* dh, const float* dout, float* dx, float* dw,         \
                              Int rows, Int width, Int block, Int threads, double off) {                                                    \
        norm_backward(x, r, w, dh, dout, dx, dw, rows, width, block, off, threads);                                                         \
    }                                                                                                                                      \
    void silu_##name(const T* both, T* made, Int rows, Int width, Int threads) { gate<Silu>(both, made, rows, width, threads); }             \
    void silu_backward_##name(const T* both, T* g, T* d, Int rows, Int width, Int threads) { gate_backward<Silu>(both, g, d, rows, width, threads); } \
    void gelu_##name(const T* both, T* made, Int rows, Int width, Int threads) { gate<GeluTanh>(both, made, rows, width, threads); }         \
    void gelu_backward_##name(const T* both, T* g, T* d, Int rows, Int width, Int threads) { gate_backward<GeluTanh>(both, g, d, rows, width, threads); } \
    void drop_##name(const T* x, T* made, Int n, Int low, Int high, Int least, Int threads, double scale) {                                \
        drop(x, made, n, low, high, least, scale, threads);                                                                                \
    }                                                                                                                                      \
    void cross_##name(T* logits, const Int* targets, const float* slopes, float* logprobs, Int rows, Int width, Int threads) {               \
        cross(logits, targets, slopes, logprobs, rows, width, threads);                                                                     \
    }                                                                                                                                      \
    void attention_##name(const Attention* a) { items(*a, attend<T>); }                                                                     \
    void attention_backward_##name(const Attention* a) { items(*a, attend_backward<T>); }
FOR(float, float32)
FOR(bf16, bfloat16)
}
