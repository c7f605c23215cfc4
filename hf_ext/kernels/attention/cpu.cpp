// Attention of a few query rows over packed keys and values: the two products that read the codes.
//
// Layout per key-value head: codes (tokens, channels * bits / 8) in planes; key scale and minimum (tokens / group, channels); value scale and
// minimum (tokens, channels / group). Softmax, mask and the unpacked tokens are the caller's.
#include "../simd.h"

namespace {

constexpr int ROWS = 4, TOKENS = REGISTERS / 8;
constexpr int64_t TILE = 32;  // tokens whose values are summed before the sums are written back

// out[t][r] += weight * sum_c rows[r][c] * code[t][c] for T tokens and R rows; channels / planes must be a multiple of N.
template <int N, int BITS, int T, int R>
INLINE void dot_tile(const float *rows, int64_t channels, const uint8_t *codes, int64_t token_bytes, float weight, float *out, int64_t out_stride) {
    constexpr int PLANES = 8 / BITS;
    const int64_t width = channels / PLANES;
    typename Vec<N>::f acc[T][R] = {};
    for (int64_t j = 0; j < width; j += N) {
        typename Vec<N>::i bytes[T];
        for (int t = 0; t < T; ++t) bytes[t] = load_bytes<N>(codes + t * token_bytes + j);
#pragma GCC unroll 8
        for (int p = 0; p < PLANES; ++p) {
            typename Vec<N>::f x[T];
            for (int t = 0; t < T; ++t) x[t] = plane<N, BITS>(bytes[t], p);
            for (int r = 0; r < R; ++r) {
                const auto q = load<N>(rows + r * channels + p * width + j);
                for (int t = 0; t < T; ++t) acc[t][r] += q * x[t];
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) out[r * out_stride + t] += weight * sum(acc[t][r]);
}

template <int N, int BITS>
void dot_group(const float *rows, int64_t count, int64_t channels, const uint8_t *codes, int64_t token_bytes, int64_t tokens, float weight, float *out, int64_t stride) {
    int64_t r = 0;
    for (; r + ROWS <= count; r += ROWS) {
        int64_t t = 0;
        for (; t + TOKENS <= tokens; t += TOKENS)
            dot_tile<N, BITS, TOKENS, ROWS>(rows + r * channels, channels, codes + t * token_bytes, token_bytes, weight, out + r * stride + t, stride);
        for (; t < tokens; ++t)
            dot_tile<N, BITS, 1, ROWS>(rows + r * channels, channels, codes + t * token_bytes, token_bytes, weight, out + r * stride + t, stride);
    }
    for (; r < count; ++r)
        for (int64_t t = 0; t < tokens; ++t)
            dot_tile<N, BITS, 1, 1>(rows + r * channels, channels, codes + t * token_bytes, token_bytes, weight, out + r * stride + t, stride);
}

// Any shape: one code after the other.
void dot_group_any(int bits, const float *rows, int64_t count, int64_t channels, const uint8_t *codes, int64_t token_bytes, int64_t tokens, float weight, float *out, int64_t stride) {
    const int64_t width = channels * bits / 8;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < count; ++r) {
            float total = 0;
            for (int64_t c = 0; c < channels; ++c)
                total += rows[r * channels + c] * ((codes[t * token_bytes + c % width] >> (c / width * bits)) & ((1 << bits) - 1));
            out[r * stride + t] += weight * total;
        }
}

template <int N> void dot_bits(int bits, const float *rows, int64_t count, int64_t channels, const uint8_t *codes, int64_t token_bytes, int64_t tokens, float weight, float *out, int64_t stride) {
    switch (bits) {
        case 1: return dot_group<N, 1>(rows, count, channels, codes, token_bytes, tokens, weight, out, stride);
        case 2: return dot_group<N, 2>(rows, count, channels, codes, token_bytes, tokens, weight, out, stride);
        case 4: return dot_group<N, 4>(rows, count, channels, codes, token_bytes, tokens, weight, out, stride);
        default: return dot_group<N, 8>(rows, count, channels, codes, token_bytes, tokens, weight, out, stride);
    }
}

// sums[r][c] += weight * sum_t scaled[group of c][r][t] * code[t][c]; strips of N channels lie within one group.
template <int N, int BITS, int R>
INLINE void sum_tile(const float *scaled, int64_t rows, int64_t group, int64_t channels, const uint8_t *codes, int64_t token_bytes, int64_t tokens, float weight, float *sums) {
    constexpr int PLANES = 8 / BITS;
    const int64_t width = channels / PLANES;
    for (int64_t j = 0; j < width; j += N) {
        typename Vec<N>::f acc[PLANES][R] = {};
        int64_t own[PLANES];
        for (int p = 0; p < PLANES; ++p) own[p] = (p * width + j) / group * rows * TILE;
        for (int64_t t = 0; t < tokens; ++t) {
            const auto bytes = load_bytes<N>(codes + t * token_bytes + j);
#pragma GCC unroll 8
            for (int p = 0; p < PLANES; ++p) {
                const auto x = plane<N, BITS>(bytes, p);
                for (int r = 0; r < R; ++r) acc[p][r] += x * scaled[own[p] + r * TILE + t];
            }
        }
        for (int p = 0; p < PLANES; ++p)
            for (int r = 0; r < R; ++r) {
                float *to = sums + r * channels + p * width + j;
                store<N>(to, load<N>(to) + acc[p][r] * weight);
            }
    }
}

template <int N, int BITS>
void sum_block(const float *scaled, int64_t rows, int64_t group, int64_t channels, const uint8_t *codes, int64_t token_bytes, int64_t tokens, float weight, float *sums) {
    constexpr int R = 8 / BITS * ROWS <= REGISTERS / 2 ? ROWS : (8 / BITS * 2 <= REGISTERS / 2 ? 2 : 1);
    int64_t r = 0;
    for (; r + R <= rows; r += R)
        sum_tile<N, BITS, R>(scaled + r * TILE, rows, group, channels, codes, token_bytes, tokens, weight, sums + r * channels);
    for (; r < rows; ++r)
        sum_tile<N, BITS, 1>(scaled + r * TILE, rows, group, channels, codes, token_bytes, tokens, weight, sums + r * channels);
}

void sum_block_any(int bits, const float *scaled, int64_t rows, int64_t group, int64_t channels, const uint8_t *codes, int64_t token_bytes, int64_t tokens, float weight, float *sums) {
    const int64_t width = channels * bits / 8;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < channels; ++c)
                sums[r * channels + c] += weight * scaled[(c / group * rows + r) * TILE + t] *
                                          ((codes[t * token_bytes + c % width] >> (c / width * bits)) & ((1 << bits) - 1));
}

template <int N> void sum_bits(int bits, const float *scaled, int64_t rows, int64_t group, int64_t channels, const uint8_t *codes, int64_t token_bytes, int64_t tokens, float weight, float *sums) {
    switch (bits) {
        case 1: return sum_block<N, 1>(scaled, rows, group, channels, codes, token_bytes, tokens, weight, sums);
        case 2: return sum_block<N, 2>(scaled, rows, group, channels, codes, token_bytes, tokens, weight, sums);
        case 4: return sum_block<N, 4>(scaled, rows, group, channels, codes, token_bytes, tokens, weight, sums);
        default: return sum_block<N, 8>(scaled, rows, group, channels, codes, token_bytes, tokens, weight, sums);
    }
}

// scaled[t] = weights[t] * step[t]; returns the sum of weights[t] * low[t].
INLINE float fold(const float *__restrict weights, const float *__restrict step, const float *__restrict low, int64_t tokens, float *__restrict scaled) {
    float total = 0;
    for (int64_t t = 0; t < tokens; ++t) {
        scaled[t] = weights[t] * step[t];
        total += weights[t] * low[t];
    }
    return total;
}

}  // namespace

