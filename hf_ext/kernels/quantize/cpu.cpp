// Quantise, compensate and pack: keys in groups of tokens, values in groups of channels. The mathematics is in reference.py.
#include "../simd.h"

#include <cmath>

namespace {

INLINE void put_number(void *to, int64_t at, bool half, float x) {
    if (half)
        static_cast<uint16_t *>(to)[at] = float_to_half(x);
    else
        static_cast<float *>(to)[at] = x;
}

// Code of x, half to even, 0 if the group is constant. The comparison order also turns NaN into a valid code.
INLINE float encode(float x, float low, float step, float top) {
    if (!(step > 0)) return 0;
    const float code = std::nearbyint((x - low) / step);
    return code > 0 ? (code < top ? code : top) : 0;
}

// What the codes of a group stand for, with numbers as they are stored.
struct Grid {
    float step, low;
};

INLINE Grid stored(float step, float low, bool half) { return half ? Grid{half_to_float(float_to_half(step)), half_to_float(float_to_half(low))} : Grid{step, low}; }

INLINE float squared_error(const float *x, int64_t count, Grid grid, float top) {
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float delta = encode(x[i], grid.low, grid.step, top) * grid.step + grid.low - x[i];
        sum += delta * delta;
    }
    return sum;
}

// The range of a group, or the middle share `clip` of it where that has the smaller error.
INLINE Grid fit(const float *x, int64_t count, float top, float clip, bool half) {
    float low = x[0], high = x[0];
    for (int64_t i = 1; i < count; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    const Grid whole = stored((high - low) / top, low, half);
    if (!(clip < 1)) return whole;
    const Grid narrow = stored(clip * (high - low) / top, low + (1 - clip) / 2 * (high - low), half);
    return squared_error(x, count, narrow, top) < squared_error(x, count, whole, top) ? narrow : whole;
}

// Bytes of one token's codes, in planes.
void pack_token(const uint8_t *codes, int64_t channels, int bits, uint8_t *out) {
    Segment parts[2];
    const int count = segments(bits, channels, parts);
    for (int s = 0; s < count; ++s) {
        const int64_t width = channels * parts[s].bits / 8;
        const int shift = s * 2, mask = (1 << parts[s].bits) - 1;
        uint8_t *to = out + parts[s].offset;
        for (int64_t j = 0; j < width; ++j) to[j] = (codes[j] >> shift) & mask;
        for (int p = 1; p < 8 / parts[s].bits; ++p)
            for (int64_t j = 0; j < width; ++j) to[j] |= ((codes[p * width + j] >> shift) & mask) << (p * parts[s].bits);
    }
}

// target[t] -= sum_k error[k][t] * gain[k * stride]
INLINE void compensate(float *__restrict target, const float *__restrict error, const float *gain, int64_t stride, int64_t rank, int64_t tokens) {
    for (int64_t k = 0; k < rank; ++k) {
        const float factor = gain[k * stride];
        for (int64_t t = 0; t < tokens; ++t) target[t] -= error[k * tokens + t] * factor;
    }
}

}  // namespace

extern "C" {

// keys (heads, tokens, channels); basis, gains (heads, rank, channels) in the order (heads, channels) in which channels are rounded, null for
// plain rounding; codes (heads, tokens, channels * bits / 8); scale, minimum (heads, tokens / group, channels).
void hf_ext_quantize_keys(const float *keys, const float *basis, const float *gains, const int64_t *order, uint8_t *codes, void *scale, void *minimum, int64_t heads,
                          int64_t tokens, int64_t channels, int64_t rank, int64_t group, int64_t block, int bits, float clip, int half, int threads) {
    const int64_t groups = tokens / group, token_bytes = channels * bits / 8;
    const float top = (1 << bits) - 1;
    parallel(threads, [=](int part) {
        std::vector<float> turned(channels * group), target(group), delta(block * group), error(rank * group);
        std::vector<uint8_t> unpacked(group * channels);
        const int64_t end = heads * groups * (part + 1) / threads;
        for (int64_t item = heads * groups * part / threads; item < end; ++item) {
            const int64_t head = item / groups;
            const float *k = keys + item * group * channels;
            for (int64_t t = 0; t < group; ++t)
                for (int64_t c = 0; c < channels; ++c) turned[c * group + t] = k[t * channels + c];
            std::fill(error.begin(), error.end(), 0.f);
            for (int64_t first = 0; first < channels; first += block) {
                for (int64_t i = 0; i < block; ++i) {
                    const int64_t position = first + i, channel = order ? order[head * channels + position] : position;
                    const float *own = turned.data() + channel * group;
                    std::copy(own, own + group, target.begin());
                    if (first > 0) compensate(target.data(), error.data(), gains + head * rank * channels + position, channels, rank, group);
                    const Grid grid = fit(target.data(), group, top, clip, half);
                    put_number(scale, item * channels + channel, half, grid.step);
                    put_number(minimum, item * channels + channel, half, grid.low);
                    for (int64_t t = 0; t < group; ++t) {
                        const float code = encode(target[t], grid.low, grid.step, top);
                        unpacked[t * channels + channel] = uint8_t(code);
                        delta[i * group + t] = code * grid.step + grid.low - own[t];
                    }
                }
                for (int64_t r = 0; r < rank; ++r)
                    for (int64_t i = 0; i < block; ++i) {
                        const float factor = basis[(head * rank + r) * channels + first + i];
                        for (int64_t t = 0; t < group; ++t) error[r * group + t] += delta[i * group + t] * factor;
                    }
            }
            for (int64_t t = 0; t < group; ++t) pack_token(unpacked.data() + t * channels, channels, bits, codes + (item * group + t) * token_bytes);
        }
    });
}

// values (tokens, channels); codes (tokens, channels * bits / 8); scale, minimum (tokens, channels / group).
void hf_ext_quantize_values(const float *values, uint8_t *codes, void *scale, void *minimum, int64_t tokens, int64_t channels, int64_t group, int bits, float clip, int half, int threads) {
    const int64_t groups = channels / group, token_bytes = channels * bits / 8;
    const float top = (1 << bits) - 1;
    parallel(threads, [=](int part) {
        std::vector<uint8_t> unpacked(channels);
        for (int64_t t = tokens * part / threads; t < tokens * (part + 1) / threads; ++t) {
            for (int64_t g = 0; g < groups; ++g) {
                const float *x = values + t * channels + g * group;
                const Grid grid = fit(x, group, top, clip, half);
                put_number(scale, t * groups + g, half, grid.step);
                put_number(minimum, t * groups + g, half, grid.low);
                for (int64_t c = 0; c < group; ++c) unpacked[g * group + c] = uint8_t(encode(x[c], grid.low, grid.step, top));
            }
            pack_token(unpacked.data(), channels, bits, codes + t * token_bytes);
        }
    });
}
}
