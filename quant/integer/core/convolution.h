// Convolution of codes with packed weights: products are summed exactly in 32 bits, then converted to float.

#pragma once

#include <array>
#include <utility>
#include <vector>

#include "codes.h"

namespace {

class Convolution {
 public:
  // The image has rows × columns pixels without its border.
  Convolution(const Layer& layer, int64_t rows, int64_t columns)
      : layer_(layer), channels_((layer.in_channels + 3) / 4 * 4), height_(layer.top + rows + layer.bottom),
        width_(layer.left + columns + layer.right),
        out_height_((height_ - layer.dilation_y * (layer.kernel_height - 1) - 1) / layer.stride_y + 1),
        out_width_((width_ - layer.dilation_x * (layer.kernel_width - 1) - 1) / layer.stride_x + 1) {
    for (int64_t y = 0; y < layer.kernel_height; ++y)
      for (int64_t x = 0; x < layer.kernel_width; ++x)
        for (int64_t channel = 0; channel < channels_; channel += 4)
          fours_.push_back((y * layer.dilation_y * width_ + x * layer.dilation_x) * channels_ + channel);
  }

  // Size of the codes, including the border.
  int64_t bytes() const { return height_ * width_ * channels_; }

  // Return the image to write codes into. Its border is filled with the code of 0.0 and needs no special case later.
  CodeImage prepare(uint8_t* buffer, uint8_t zero_point) const {
    const int64_t inside = (width_ - layer_.left - layer_.right) * channels_;
    const int64_t before = (layer_.top * width_ + layer_.left) * channels_;
    const int64_t between = (layer_.right + layer_.left) * channels_;
    uint8_t* row = buffer + before;
    std::memset(buffer, zero_point, layer_.in_channels % 4 ? bytes() : before);  // also the padding of channels
    for (int64_t y = layer_.top; y < height_ - layer_.bottom; ++y, row += inside + between) {
      uint8_t *end = row + inside, *last = buffer + bytes();
      std::memset(end, zero_point, y + 1 < height_ - layer_.bottom ? between : last - end);
    }
    return {buffer + before, channels_, width_ * channels_};
  }

  // Compute out (pixels, out_channels) from codes, and add `residual` unless it is null.
  void operator()(const uint8_t* codes, const Moment& moment, const float* residual, float* out) const {
    if (Dot::capacity(layer_.largest_product) >= 4) {
      run<Dot>(codes, moment, residual, out);
    } else {
      run<WideDot>(codes, moment, residual, out);
    }
  }

 private:
  struct Rows {
    int64_t count, length;
  };
  // Adjacent tiles of one size: `count` in each row, starting at pixel `x`.
  struct Tiles {
    int64_t block, x, count;
    Rows rows;
  };
  using Run = void (Convolution::*)(const uint8_t*, Tiles, const Moment&, const float*, float*) const;

  template <class Kernel>
  void run(const uint8_t* codes, const Moment& moment, const float* residual, float* out) const {
    // 1×1 convolutions without stride and border treat the image as one long row.
    const bool joined = layer_.kernel_height * layer_.kernel_width * layer_.stride_y * layer_.stride_x == 1 &&
                        height_ * width_ == out_height_ * out_width_;
    const Rows rows = joined ? Rows{1, out_height_ * out_width_} : Rows{out_height_, out_width_};
    const int64_t blocks = filled(layer_.out_channels) / kLanes;
    int64_t block = 0;
    for (; block + Kernel::kBlocks <= blocks; block += Kernel::kBlocks)
      run<Kernel, Kernel::kBlocks>(codes, block, rows, moment, residual, out);
    for (; block < blocks; ++block) run<Kernel, 1>(codes, block, rows, moment, residual, out);
  }

