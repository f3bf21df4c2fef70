// Operations between layers that compute one float state from another: resampling, centring, division.

#pragma once

#include "codes.h"

namespace {

// Filter taps of a pixel in a resampled row or column: `count` neighbours, starting at `first`, and their weights.
struct Taps {
  int64_t first, count;
  float weights[4];
};

inline Taps taps(int64_t resampling, int64_t index) {
  switch (resampling) {
    case kPool:
      return {2 * index, 2, {0.5f, 0.5f}};
    case kEnlarge:
      return {index / 2, 1, {1.0f}};
    case kFilterDown:
    case kMirrorDown:
      return {2 * index - 1, 4, {0.125f, 0.375f, 0.375f, 0.125f}};
    case kFilterUp:
    case kMirrorUp:
      if (index % 2) return {index / 2, 2, {0.75f, 0.25f}};
      return {index / 2 - 1, 2, {0.25f, 0.75f}};
    default:
      return {index, 1, {1.0f}};
  }
}

inline int64_t resampled_size(int64_t resampling, int64_t size) {
  if (resampling == kPool || resampling == kFilterDown || resampling == kMirrorDown) return size / 2;
  if (resampling == kEnlarge || resampling == kFilterUp || resampling == kMirrorUp) return 2 * size;
  return size;
}

// Return which of `size` pixels is used for `index`, by reflection padding; −1 means zero padding.
inline int64_t inside(int64_t resampling, int64_t index, int64_t size) {
  if (resampling == kMirrorDown || resampling == kMirrorUp) {
    if (index < 0) index = -index;
    if (index >= size) index = 2 * size - 2 - index;
  }
  return index < size ? std::max<int64_t>(index, -1) : -1;
}

// Products of the weights are exact, and sums start with the top left pixel: the bytes are the same everywhere.
template <Kind kKind>
void resample(const Line& line, const float* slope, const float* shift, const float* source, float* target) {
  const State x{source, line.source_channels};
  const Floats centre = all(static_cast<float>(line.centre)), divisor = all(static_cast<float>(line.divisor));
  const int64_t height = resampled_size(line.resampling, line.height);
  const int64_t width = resampled_size(line.resampling, line.width);
  for (int64_t channel = 0; channel < x.channels; channel += kLanes) {
    const int64_t count = std::min(kLanes, x.channels - channel);
    const Floats a = load(slope + channel), b = load(shift + channel);
    float* to = target + channel;
    for (int64_t row = 0; row < height; ++row) {
      const Taps rows = taps(line.resampling, row);
      for (int64_t column = 0; column < width; ++column, to += filled(x.channels)) {
        const Taps columns = taps(line.resampling, column);
        Floats sum = all(0.0f);
        for (int64_t i = 0; i < rows.count; ++i) {
          const int64_t from_row = inside(line.resampling, rows.first + i, line.height);
          if (from_row < 0) continue;
          for (int64_t j = 0; j < columns.count; ++j) {
            const int64_t from = inside(line.resampling, columns.first + j, line.width);
            if (from < 0) continue;
            const Floats value = activated<kKind>(load(x.pixel(from_row * line.width + from) + channel) * a + b);
            sum = sum + all(rows.weights[i] * columns.weights[j]) * value;
          }
        }
        store((sum - centre) / divisor, to);
        std::fill(to + count, to + kLanes, 0.0f);
      }
    }
  }
}

// Run a line without a layer.
inline void change_state(const Line& line, const Norm* norms, float* memory) {
  const State x{memory + line.source, line.source_channels};
  std::vector<float> slope(x.channels + kLanes, 1.0f), shift(x.channels + kLanes, 0.0f);
  if (line.norm >= 0) {
    normalise(norms[line.norm], x, {nullptr, 0}, line.height * line.width, slope.data(), shift.data());
  }
  const auto write = line.kind == kSilu   ? resample<kSilu>
                     : line.kind == kGelu ? resample<kGelu>
                     : line.kind == kRelu ? resample<kRelu>
                     : line.kind == kMish ? resample<kMish>
                                          : resample<kQuantize>;
  write(line, slope.data(), shift.data(), x.data, memory + line.target);
}

}  // namespace
