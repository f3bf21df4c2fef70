// What a program is made of; quant/integer/core.py has the same structures.

#pragma once

#include <cstdint>

// A state through a layer: target = layer(codes(source, skip)) + residual. Without a layer (−1) floats stay floats:
// target = (resampled(source) − centre) / divisor. States are offsets into a thread's memory, in floats; −1 is nothing. A
// state is pixels × channels, the channels filled up with zeros to a multiple of 16.
struct Line {
  int64_t kind, layer, norm, source, source_channels, skip, skip_channels, residual, target, height, width, factor,
      heads, resampling;
  double centre, divisor;
};

// What a line does with the numbers of its source first; all but attention may be preceded by a normalisation
// (`Line::norm`).
enum Kind : int64_t { kQuantize, kSilu, kAttention, kGelu, kRelu, kMish };

// How a line without a layer resamples, by 2: not at all, the mean of 2 × 2 pixels, nearest neighbours, or the filter
// (1, 3, 3, 1) / 8 of NCSN++ (arXiv 2011.13456), beyond the border either zeros or the image in a mirror.
enum Resampling : int64_t { kKeep, kPool, kEnlarge, kFilterDown, kFilterUp, kMirrorDown, kMirrorUp };

// Weights lie as (channels / 16, kernel height, kernel width, input channels / 4, 16, 4), filled up with zeros.
struct Layer {
  int64_t in_channels, out_channels, kernel_height, kernel_width, stride_y, stride_x, dilation_y, dilation_x, top, left,
      bottom, right;
  int64_t largest_product;  // of a code and a weight
  int64_t first_channel;    // where its values begin in a moment's
  const int8_t* weight;
};

struct Norm {
  int64_t groups;
  double eps;
  const float *weight, *bias;
};

// Codes are clamp(round(x / step size) + zero_point, 0, largest code): inverse is one over the step size, low and high
// are the range less the zero point. A line takes the eight bits of a code from bit `shift` on: codes of 16 bits are two
// digits of 8, each with a line of its own.
struct Quantizer {
  float inverse, low, high;
  int32_t zero_point, shift;

  // Of a code, which the zero point is too.
  uint8_t digit(int32_t code) const { return static_cast<uint8_t>(code >> shift); }
};

// What the lines need to know of a timestep. A sum of products becomes (sum − shift) · slope + offset.
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
  int64_t memory;  // floats that a thread needs
};
