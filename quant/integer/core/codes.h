// Compute the codes of a layer's input from a float state: normalisation, activation, attention, rounding.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "program.h"

namespace {

inline int64_t filled(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

struct State {
  const float* data;
  int64_t channels;

  const float* pixel(int64_t index) const { return data + index * filled(channels); }
};

// Image of codes inside a border, with `channels` bytes from pixel to pixel and `row` bytes from row to row.
struct CodeImage {
  uint8_t* data;
  int64_t channels, row;

  uint8_t* pixel(int64_t y, int64_t x) const { return data + y * row + x * channels; }
};

struct Rounding {
  Floats inverse, low, high;
  Ints zero_point;
  int32_t shift;

  explicit Rounding(const Quantizer& q)
      : inverse(all(q.inverse)), low(all(q.low)), high(all(q.high)),
        zero_point(all<Ints>(q.zero_point) - bits(all(kRound))), shift(q.shift) {}

  // Write a digit of the codes of the first `count` ≤ 16 values of x. The bounds are integers, so clamping before
  // rounding gives the same codes.
  void operator()(Floats x, int64_t count, uint8_t* to) const {
    const Ints codes = bits(min(max(x * inverse, low), high) + all(kRound)) + zero_point;
    const Ints digits = codes >> shift & all<Ints>(255);
    if (count >= kLanes) return store_bytes(digits, to);
    uint8_t sixteen[kLanes];
    store_bytes(digits, sixteen);
    std::memcpy(to, sixteen, count);
  }
};

// Add each channel's sum over the pixels to `sum`, and that of the squares to `square`, both after subtraction of its
// first pixel, which avoids cancellation in the variance of values far from zero. Short sums are in float, their total
// is in double; four independent chains hide the latency of additions.
inline void channel_sums(State x, int64_t pixels, double* sum, double* square) {
  constexpr int64_t kBlock = 64, kChains = 4;
  for (int64_t channel = 0; channel < x.channels; channel += kLanes)
    for (int64_t start = 0; start < pixels; start += kBlock) {
      Floats sums[kChains], squares[kChains];
      UNROLLED for (int chain = 0; chain < kChains; ++chain) sums[chain] = squares[chain] = all(0.0f);
      const Floats pivot = load(x.data + channel);
      const auto add = [&](int64_t pixel, int chain) {
        const Floats value = load(x.pixel(pixel) + channel) - pivot;
        sums[chain] = sums[chain] + value;
        squares[chain] = squares[chain] + value * value;
      };
      const int64_t stop = std::min(start + kBlock, pixels);
      int64_t pixel = start;
      for (; pixel + kChains <= stop; pixel += kChains)
        UNROLLED for (int chain = 0; chain < kChains; ++chain) add(pixel + chain, chain);
      for (int chain = 0; pixel < stop; ++pixel, ++chain) add(pixel, chain);
      float s[kLanes], q[kLanes];
      store((sums[0] + sums[1]) + (sums[2] + sums[3]), s);
      store((squares[0] + squares[1]) + (squares[2] + squares[3]), q);
      for (int64_t i = 0; i < std::min(kLanes, x.channels - channel); ++i) {
        sum[channel + i] += s[i];
        square[channel + i] += q[i];
      }
    }
}

// Compute the group normalisation of the concatenation [x, skip] as slope · value + shift per channel.
inline void normalise(const Norm& norm, State x, State skip, int64_t pixels, float* slope, float* shift) {
  const int64_t channels = x.channels + skip.channels, size = channels / norm.groups;
  std::vector<double> sum(channels), square(channels);
  channel_sums(x, pixels, sum.data(), square.data());
  channel_sums(skip, pixels, sum.data() + x.channels, square.data() + x.channels);
  const auto pivot = [&](int64_t i) -> double { return i < x.channels ? x.data[i] : skip.data[i - x.channels]; };
  const double of_channel = static_cast<double>(pixels), count = static_cast<double>(size * pixels);
  for (int64_t first = 0; first < channels; first += size) {
    double total = 0.0, squares = 0.0;
    for (int64_t i = first; i < first + size; ++i) total += sum[i] + of_channel * pivot(i);
    const double mean = total / count;
    for (int64_t i = first; i < first + size; ++i) {
      const double from_mean = pivot(i) - mean;
      squares += square[i] + from_mean * (2.0 * sum[i] + of_channel * from_mean);
    }
    const double variance = std::max(squares / count, 0.0);
    const double inverse = 1.0 / std::sqrt(variance + norm.eps);
    for (int64_t i = first; i < first + size; ++i) {
      const double factor = norm.weight[i] * inverse;
      slope[i] = static_cast<float>(factor);
      shift[i] = static_cast<float>(norm.bias[i] - mean * factor);
    }
  }
}

template <Kind kKind>
inline Floats activated(Floats x) {
  if constexpr (kKind == kSilu) return silu(x);
  if constexpr (kKind == kGelu) return gelu(x);
  if constexpr (kKind == kRelu) return relu(x);
  if constexpr (kKind == kMish) return mish(x);
  return x;
}

// Write the codes of activation(slope · x + shift), with pixels `factor` apart.
template <Kind kKind>
void encode_state(State x, const Line& line, const float* slope, const float* shift, Rounding rounding,
                  CodeImage codes) {
  for (int64_t channel = 0; channel < x.channels; channel += kLanes) {
    const int64_t count = std::min(kLanes, x.channels - channel);
    const Floats a = load(slope + channel), b = load(shift + channel);
    const int64_t height = line.height, width = line.width, step = line.factor * codes.channels;
    const float* from = x.data + channel;
    for (int64_t y = 0; y < height; ++y) {
      uint8_t* to = codes.pixel(y * line.factor, 0) + channel;
      for (int64_t i = 0; i < width; ++i, from += filled(x.channels), to += step) {
        rounding(activated<kKind>(load(from) * a + b), count, to);
      }
    }
  }
}

// Nearest-neighbour upsampling: repeat every written pixel and row `factor` times.
inline void enlarge(CodeImage codes, int64_t height, int64_t width, int64_t factor) {
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x)
      for (int64_t copy = 1; copy < factor; ++copy)
        std::memcpy(codes.pixel(y * factor, x * factor + copy), codes.pixel(y * factor, x * factor), codes.channels);
    for (int64_t copy = 1; copy < factor; ++copy)
      std::memcpy(codes.pixel(y * factor + copy, 0), codes.pixel(y * factor, 0), width * factor * codes.channels);
  }
}

