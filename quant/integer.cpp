// A low-bit UNet on integers: a program of layers, run from start to end for one image at a time.
//
// Every instruction turns a float state into codes (quantization alone; group normalisation, with or without SiLU;
// attention), and convolves the codes with packed weights into a float state. A thread takes an image through the
// whole program, so its states stay in the cache of one core, and no thread waits for another. An image depends
// neither on the batch nor on the number of threads: its sums are integers, and no other image is looked at.
//
// States are channels-last, pixels × channels. Vectors of 16 floats and the products of codes need AVX-512 with VNNI.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kLanes = 16;
using Floats = __m512;

inline Floats all(float x) { return _mm512_set1_ps(x); }

inline __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// The first `count` ≤ kLanes floats, then zeros.
inline Floats load(const float* from, int64_t count = kLanes) { return _mm512_maskz_loadu_ps(first(count), from); }

// To the nearest integer, halves to even.
inline Floats round(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// e^x within 2 ulp: 2^n · e^r with |r| ≤ ln2 / 2, and the polynomial of Cephes for e^r.
inline Floats exp(Floats x) {
  const Floats n = round(x * 1.44269504f);
  const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return _mm512_scalef_ps(p * (r * r) + r + 1.0f, n);
}

// clamp(round(x / scale) + zero_point, 0, qmax). The bounds are integers, so it may clamp before it rounds.
struct Quantizer {
  Floats inverse, low, high, zero_point;

  Quantizer(double scale, double zero_point, double qmax)
      : inverse(all(1.0f / static_cast<float>(scale))), low(all(-zero_point)), high(all(qmax - zero_point)),
        zero_point(all(zero_point)) {}

  // The codes of the first `count` lanes of x.
  void operator()(Floats x, int64_t count, uint8_t* to) const {
    const Floats code = round(_mm512_min_ps(_mm512_max_ps(x * inverse, low), high)) + zero_point;
    _mm512_mask_cvtepi32_storeu_epi8(to, first(count), _mm512_cvtps_epi32(code));
  }

  // The codes of `count` floats.
  void operator()(const float* from, int64_t count, uint8_t* to) const {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t some = std::min(kLanes, count - i);
      (*this)(load(from + i, some), some, to + i);
    }
  }
};

struct State {
  const float* data;
  int64_t channels;
};

// Codes of the concatenation [x, skip], enlarged by `factor` in both directions by repetition.
void quantize(State x, State skip, int64_t height, int64_t width, int64_t factor, const Quantizer& quantizer,
              uint8_t* codes) {
  const int64_t c = x.channels + skip.channels, row = width * c;
  for (int64_t y = 0; y < height; ++y, codes += factor * factor * row) {
    if (factor == 1 && skip.channels == 0) {
      quantizer(x.data + y * row, row, codes);
      continue;
    }
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = y * width + i;
      uint8_t* pixel = codes + i * factor * c;
      quantizer(x.data + at * x.channels, x.channels, pixel);
      quantizer(skip.data + at * skip.channels, skip.channels, pixel + x.channels);
      for (int64_t copy = 1; copy < factor; ++copy) std::memcpy(pixel + copy * c, pixel, c);
    }
    for (int64_t copy = 1; copy < factor; ++copy) std::memcpy(codes + copy * factor * row, codes, factor * row);
  }
}

// Sums of every channel and of its squares over the pixels, added to `sum` and `square`.
void channel_sums(State x, int64_t pixels, double* sum, double* square) {
  constexpr int64_t kBlock = 64, kChains = 4;  // short sums in float, their total in double; chains hide latency
  for (int64_t channel = 0; channel < x.channels; channel += kLanes) {
    const int64_t some = std::min(kLanes, x.channels - channel);
    for (int64_t start = 0; start < pixels; start += kBlock) {
      Floats sums[kChains], squares[kChains];
      for (int64_t chain = 0; chain < kChains; ++chain) sums[chain] = squares[chain] = all(0.0f);
      const int64_t stop = std::min(start + kBlock, pixels);
      for (int64_t pixel = start; pixel < stop; pixel += kChains)
        for (int64_t chain = 0; chain < std::min(kChains, stop - pixel); ++chain) {
          const Floats value = load(x.data + (pixel + chain) * x.channels + channel, some);
          sums[chain] += value;
          squares[chain] += value * value;
        }
      const Floats s = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      const Floats q = (squares[0] + squares[1]) + (squares[2] + squares[3]);
      for (int64_t i = 0; i < some; ++i) {
        sum[channel + i] += s[i];
        square[channel + i] += q[i];
      }
    }
  }
}

