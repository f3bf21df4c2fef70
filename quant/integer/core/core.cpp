// Integer inference of a low-bit UNet: a program of lines, run from start to end for one image at a time.
//
// Each line converts a float state to codes and convolves them with packed weights, which gives the next float state.
// One thread runs the whole program for an image, so its states stay in the cache of one core, and threads do not wait
// for each other. The bytes of an image do not depend on the batch, the number of threads or the instruction set.
//
// Inputs and outputs are plain arrays: the core does not depend on PyTorch, Python or diffusers.

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <optional>

#include "convolution.h"
#include "states.h"

#ifndef SOURCES
#define SOURCES ""
#endif
#define API extern "C" __attribute__((visibility("default")))

namespace {

using Clock = std::chrono::steady_clock;

struct Seconds {
  double coding = 0.0, multiplying = 0.0;
};

// The convolution of each line, if it has a layer.
using Convolutions = std::vector<std::optional<Convolution>>;

Convolutions convolutions(const Program& program) {
  Convolutions all(program.num_lines);
  for (int64_t i = 0; i < program.num_lines; ++i) {
    const Line& line = program.lines[i];
    if (line.layer < 0) continue;
    all[i].emplace(program.layers[line.layer], line.height * line.factor, line.width * line.factor);
  }
  return all;
}

int64_t widest(const Convolutions& convolutions) {
  int64_t bytes = 0;
  for (const auto& convolve : convolutions)
    if (convolve) bytes = std::max(bytes, convolve->bytes());
  return bytes;
}

void run(const Program& program, const Convolutions& convolutions, const Moment& moment, float* memory, uint8_t* codes,
         Seconds* seconds) {
  for (int64_t i = 0; i < program.num_lines; ++i) {
    const auto start = seconds ? Clock::now() : Clock::time_point();
    const Line& line = program.lines[i];
    if (line.layer < 0) {
      change_state(line, moment.norms, memory);
    } else {
      const Quantizer& quantizer = moment.quantizers[line.layer];
      const CodeImage image = convolutions[i]->prepare(codes, quantizer.digit(quantizer.zero_point));
      encode_line(line, moment.norms, quantizer, memory, image);
    }
    const auto middle = seconds ? Clock::now() : start;
    if (line.layer >= 0) {
      (*convolutions[i])(codes, moment, line.residual < 0 ? nullptr : memory + line.residual, memory + line.target);
    }
    if (seconds) {
      seconds->coding += std::chrono::duration<double>(middle - start).count();
      seconds->multiplying += std::chrono::duration<double>(Clock::now() - middle).count();
    }
  }
}

// Memory of a thread, reused by the next call: allocating new pages would take up to a tenth of the run time.
class Scratch {
 public:
  float* states(int64_t count) { return grow(states_, count * sizeof(float)); }
  uint8_t* codes(int64_t count) { return grow(codes_, count); }

 private:
  template <class Number>
  struct Buffer {
    std::unique_ptr<Number, void (*)(void*)> data{nullptr, std::free};
    size_t bytes = 0;
  };

  template <class Number>
  static Number* grow(Buffer<Number>& buffer, size_t bytes) {
    if (bytes > buffer.bytes) {
      const size_t whole = (bytes + 63) / 64 * 64;
      buffer.bytes = 0;
      buffer.data.reset(static_cast<Number*>(std::aligned_alloc(64, whole)));
      if (!buffer.data) throw std::bad_alloc();
      buffer.bytes = whole;
    }
    return buffer.data.get();
  }

  Buffer<float> states_;
  Buffer<uint8_t> codes_;
};

thread_local Scratch scratch;

struct Job {
  const Program* program;
  Convolutions steps;
  const Moment* const* moments;
  const float* sample;
  float* result;
  int64_t count;
  double* seconds;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex{};

  // Copy an image, float (channels, pixels), into a state. Return whether all of its values are finite.
  static bool enter(const float* image, int64_t channels, int64_t pixels, float* state) {
    float zero = 0.0f;
    std::fill_n(state, pixels * filled(channels), 0.0f);
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t pixel = 0; pixel < pixels; ++pixel, ++image) {
        zero += *image * 0.0f;  // becomes NaN if a value is NaN or infinite
        state[pixel * filled(channels) + channel] = *image;
      }
    return zero == 0.0f;
  }

  // Process the remaining images one by one. If an image has a value that is not finite, its result is NaN.
  void work() {
    float* memory = scratch.states(program->memory);
    uint8_t* codes = scratch.codes(widest(steps));
    const int64_t in = program->in_channels * program->in_pixels, out = program->out_channels * program->out_pixels;
    Seconds spent;
    for (int64_t image; (image = next.fetch_add(1)) < count;) {
      float* to = result + image * out;
      if (!enter(sample + image * in, program->in_channels, program->in_pixels, memory + program->sample)) {
        std::fill_n(to, out, NAN);
        continue;
      }
      run(*program, steps, *moments[image], memory, codes, seconds ? &spent : nullptr);
      const float* state = memory + program->result;
      for (int64_t channel = 0; channel < program->out_channels; ++channel)
        for (int64_t pixel = 0; pixel < program->out_pixels; ++pixel)
          *to++ = state[pixel * filled(program->out_channels) + channel];
    }
    if (seconds) {
      const std::lock_guard<std::mutex> lock(mutex);
      seconds[0] += spent.coding;
      seconds[1] += spent.multiplying;
    }
  }
};