// softmax(q·kᵀ / √size)·v for the tokens of one head. A row of `qkv` is the concatenation [q, k, v], each with all
// heads. kRows rows of the result are computed together.
class Head {
 public:
  Head(int64_t tokens, int64_t width, int64_t size)
      : tokens_(tokens), width_(width), row_(filled(3 * width)), size_(size), columns_(filled(tokens)),
        value_(filled(size)), keys_(size * columns_), values_(tokens * value_), scores_(kRows * columns_) {
    for (int64_t i = 0; i < kLanes; ++i) inside_[i] = columns_ - kLanes + i < tokens ? 1.0f : 0.0f;
  }

  // Pass each row of the result to `write(row, first, count, values)` in parts of up to 16 values.
  template <class Write>
  void operator()(const float* qkv, const Write& write) {
    const float factor = 1.0f / std::sqrt(static_cast<float>(size_));
    for (int64_t j = 0; j < tokens_; ++j) {
      const float *k = qkv + j * row_ + width_, *v = k + width_;
      for (int64_t d = 0; d < size_; ++d) keys_[d * columns_ + j] = k[d] * factor;
      std::copy_n(v, size_, &values_[j * value_]);
    }
    for (int64_t row = 0; row < tokens_; row += kRows) {
      const int64_t rows = std::min(kRows, tokens_ - row);
      const float* q[kRows];
      for (int64_t r = 0; r < kRows; ++r) q[r] = qkv + (row + std::min(r, rows - 1)) * row_;
      float inverse[kRows];
      score(q, inverse);
      const float* weights[kRows];
      for (int64_t r = 0; r < kRows; ++r) weights[r] = &scores_[r * columns_];
      for (int64_t d = 0; d < size_; d += kLanes) {
        Floats sums[kRows];
        weigh(sums, weights, &values_[d], value_, tokens_);
        for (int64_t r = 0; r < rows; ++r)
          write(row + r, d, std::min(kLanes, size_ - d), sums[r] * all(inverse[r]));
      }
    }
  }

 private:
  static constexpr int64_t kRows = 4;