// SiLU (if asked for) of slope·x + shift as codes, `stride` bytes from pixel to pixel.
template <bool kSilu>
void normalise(State x, int64_t pixels, const float* slope, const float* shift, const Quantizer& quantizer,
               uint8_t* codes, int64_t stride) {
  for (int64_t channel = 0; channel < x.channels; channel += kLanes) {
    const int64_t some = std::min(kLanes, x.channels - channel);
    const Floats a = load(slope + channel, some), b = load(shift + channel, some);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      Floats value = load(x.data + pixel * x.channels + channel, some) * a + b;
      if (kSilu) value = value / (1.0f + exp(-value));
      quantizer(value, some, codes + pixel * stride + channel);
    }
  }
}

struct Norm {
  const float *weight, *bias;
  int64_t groups;
  double eps;

  // Codes of the normalised concatenation [x, skip], through SiLU if asked for. The concatenation is never made.
  void operator()(State x, State skip, int64_t pixels, bool silu, const Quantizer& quantizer, uint8_t* codes) const {
    const int64_t c = x.channels + skip.channels, size = c / groups;
    std::vector<double> sum(c), square(c);
    std::vector<float> slope(c), shift(c);
    channel_sums(x, pixels, sum.data(), square.data());
    channel_sums(skip, pixels, sum.data() + x.channels, square.data() + x.channels);
    for (int64_t first = 0; first < c; first += size) {
      double total = 0.0, squares = 0.0;
      for (int64_t i = first; i < first + size; ++i) total += sum[i], squares += square[i];
      const double mean = total / (size * pixels);
      const double variance = std::max(squares / (size * pixels) - mean * mean, 0.0);
      const double inverse = 1.0 / std::sqrt(variance + eps);
      for (int64_t i = first; i < first + size; ++i) {
        slope[i] = static_cast<float>(weight[i] * inverse);
        shift[i] = static_cast<float>(bias[i] - mean * weight[i] * inverse);
      }
    }
    const auto write = silu ? normalise<true> : normalise<false>;
    write(x, pixels, slope.data(), shift.data(), quantizer, codes, c);
    write(skip, pixels, slope.data() + x.channels, shift.data() + x.channels, quantizer, codes + x.channels, c);
  }
};

// softmax(q·kᵀ / √size)·v for `tokens` of one head, its output as codes. A row of `qkv` holds q, k and v of every
// head one after another, `width` floats each. kRows rows of the result are computed together.
struct Head {
  static constexpr int64_t kRows = 4;
  int64_t tokens, width, size, token_blocks, size_blocks;
  std::vector<Floats> keys, values, scores;  // k transposed (size, tokens), v (tokens, size), scores (kRows, tokens)

  Head(int64_t tokens, int64_t width, int64_t size)
      : tokens(tokens), width(width), size(size), token_blocks((tokens + kLanes - 1) / kLanes),
        size_blocks((size + kLanes - 1) / kLanes), keys(size * token_blocks), values(tokens * size_blocks),
        scores(kRows * token_blocks) {}

  void operator()(const float* qkv, const Quantizer& quantizer, uint8_t* codes) {
    const float factor = 1.0f / std::sqrt(static_cast<float>(size));
    float* transposed = reinterpret_cast<float*>(keys.data());
    for (int64_t j = 0; j < tokens; ++j) {
      const float *k = qkv + j * 3 * width + width, *v = k + width;
      for (int64_t d = 0; d < size; ++d) transposed[d * token_blocks * kLanes + j] = k[d] * factor;
      for (int64_t d = 0; d < size_blocks; ++d)
        values[j * size_blocks + d] = load(v + d * kLanes, std::min(kLanes, size - d * kLanes));
    }
    for (int64_t row = 0; row < tokens; row += kRows) {
      const int64_t rows = std::min(kRows, tokens - row);
      const float* q[kRows];
      for (int64_t r = 0; r < kRows; ++r) q[r] = qkv + (row + std::min(r, rows - 1)) * 3 * width;
      float inverse[kRows];
      score(q, inverse);
      const float* weights = reinterpret_cast<const float*>(scores.data());
      for (int64_t d = 0; d < size_blocks; ++d) {
        Floats sums[kRows];
        for (int64_t r = 0; r < kRows; ++r) sums[r] = all(0.0f);
        for (int64_t j = 0; j < tokens; ++j) {
          const Floats value = values[j * size_blocks + d];
          for (int64_t r = 0; r < kRows; ++r) sums[r] += weights[r * token_blocks * kLanes + j] * value;
        }
        for (int64_t r = 0; r < rows; ++r)
          quantizer(sums[r] * inverse[r], std::min(kLanes, size - d * kLanes), codes + (row + r) * width + d * kLanes);
      }
    }
  }

