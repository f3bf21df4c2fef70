// Structures of a program; those of quant/integer/binding.py must match.

#pragma once

#include <cstdint>

// Instruction of a program: target = layer(codes(source, skip)) + residual. Without a layer (−1), values stay float:
// target = (resampled(source) − centre) / divisor. States are offsets into a thread's memory, in floats; −1 means none.
// A state is pixels × channels, with the channels zero-padded to a multiple of 16.
struct Line {
  int64_t kind, layer, norm, source, source_channels, skip, skip_channels, residual, target, height, width, factor,
      heads, resampling;
  double centre, divisor;
};

// First operation of a line on its source. All but attention may follow a normalisation (`Line::norm`).
enum Kind : int64_t { kQuantize, kSilu, kAttention, kGelu, kRelu, kMish };

// Resampling, by 2, of a line without a layer: none, the mean of 2 × 2 pixels, nearest neighbour, or the filter
// (1, 3, 3, 1) / 8 of NCSN++ (arXiv 2011.13456) with zero padding or with reflection padding.
enum Resampling : int64_t { kKeep, kPool, kEnlarge, kFilterDown, kFilterUp, kMirrorDown, kMirrorUp };

// Weights are (channels / 16, kernel height, kernel width, input channels / 4, 16, 4), padded with zeros.
struct Layer {
  int64_t in_channels, out_channels, kernel_height, kernel_width, stride_y, stride_x, dilation_y, dilation_x, top, left,
      bottom, right;
  int64_t largest_product;  // of an input code and a weight code
  int64_t first_channel;    // index of its first value in the arrays of a moment
  const int8_t* weight;
};

struct Norm {
  int64_t groups;
  double eps;
  const float *weight, *bias;
};

// Codes are clamp(round(x / step size) + zero_point, 0, largest code): inverse is 1 / step size, low and high are the
// bounds minus the zero point. A line uses the eight bits of a code from bit `shift` on: codes of 16 bits are two
// digits of 8 bits, each with its own line.
struct Quantizer {
  float inverse, low, high;
  int32_t zero_point, shift;

  // Return the digit of a code or of the zero point.
  uint8_t digit(int32_t code) const { return static_cast<uint8_t>(code >> shift); }
};

// Parameters of the lines that depend on the timestep. A sum of products becomes (sum − shift) · slope + offset.
struct Moment {
  const Quantizer* quantizers;
  const int32_t* shifts;
  const float *slopes, *offsets;
  const Norm* norms;
};

struct Program {
  int64_t sample, in_channels, in_pixels, result, out_channels, out_pixels;
  int64_t num_lines;
  const Line* lines;
  const Layer* layers;
  int64_t memory;  // number of floats that a thread needs
};