  // sums[r] = Σ_i weights[r][i] · rows[i] over `count` rows, `stride` floats apart.
  static void weigh(Floats* sums, const float* const* weights, const float* rows, int64_t stride, int64_t count) {
    Floats s[kRows];
    const float* w[kRows];
    UNROLLED for (int64_t r = 0; r < kRows; ++r) {
      s[r] = all(0.0f);
      w[r] = weights[r];
    }
    for (int64_t i = 0; i < count; ++i, rows += stride) {
      const Floats row = load(rows);
      UNROLLED for (int64_t r = 0; r < kRows; ++r) s[r] = s[r] + all(w[r][i]) * row;
    }
    UNROLLED for (int64_t r = 0; r < kRows; ++r) sums[r] = s[r];
  }

  // Set `scores_` to e^(s − max s) for kRows rows s of q·kᵀ / √size, and `inverse` to 1 / sum of each row.
  void score(const float* const* q, float* inverse) {
    for (int64_t j = 0; j < columns_; j += kLanes) {
      Floats sums[kRows];
      weigh(sums, q, &keys_[j], columns_, size_);
      for (int64_t r = 0; r < kRows; ++r) store(sums[r], &scores_[r * columns_ + j]);
    }
    // The rows are interleaved, because each operation within a row depends on the previous one.
    const Floats inside = load(inside_);
    const int64_t last = columns_ - kLanes;
    Floats top[kRows], total[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      float* s = &scores_[r * columns_];
      Floats highest = load(s + last) + (inside - all(1.0f)) * all(1e30f);  // excludes padding
      for (int64_t j = 0; j < last; j += kLanes) highest = max(highest, load(s + j));
      top[r] = all(highest_lane(highest));
      total[r] = all(0.0f);
    }
    for (int64_t j = 0; j < columns_; j += kLanes)
      for (int64_t r = 0; r < kRows; ++r) {
        float* s = &scores_[r * columns_ + j];
        Floats e = exp_of_negative(top[r] - load(s));
        if (j == last) e = e * inside;
        store(e, s);
        total[r] = total[r] + e;
      }
    for (int64_t r = 0; r < kRows; ++r) inverse[r] = 1.0f / sum_of_lanes(total[r]);
  }

  int64_t tokens_, width_, row_, size_;
  int64_t columns_, value_;                     // tokens and size, padded to a multiple of 16
  std::vector<float> keys_, values_, scores_;  // kᵀ (size, columns), v (tokens, value), scores (kRows, columns)
  float inside_[kLanes];                        // 1 for tokens, 0 for padding, in the last columns
};

// Write the codes of a line's source and skip.
inline void encode_line(const Line& line, const Norm* norms, const Quantizer& quantizer, const float* memory,
                        CodeImage codes) {
  const Rounding rounding(quantizer);
  const State x{memory + line.source, line.source_channels};
  const State skip{line.skip < 0 ? nullptr : memory + line.skip, line.skip_channels};
  if (line.kind == kAttention) {
    const int64_t channels = x.channels / 3, size = channels / line.heads;
    Head attend(line.height * line.width, channels, size);
    for (int64_t head = 0; head < line.heads; ++head)
      attend(x.data + head * size, [&](int64_t row, int64_t first, int64_t count, Floats values) {
        rounding(values, count, codes.pixel(row / line.width, row % line.width) + head * size + first);
      });
    return;
  }
  const int64_t channels = x.channels + skip.channels;
  std::vector<float> slope(channels + kLanes, 1.0f), shift(channels + kLanes, 0.0f);
  if (line.norm >= 0) normalise(norms[line.norm], x, skip, line.height * line.width, slope.data(), shift.data());
  const auto write = line.kind == kSilu   ? encode_state<kSilu>
                     : line.kind == kGelu ? encode_state<kGelu>
                     : line.kind == kRelu ? encode_state<kRelu>
                     : line.kind == kMish ? encode_state<kMish>
                                          : encode_state<kQuantize>;
  write(x, line, slope.data(), shift.data(), rounding, codes);
  CodeImage behind = codes;
  behind.data += x.channels;
  write(skip, line, slope.data() + x.channels, shift.data() + x.channels, rounding, behind);
  if (line.factor > 1) enlarge(codes, line.height, line.width, line.factor);
}

}  // namespace