  // `scores` = e^(s − max s) for kRows rows s of q·kᵀ / √size, and one over the sum of each.
  void score(const float* const* q, float* inverse) {
    for (int64_t j = 0; j < token_blocks; ++j) {
      Floats sums[kRows];
      for (int64_t r = 0; r < kRows; ++r) sums[r] = all(0.0f);
      for (int64_t d = 0; d < size; ++d) {
        const Floats key = keys[d * token_blocks + j];
        for (int64_t r = 0; r < kRows; ++r) sums[r] += q[r][d] * key;
      }
      const __mmask16 inside = first(std::min(kLanes, tokens - j * kLanes));
      for (int64_t r = 0; r < kRows; ++r)
        scores[r * token_blocks + j] = _mm512_mask_mov_ps(all(-INFINITY), inside, sums[r]);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      Floats* s = scores.data() + r * token_blocks;
      Floats highest = s[0], total = all(0.0f);
      for (int64_t j = 1; j < token_blocks; ++j) highest = _mm512_max_ps(highest, s[j]);
      const float top = _mm512_reduce_max_ps(highest);
      for (int64_t j = 0; j < token_blocks; ++j) {
        s[j] = exp(_mm512_max_ps(s[j] - top, all(-200.0f)));  // where r would be −∞ − (−∞)
        total += s[j];
      }
      inverse[r] = 1.0f / _mm512_reduce_add_ps(total);
    }
  }
};

// A convolution of codes. One instruction (VNNI) multiplies four channels of a pixel by those of 16 output channels
// and adds the products in 32 bits, exactly. Weights lie as (output channels / 16, kernel height, kernel width,
// channels / 4, 16, 4), filled up with zeros; weight_sum takes the zero point out of a sum.
struct Convolution {
  int64_t in_channels, stride_y, stride_x, dilation_y, dilation_x, top, left, bottom, right;
  int64_t channels, height, width;  // of the padded input
  int64_t kernel_height, kernel_width, out_channels, out_height, out_width;
  int64_t result_height, result_width;
  const int8_t* weight;
  const int32_t* weight_sum;
  const float *weight_scale, *bias;
  float scale;
  int32_t zero_point;

  // geometry: in_channels, stride (y, x), dilation (y, x), padding (top, left, bottom, right).
  Convolution(const int64_t* geometry, int64_t h, int64_t w, const Tensor& weight, const Tensor& weight_sum,
              const Tensor& weight_scale, const Tensor& bias, double scale, double zero_point)
      : in_channels(geometry[0]), stride_y(geometry[1]), stride_x(geometry[2]), dilation_y(geometry[3]),
        dilation_x(geometry[4]), top(geometry[5]), left(geometry[6]), bottom(geometry[7]), right(geometry[8]),
        channels(weight.size(3) * 4), height(top + h + bottom), width(left + w + right),
        kernel_height(weight.size(1)), kernel_width(weight.size(2)), out_channels(weight_scale.numel()),
        out_height((height - dilation_y * (kernel_height - 1) - 1) / stride_y + 1),
        out_width((width - dilation_x * (kernel_width - 1) - 1) / stride_x + 1),
        result_height(out_height), result_width(out_width), weight(weight.const_data_ptr<int8_t>()),
        weight_sum(weight_sum.const_data_ptr<int32_t>()),
        weight_scale(weight_scale.const_data_ptr<float>()), bias(bias.const_data_ptr<float>()),
        scale(static_cast<float>(scale)), zero_point(static_cast<int32_t>(zero_point)) {
    if (kernel_height * kernel_width * stride_y * stride_x == 1 && padding() == 0) {
      width = out_width = height * width;  // rows do not matter: one long one fills the tiles best
      height = out_height = 1;
    }
  }

  int64_t padding() const { return top + left + bottom + right; }