// Run `work`. Return false if memory is insufficient.
template <class Work>
bool done(Work work) {
  try {
    work();
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// sin and cos of x, |x| ≤ 2^20, within 1e-15: reduce x by a multiple of π/2, then use the Taylor series.
void sine_cosine(double x, double* sine, double* cosine) {
  const double n = std::nearbyint(x * 0.63661977236758134308);
  // π/2 is split into three parts, the first two of 33 bits, so that their products with n are exact.
  const double r = ((x - n * 1.57079632673412561417) - n * 6.07710050630396597660e-11) - n * 2.02226624879595063154e-21;
  double s = 1.0, c = 1.0;
  for (int k = 20; k >= 2; k -= 2) {
    s = 1.0 - s * (r * r) / ((k + 1) * k);
    c = 1.0 - c * (r * r) / (k * (k - 1));
  }
  s *= r;
  const double table[] = {s, c, -s, -c};
  const int64_t quarter = static_cast<int64_t>(n) & 3;
  *sine = table[quarter];
  *cosine = table[(quarter + 1) & 3];
}

// e^x for −700 ≤ x ≤ 0, within 1e-15.
double exponential(double x) {
  const double n = std::nearbyint(x * 1.44269504088896340736);
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double e = 1.0;
  for (int k = 20; k >= 1; --k) e = 1.0 + e * r / k;
  return std::ldexp(e, static_cast<int>(n));
}

// ln x for x > 0, within 1e-15: x = m · 2^exponent with m in [√½, √2), and ln m = 2 · artanh((m − 1) / (m + 1)) by its
// series.
double logarithm(double x) {
  int exponent;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752440) {
    m *= 2.0;
    --exponent;
  }
  const double z = (m - 1.0) / (m + 1.0);
  double sum = 0.0;
  for (int k = 27; k >= 1; k -= 2) sum = sum * (z * z) + 1.0 / k;
  return exponent * 6.93147180369123816490e-01 + (2.0 * z * sum + exponent * 1.90821492927058770002e-10);
}

}  // namespace

API int32_t runs_here() { return processor_has_it(); }

// Return the SHA-256 of the sources that this was built from, as in setup.py and quant/integer/binding.py.
API const char* sources() { return SOURCES; }

// Return the offset that is subtracted from a code before multiplication; the shifts of a moment include it.
API int32_t code_offset() { return kCodeOffset; }

// Write the codes, or a digit of them, of a line's states in `memory` to `codes`, uint8 (height · factor,
// width · factor, channels).
API void encode(const Line* line, const Norm* norms, const Quantizer* quantizer, const float* memory, uint8_t* codes) {
  const int64_t channels = line->kind == kAttention ? line->source_channels / 3 : line->source_channels;
  const int64_t pixel = channels + line->skip_channels;
  encode_line(*line, norms, *quantizer, memory, {codes, pixel, line->width * line->factor * pixel});
}

// Run a line without a layer on the states in `memory`.
API void change(const Line* line, const Norm* norms, float* memory) { change_state(*line, norms, memory); }

// Run a program on the states in `memory`. Return false if memory is insufficient.
API int32_t execute(const Program* program, const Moment* moment, float* memory) {
  return done([&] {
    const Convolutions steps = convolutions(*program);
    run(*program, steps, *moment, memory, scratch.codes(widest(steps)), nullptr);
  });
}

// Run a program on each image of `sample` at its own moment. `sample` and `result` are float (count, channels, pixels).
//
// `parallel` runs a task in several threads, as GOMP_parallel of GCC's OpenMP does; null: in the calling thread only.
// `seconds`: null, or two numbers to which the threads' time for codes and for products is added.
// Return false if memory is insufficient.
API int32_t denoise(const Program* program, const Moment* const* moments, const float* sample, float* result,
                    int64_t count, void (*parallel)(void (*)(void*), void*, unsigned, unsigned), unsigned threads,
                    double* seconds) {
  Job job{program, convolutions(*program), moments, sample, result, count, seconds};
  const auto task = [](void* data) {  // an exception must not leave a thread
    Job& job = *static_cast<Job*>(data);
    job.failed = job.failed | !done([&job] { job.work(); });
  };
  if (parallel && threads > 1 && count > 1) {
    parallel(task, &job, static_cast<unsigned>(std::min<int64_t>(threads, count)), 0);
  } else if (count > 0) {
    task(&job);
  }
  return !job.failed;
}

// Write the sinusoidal embedding of a timestep (Vaswani et al., arXiv 1706.03762, section 3.5; DDPM's order), float
// (2 · half,).
API void sinusoids(float t, int64_t half, float shift, int64_t cosine_first, float* to) {
  float *sines = to + (cosine_first ? half : 0), *cosines = to + (cosine_first ? 0 : half);
  for (int64_t i = 0; i < half; ++i) {
    // The angle is rounded to float, as in training.
    const float exponent = -9.21034037f * static_cast<float>(i) / (static_cast<float>(half) - shift);
    const float angle = t * static_cast<float>(exponential(exponent));
    double sine, cosine;
    sine_cosine(angle, &sine, &cosine);
    sines[i] = static_cast<float>(sine);
    cosines[i] = static_cast<float>(cosine);
  }
}

// Write the random Fourier features of log t, t > 0 (NCSN++, arXiv 2011.13456), float (2 · half,).
API void fourier(float t, int64_t half, const float* frequencies, int64_t cosine_first, float* to) {
  float *sines = to + (cosine_first ? half : 0), *cosines = to + (cosine_first ? 0 : half);
  const float x = static_cast<float>(logarithm(t));
  for (int64_t i = 0; i < half; ++i) {
    // The angle is rounded to float, as in training.
    const float angle = x * frequencies[i] * 2.0f * 3.14159265f;
    double sine, cosine;
    sine_cosine(angle, &sine, &cosine);
    sines[i] = static_cast<float>(sine);
    cosines[i] = static_cast<float>(cosine);
  }
}
