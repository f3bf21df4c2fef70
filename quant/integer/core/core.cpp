// A low-bit UNet on integers: a program of layers, run from start to end for one image at a time.
//
// Every line turns a float state into codes and convolves the codes with packed weights into a float state. A thread
// takes an image through the whole program, so its states stay in the cache of one core, and no thread waits for
// another. The bytes of an image depend on nothing else: not on the batch, the threads or the instruction set.
//
// Plain arrays in, plain arrays out: nothing here knows PyTorch, Python or diffusers.

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

// A thread's memory, kept from one call to the next: fresh pages cost as much as a tenth of the work.
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

  // float (channels, pixels) → a state; whether all of it is finite.
  static bool enter(const float* image, int64_t channels, int64_t pixels, float* state) {
    float zero = 0.0f;
    std::fill_n(state, pixels * filled(channels), 0.0f);
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t pixel = 0; pixel < pixels; ++pixel, ++image) {
        zero += *image * 0.0f;  // what is no number, or infinite, stays one that is none
        state[pixel * filled(channels) + channel] = *image;
      }
    return zero == 0.0f;
  }

  // The images that are left, one by one. What is not a number makes an image that is none.
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

// Whether there was memory enough for `work`.
template <class Work>
bool done(Work work) {
  try {
    work();
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// sin and cos of x, |x| ≤ 2^20, within 1e-15: of what is left of x after multiples of π/2, by their Taylor series.
void sine_cosine(double x, double* sine, double* cosine) {
  const double n = std::nearbyint(x * 0.63661977236758134308);
  // π/2 in three parts, the first two of 33 bits, so that n times them is exact.
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

// ln x for x > 0, within 1e-15: of its exponent, and of m in [√½, √2) by the series of 2 · artanh((m − 1) / (m + 1)).
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

// Of what sources this was built: setup.py and quant/integer/core.py work it out alike.
API const char* sources() { return SOURCES; }

// What a code is less than its integer in the products of this instruction set; a moment's shifts contain it.
API int32_t code_offset() { return kCodeOffset; }

// The codes, or their digits, uint8 (height · factor, width · factor, channels), that a line makes of its states in
// `memory`.
API void encode(const Line* line, const Norm* norms, const Quantizer* quantizer, const float* memory, uint8_t* codes) {
  const int64_t channels = line->kind == kAttention ? line->source_channels / 3 : line->source_channels;
  const int64_t pixel = channels + line->skip_channels;
  encode_line(*line, norms, *quantizer, memory, {codes, pixel, line->width * line->factor * pixel});
}

// The target that a line without a layer makes of its source, both in `memory`.
API void change(const Line* line, const Norm* norms, float* memory) { change_state(*line, norms, memory); }

// Run a program on the states in `memory`; whether there was memory enough.
API int32_t execute(const Program* program, const Moment* moment, float* memory) {
  return done([&] {
    const Convolutions steps = convolutions(*program);
    run(*program, steps, *moment, memory, scratch.codes(widest(steps)), nullptr);
  });
}

// sample float (count, channels, pixels) → result, the same, each image at a moment of its own.
//
// `parallel` runs a task in that many threads at once, as GCC's OpenMP does (GOMP_parallel); null: the caller's alone.
// seconds: null, or two numbers that the threads' time for codes and for their products is added to.
// Whether there was memory enough.
API int32_t denoise(const Program* program, const Moment* const* moments, const float* sample, float* result,
                    int64_t count, void (*parallel)(void (*)(void*), void*, unsigned, unsigned), unsigned threads,
                    double* seconds) {
  Job job{program, convolutions(*program), moments, sample, result, count, seconds};
  const auto task = [](void* data) {  // no exception leaves a thread
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

// The sinusoids of a timestep (Vaswani et al., arXiv 1706.03762, section 3.5; DDPM's order), float (2 · half,).
API void sinusoids(float t, int64_t half, float shift, int64_t cosine_first, float* to) {
  float *sines = to + (cosine_first ? half : 0), *cosines = to + (cosine_first ? 0 : half);
  for (int64_t i = 0; i < half; ++i) {
    // The angle is a float, as in the networks that were trained with it.
    const float exponent = -9.21034037f * static_cast<float>(i) / (static_cast<float>(half) - shift);
    const float angle = t * static_cast<float>(exponential(exponent));
    double sine, cosine;
    sine_cosine(angle, &sine, &cosine);
    sines[i] = static_cast<float>(sine);
    cosines[i] = static_cast<float>(cosine);
  }
}

// The random Fourier features of the logarithm of t > 0 (NCSN++, arXiv 2011.13456), float (2 · half,).
API void fourier(float t, int64_t half, const float* frequencies, int64_t cosine_first, float* to) {
  float *sines = to + (cosine_first ? half : 0), *cosines = to + (cosine_first ? 0 : half);
  const float x = static_cast<float>(logarithm(t));
  for (int64_t i = 0; i < half; ++i) {
    // The angle is a float, as in the networks that were trained with it.
    const float angle = x * frequencies[i] * 2.0f * 3.14159265f;
    double sine, cosine;
    sine_cosine(angle, &sine, &cosine);
    sines[i] = static_cast<float>(sine);
    cosines[i] = static_cast<float>(cosine);
  }
}