  // kPixels neighbours of one row times kBlocks blocks of 16 output channels, in registers from start to end.
  // Not inlined, for in `run` GCC would no longer keep the sums in registers.
  template <int kPixels, int kBlocks>
  __attribute__((noinline)) void tile(const uint8_t* image, int64_t y, int64_t x, int64_t block,
                                      const float* residual, float* out) const {
    const int64_t quads = channels / 4, block_size = kernel_height * kernel_width * quads * 64;
    const int8_t* w = weight + block * block_size;
    __m512i sums[kPixels][kBlocks];
    for (int p = 0; p < kPixels; ++p)
      for (int b = 0; b < kBlocks; ++b) sums[p][b] = _mm512_setzero_si512();
    for (int64_t ky = 0; ky < kernel_height; ++ky)
      for (int64_t kx = 0; kx < kernel_width; ++kx) {
        const uint8_t* pixel =
            image + ((y * stride_y + ky * dilation_y) * width + x * stride_x + kx * dilation_x) * channels;
        for (int64_t quad = 0; quad < quads; ++quad, w += 64) {
          __m512i weights[kBlocks];
          for (int b = 0; b < kBlocks; ++b) weights[b] = _mm512_loadu_si512(w + b * block_size);
          for (int p = 0; p < kPixels; ++p) {
            int32_t four;
            std::memcpy(&four, pixel + p * stride_x * channels + quad * 4, sizeof four);
            const __m512i codes = _mm512_set1_epi32(four);
            for (int b = 0; b < kBlocks; ++b) sums[p][b] = _mm512_dpbusd_epi32(sums[p][b], codes, weights[b]);
          }
        }
      }
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t channel = (block + b) * kLanes;
      const __mmask16 mask = first(std::min(kLanes, out_channels - channel));
      const __m512i shift = _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(mask, weight_sum + channel),
                                               _mm512_set1_epi32(zero_point));
      const __m512 slope = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, weight_scale + channel), _mm512_set1_ps(scale));
      const __m512 offset = _mm512_maskz_loadu_ps(mask, bias + channel);
      for (int p = 0; p < kPixels; ++p) {
        const int64_t at = (y * out_width + x + p) * out_channels + channel;
        __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums[p][b], shift)), slope, offset);
        if (residual) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, residual + at));
        _mm512_mask_storeu_ps(out + at, mask, value);
      }
    }
  }

  template <int kBlocks>
  void rows(const uint8_t* image, int64_t block, const float* residual, float* out) const {
    for (int64_t y = 0; y < out_height; ++y) {
      int64_t x = 0;
      for (; x + 14 <= out_width; x += 14) tile<14, kBlocks>(image, y, x, block, residual, out);
      for (; x + 7 <= out_width; x += 7) tile<7, kBlocks>(image, y, x, block, residual, out);
      for (; x + 4 <= out_width; x += 4) tile<4, kBlocks>(image, y, x, block, residual, out);
      for (; x < out_width; ++x) tile<1, kBlocks>(image, y, x, block, residual, out);
    }
  }

  // codes (pixels, in_channels) → out (pixels, out_channels), plus `residual` unless it is null.
  void operator()(const uint8_t* codes, std::vector<uint8_t>& padded, const float* residual, float* out) const {
    if (padding() > 0 || in_channels < channels) {
      // Around the image lie codes of zero, so that its border needs no special case.
      padded.assign(height * width * channels, static_cast<uint8_t>(zero_point));
      const int64_t rows = height - top - bottom, columns = width - left - right;
      for (int64_t y = 0; y < rows; ++y) {
        uint8_t* to = padded.data() + ((y + top) * width + left) * channels;
        const uint8_t* from = codes + y * columns * in_channels;
        if (in_channels == channels) {
          std::memcpy(to, from, columns * channels);
        } else {
          for (int64_t x = 0; x < columns; ++x) std::memcpy(to + x * channels, from + x * in_channels, in_channels);
        }
      }
      codes = padded.data();
    }
    const int64_t blocks = (out_channels + kLanes - 1) / kLanes;
    int64_t block = 0;
    for (; block + 2 <= blocks; block += 2) rows<2>(codes, block, residual, out);
    if (block < blocks) rows<1>(codes, block, residual, out);
  }
};

enum Kind : int64_t { kQuantize, kNorm, kNormSilu, kAttention };

// A line of the program, as quant/integer.py writes it. States are offsets into a thread's memory; −1 is the sample
// as a source, the result as a target, and nothing as skip or residual.
struct Instruction {
  int64_t kind, layer, norm, source, source_channels, skip, skip_channels, residual, target, height, width, factor,
      heads;
};