extern "C" {

// scores (heads, rows, score_stride): the first `tokens` of each row are set to query (heads, rows, channels) . key.
void hf_ext_key_scores(const float *query, const uint8_t *codes, const void *scale, const void *minimum, float *scores, int64_t heads, int64_t rows, int64_t tokens,
                       int64_t channels, int64_t group, int64_t score_stride, int bits, int half, int threads) {
    const int64_t groups = tokens / group, token_bytes = channels * bits / 8;
    parallel(threads, [=](int part) {
        std::vector<float> step(channels), low(channels), folded(rows * channels), scaled(rows * channels);
        Segment parts[2];
        const int count = segments(bits, channels, parts);
        const int64_t end = heads * groups * (part + 1) / threads;
        for (int64_t item = heads * groups * part / threads; item < end; ++item) {
            const int64_t head = item / groups, first = item % groups * group;
            load_numbers(scale, item * channels, half, channels, step.data());
            load_numbers(minimum, item * channels, half, channels, low.data());
            float *out = scores + head * rows * score_stride + first;
            for (int64_t r = 0; r < rows; ++r) {
                const float *q = query + (head * rows + r) * channels;
                float bias = 0;
                for (int64_t c = 0; c < channels; ++c) {
                    folded[r * channels + c] = q[c] * step[c];
                    bias += q[c] * low[c];
                }
                for (int64_t t = 0; t < group; ++t) out[r * score_stride + t] = bias;
            }
            const uint8_t *packed = codes + (head * tokens + first) * token_bytes;
            for (int s = 0; s < count; ++s) {
                const Segment &planes = parts[s];
                const int64_t width = channels * planes.bits / 8;
                if (width % LANES == 0)
                    dot_bits<LANES>(planes.bits, folded.data(), rows, channels, packed + planes.offset, token_bytes, group, planes.weight, out, score_stride);
                else if (width % 8 == 0)
                    dot_bits<8>(planes.bits, folded.data(), rows, channels, packed + planes.offset, token_bytes, group, planes.weight, out, score_stride);
                else
                    dot_group_any(planes.bits, folded.data(), rows, channels, packed + planes.offset, token_bytes, group, planes.weight, out, score_stride);
            }
        }
    });
}

// sums (heads, rows, channels) = weights (heads, rows, weight_stride) . value, over the first `tokens` weights of each row.
void hf_ext_value_sums(const float *weights, const uint8_t *codes, const void *scale, const void *minimum, float *sums, int64_t heads, int64_t rows, int64_t tokens,
                       int64_t channels, int64_t group, int64_t weight_stride, int bits, int half, int threads) {
    const int64_t groups = channels / group, token_bytes = channels * bits / 8, tiles = (tokens + TILE - 1) / TILE;
    const int64_t size = heads * rows * channels;
    std::vector<float> partial((threads - 1) * size);
    std::memset(sums, 0, size * sizeof(float));
    parallel(threads, [=, &partial](int part) {
        std::vector<float> loaded_step(TILE * groups), loaded_low(TILE * groups), step(TILE * groups), low(TILE * groups), scaled(TILE * groups * rows), offset(groups * rows);
        Segment parts[2];
        const int count = segments(bits, channels, parts);
        float *all = part == 0 ? sums : partial.data() + (part - 1) * size;
        const int64_t end = heads * tiles * (part + 1) / threads;
        for (int64_t item = heads * tiles * part / threads; item < end; ++item) {
            const int64_t head = item / tiles, first = item % tiles * TILE, size = tokens - first < TILE ? tokens - first : TILE;
            load_numbers(scale, (head * tokens + first) * groups, half, size * groups, loaded_step.data());
            load_numbers(minimum, (head * tokens + first) * groups, half, size * groups, loaded_low.data());
            for (int64_t t = 0; t < size; ++t)
                for (int64_t g = 0; g < groups; ++g) {
                    step[g * TILE + t] = loaded_step[t * groups + g];
                    low[g * TILE + t] = loaded_low[t * groups + g];
                }
            for (int64_t r = 0; r < rows; ++r) {
                const float *p = weights + (head * rows + r) * weight_stride + first;
                for (int64_t g = 0; g < groups; ++g)
                    offset[g * rows + r] = fold(p, step.data() + g * TILE, low.data() + g * TILE, size, scaled.data() + (g * rows + r) * TILE);
            }
            float *out = all + head * rows * channels;
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t g = 0; g < groups; ++g)
                    for (int64_t c = 0; c < group; ++c) out[r * channels + g * group + c] += offset[g * rows + r];
            const uint8_t *packed = codes + (head * tokens + first) * token_bytes;
            for (int s = 0; s < count; ++s) {
                const Segment &planes = parts[s];
                const int64_t width = channels * planes.bits / 8;
                if (width % LANES == 0 && group % LANES == 0)
                    sum_bits<LANES>(planes.bits, scaled.data(), rows, group, channels, packed + planes.offset, token_bytes, size, planes.weight, out);
                else if (width % 8 == 0 && group % 8 == 0)
                    sum_bits<8>(planes.bits, scaled.data(), rows, group, channels, packed + planes.offset, token_bytes, size, planes.weight, out);
                else
                    sum_block_any(planes.bits, scaled.data(), rows, group, channels, packed + planes.offset, token_bytes, size, planes.weight, out);
            }
        }
    });
    for (int part = 1; part < threads; ++part)
        for (int64_t i = 0; i < size; ++i) sums[i] += partial[(part - 1) * size + i];
}
}