  // Split each row into as few tiles as possible, of two sizes that differ by one pixel.
  template <class Kernel, int kBlocks>
  void run(const uint8_t* codes, int64_t block, Rows rows, const Moment& moment, const float* residual,
           float* out) const {
    static constexpr auto runs = sizes<Kernel, kBlocks>(std::make_index_sequence<Kernel::kPixels>());
    const int64_t count = (rows.length + Kernel::kPixels - 1) / Kernel::kPixels;
    const int64_t small = rows.length / count, large = rows.length % count;
    if (large > 0) (this->*runs[small])(codes, {block, 0, large, rows}, moment, residual, out);
    (this->*runs[small - 1])(codes, {block, large * (small + 1), count - large, rows}, moment, residual, out);
  }

  template <class Kernel, int kBlocks, size_t... kIndex>
  static constexpr std::array<Run, sizeof...(kIndex)> sizes(std::index_sequence<kIndex...>) {
    return {&Convolution::tiles<Kernel, kBlocks, kIndex + 1>...};
  }

  // A tile is kPixels adjacent pixels of a row × kBlocks blocks of 16 output channels. Its sums stay in registers.
  template <class Kernel, int kBlocks, int kPixels>
  __attribute__((noinline)) void tiles(const uint8_t* codes, Tiles tiles, const Moment& moment, const float* residual,
                                       float* out) const {
    const int64_t num_fours = fours_.size(), stride = layer_.stride_x * channels_;
    const int64_t capacity = std::min(Kernel::capacity(layer_.largest_product), num_fours);
    const int64_t pixel_floats = filled(layer_.out_channels);
    for (int64_t i = 0; i < tiles.rows.count * tiles.count; ++i) {
      const int64_t y = i / tiles.count, x = tiles.x + i % tiles.count * kPixels;
      const int8_t* weight = layer_.weight + tiles.block * num_fours * 64;
      const uint8_t* first = codes + (y * layer_.stride_y * width_ + x * layer_.stride_x) * channels_;
      Ints totals[kPixels][kBlocks];
      for (int64_t start = 0; start < num_fours; start += capacity) {
        typename Kernel::Sums sums[kPixels][kBlocks];
        UNROLLED for (int p = 0; p < kPixels; ++p)
          UNROLLED for (int b = 0; b < kBlocks; ++b) sums[p][b] = typename Kernel::Sums{};
        const int64_t stop = std::min(start + capacity, num_fours);
        for (int64_t four = start; four < stop; ++four, weight += 64) {
          const uint8_t* pixel = first + fours_[four];
          typename Kernel::Weights weights[kBlocks];
          UNROLLED for (int b = 0; b < kBlocks; ++b) weights[b] = Kernel::weights(weight + b * num_fours * 64);
          UNROLLED for (int p = 0; p < kPixels; ++p) {
            const auto of_pixel = Kernel::codes(pixel + p * stride);
            UNROLLED for (int b = 0; b < kBlocks; ++b) Kernel::add(sums[p][b], of_pixel, weights[b]);
          }
        }
        UNROLLED for (int p = 0; p < kPixels; ++p)
          UNROLLED for (int b = 0; b < kBlocks; ++b) {
            const Ints total = Kernel::total(sums[p][b]);
            totals[p][b] = start == 0 ? total : totals[p][b] + total;
          }
      }
      UNROLLED for (int b = 0; b < kBlocks; ++b) {
        const int64_t channel = (tiles.block + b) * kLanes, of_all = layer_.first_channel + channel;
        const Ints shift = load(moment.shifts + of_all);
        const Floats slope = load(moment.slopes + of_all), offset = load(moment.offsets + of_all);
        const int64_t to = (y * out_width_ + x) * pixel_floats + channel;
        UNROLLED for (int p = 0; p < kPixels; ++p) {
          Floats value = to_floats(totals[p][b] - shift) * slope + offset;
          if (residual) value = value + load(residual + to + p * pixel_floats);
          store(value, out + to + p * pixel_floats);
        }
      }
    }
  }

  const Layer& layer_;
  int64_t channels_, height_, width_;  // of the codes: channels padded to a multiple of 4, border included
  int64_t out_height_, out_width_;
  std::vector<int32_t> fours_;  // offsets of all groups of four codes that contribute to an output pixel
};

}  // namespace