// sample float (N, C, H, W) → the result of the last line, float (N, O, H', W'); both channels-last.
//
// instructions: int64 (I, 13). weights, sums, scales: per layer, as `Convolution` says. geometry: int64 (L, 9).
// norm_weights, norm_biases, norm_groups, norm_eps: per normalisation. quantizers: float64 (L, 3), step size, zero
// point and largest code of the timestep; biases: per layer, of the timestep. memory: floats that a thread needs.
// seconds: float64 (2,), if given: the threads' time for codes and for their products is added.
Tensor run(const Tensor& sample, const Tensor& instructions, at::TensorList weights, at::TensorList sums,
           at::TensorList scales, const Tensor& geometry, at::TensorList norm_weights, at::TensorList norm_biases,
           at::IntArrayRef norm_groups, at::ArrayRef<double> norm_eps, const Tensor& quantizers,
           at::TensorList biases, int64_t memory, const std::optional<Tensor>& seconds) {
  const int64_t n = sample.size(0), h = sample.size(2), w = sample.size(3), count = instructions.size(0);
  TORCH_CHECK(sample.is_contiguous(at::MemoryFormat::ChannelsLast), "run: sample must be channels-last");
  TORCH_CHECK(instructions.size(1) * sizeof(int64_t) == sizeof(Instruction), "run: instructions do not fit");
  TORCH_CHECK(sample.size(1) == instructions.const_data_ptr<int64_t>()[4], "run: channels do not fit");
  const auto* program = reinterpret_cast<const Instruction*>(instructions.const_data_ptr<int64_t>());
  const double* steps = quantizers.const_data_ptr<double>();
  std::vector<Convolution> convolutions;
  for (int64_t i = 0; i < count; ++i) {
    const Instruction& line = program[i];
    const int64_t* g = geometry.const_data_ptr<int64_t>() + line.layer * 9;
    const double* step = steps + line.layer * 3;
    convolutions.emplace_back(g, line.height * line.factor, line.width * line.factor, weights[line.layer],
                              sums[line.layer], scales[line.layer], biases[line.layer], step[0], step[1]);
  }
  const Convolution& last = convolutions.back();
  Tensor out = at::empty({n, last.out_channels, last.result_height, last.result_width},
                         at::TensorOptions().dtype(at::kFloat).memory_format(at::MemoryFormat::ChannelsLast));
  const float* source = sample.const_data_ptr<float>();
  float* target = out.mutable_data_ptr<float>();
  const int64_t in_size = sample.size(1) * h * w, out_size = out.numel() / std::max<int64_t>(n, 1);
  std::mutex mutex;
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    using Clock = std::chrono::steady_clock;
    std::chrono::duration<double> coding{}, multiplying{};
    std::vector<float> states(memory);
    std::vector<uint8_t> codes, padded;
    for (int64_t image = begin; image < end; ++image)
      for (int64_t i = 0; i < count; ++i) {
        const auto start = Clock::now();
        const Instruction& line = program[i];
        const double* step = steps + line.layer * 3;
        const Quantizer quantizer(step[0], step[1], step[2]);
        const State x{line.source < 0 ? source + image * in_size : states.data() + line.source, line.source_channels};
        const int64_t pixels = line.height * line.width;
        codes.resize(std::max<size_t>(codes.size(), pixels * line.factor * line.factor *
                                                        (line.source_channels + line.skip_channels)));
        const State skip{line.skip < 0 ? nullptr : states.data() + line.skip, line.skip_channels};
        if (line.kind == kQuantize) {
          quantize(x, skip, line.height, line.width, line.factor, quantizer, codes.data());
        } else if (line.kind == kAttention) {
          const int64_t channels = line.source_channels / 3, size = channels / line.heads;
          Head attend(pixels, channels, size);
          for (int64_t head = 0; head < line.heads; ++head)
            attend(x.data + head * size, quantizer, codes.data() + head * size);
        } else {
          const Norm norm{norm_weights[line.norm].const_data_ptr<float>(),
                          norm_biases[line.norm].const_data_ptr<float>(), norm_groups[line.norm], norm_eps[line.norm]};
          norm(x, skip, pixels, line.kind == kNormSilu, quantizer, codes.data());
        }
        const auto middle = Clock::now();
        convolutions[i](codes.data(), padded, line.residual < 0 ? nullptr : states.data() + line.residual,
                        line.target < 0 ? target + image * out_size : states.data() + line.target);
        coding += middle - start;
        multiplying += Clock::now() - middle;
      }
    if (seconds) {
      const std::lock_guard<std::mutex> lock(mutex);
      seconds->mutable_data_ptr<double>()[0] += coding.count();
      seconds->mutable_data_ptr<double>()[1] += multiplying.count();
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(efficientdm, m) {
  m.def(
      "run(Tensor sample, Tensor instructions, Tensor[] weights, Tensor[] sums, Tensor[] scales, Tensor geometry, "
      "Tensor[] norm_weights, Tensor[] norm_biases, int[] norm_groups, float[] norm_eps, Tensor quantizers, "
      "Tensor[] biases, int memory, Tensor(a!)? seconds=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(efficientdm, CPU, m) { m.impl("run", &run); }
