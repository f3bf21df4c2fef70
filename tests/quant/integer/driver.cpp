// The core as a program, without Python and PyTorch: `driver INPUT OUTPUT`. test_native.py writes the input, in the
// order of its `write_input`, and knows what the output must be.
//
// Every array has a block of its own, exactly as large as the array: a sanitizer sees what is read or written past it.

#include <sanitizer/asan_interface.h>

#include <cstdio>

#include "core.cpp"

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(2);
}

std::FILE* open(const char* path, const char* mode) {
  std::FILE* file = std::fopen(path, mode);
  require(file, path);
  return file;
}

// The next array of a file: how many bytes it has, then the bytes.
template <class Item>
std::vector<Item> read(std::FILE* file) {
  int64_t bytes = 0;
  require(std::fread(&bytes, sizeof bytes, 1, file) == 1, "the input ends too early");
  std::vector<Item> items(bytes / sizeof(Item));
  require(std::fread(items.data(), sizeof(Item), items.size(), file) == items.size(), "an array ends too early");
  return items;
}

void write(std::FILE* file, const std::vector<float>& items) {
  require(std::fwrite(items.data(), sizeof(float), items.size(), file) == items.size(), "the output cannot be written");
}

// The tables that every program reads, with all that they point to.
struct Network {
  std::vector<Layer> layers;
  std::vector<Norm> norms;
  std::vector<std::vector<int8_t>> weights;
  std::vector<std::vector<float>> factors;

  explicit Network(std::FILE* file) : layers(read<Layer>(file)), norms(read<Norm>(file)) {
    for (Layer& layer : layers) layer.weight = weights.emplace_back(read<int8_t>(file)).data();
    for (Norm& norm : norms) {
      norm.weight = factors.emplace_back(read<float>(file)).data();
      norm.bias = factors.emplace_back(read<float>(file)).data();
    }
  }
};

struct Steps {
  Program program;
  std::vector<Line> lines;

  Steps(std::FILE* file, const Network& network) : program(read<Program>(file).at(0)), lines(read<Line>(file)) {
    program.lines = lines.data();
    program.layers = network.layers.data();
  }
};

int64_t length(int64_t size, int64_t border, int64_t dilation, int64_t kernel, int64_t stride) {
  return (size + border - dilation * (kernel - 1) - 1) / stride + 1;
}

// A program again, one line after the other, its codes in blocks of their own. Of the states in memory, a sanitizer
// lets a line touch its own alone.
void run_line_by_line(Program program, const Moment& moment, std::vector<float>& memory) {
  const Line* const lines = program.lines;
  const int64_t num_lines = program.num_lines;
  for (int64_t i = 0; i < num_lines; ++i) {
    const Line& line = lines[i];
    const int64_t pixels = line.height * line.width;
    const auto allow = [&](int64_t state, int64_t floats) {
      if (state >= 0) ASAN_UNPOISON_MEMORY_REGION(memory.data() + state, floats * sizeof(float));
    };
    if (line.layer < 0) {
      const int64_t made =
          resampled_size(line.resampling, line.height) * resampled_size(line.resampling, line.width);
      ASAN_POISON_MEMORY_REGION(memory.data(), memory.size() * sizeof(float));
      allow(line.source, pixels * filled(line.source_channels));
      allow(line.target, made * filled(line.source_channels));
      change(&line, moment.norms, memory.data());
      ASAN_UNPOISON_MEMORY_REGION(memory.data(), memory.size() * sizeof(float));
      continue;
    }
    const Layer& layer = program.layers[line.layer];
    const int64_t height = line.height * line.factor, width = line.width * line.factor;
    const int64_t out_pixels =
        length(height, layer.top + layer.bottom, layer.dilation_y, layer.kernel_height, layer.stride_y) *
        length(width, layer.left + layer.right, layer.dilation_x, layer.kernel_width, layer.stride_x);
    ASAN_POISON_MEMORY_REGION(memory.data(), memory.size() * sizeof(float));
    allow(line.source, pixels * filled(line.source_channels));
    allow(line.skip, pixels * filled(line.skip_channels));
    std::vector<uint8_t> bare(height * width * layer.in_channels);
    encode(&line, moment.norms, &moment.quantizers[line.layer], memory.data(), bare.data());
    allow(line.residual, out_pixels * filled(layer.out_channels));
    allow(line.target, out_pixels * filled(layer.out_channels));
    program.lines = &line;
    program.num_lines = 1;
    const Convolutions one = convolutions(program);
    std::vector<uint8_t> codes(one[0]->bytes());
    run(program, one, moment, memory.data(), codes.data(), nullptr);
    ASAN_UNPOISON_MEMORY_REGION(memory.data(), memory.size() * sizeof(float));
  }
}

// Where in the time program's memory lies what is added to a layer's output channels.
struct Added {
  int64_t state, first_channel, channels;
};

// Where in it lies what a normalisation's channels are scaled by, and behind it what they are shifted by.
struct Modulated {
  int64_t state, norm, channels;
};

}  // namespace

int main(int, char** argv) {
  std::FILE *input = open(argv[1], "rb"), *output = open(argv[2], "wb");
  const auto options = read<int64_t>(input);
  const int64_t half = options.at(0), shift = options.at(1), cosine_first = options.at(2), count = options.at(3);
  const Network network(input);
  const auto weight_sums = read<int32_t>(input);
  const auto biases = read<float>(input);
  const Steps embedding(input, network), unet(input, network);
  const auto added = read<Added>(input);
  const auto modulated = read<Modulated>(input);
  const Program& program = unet.program;

  for (int64_t image = 0; image < count; ++image) {
    const float t = read<float>(input).at(0);
    const auto quantizers = read<Quantizer>(input);
    const auto slopes = read<float>(input), sample = read<float>(input);

    // What quant/integer/model.py prepares for a timestep; shifts depend on the instruction set.
    std::vector<int32_t> shifts(weight_sums.size());
    for (size_t i = 0; i < network.layers.size(); ++i)
      for (int64_t channel = 0; channel < network.layers[i].out_channels; ++channel) {
        const int64_t of_all = network.layers[i].first_channel + channel;
        shifts[of_all] = weight_sums[of_all] * (quantizers[i].digit(quantizers[i].zero_point) - code_offset());
      }
    std::vector<float> offsets = biases, waves(2 * half), time(embedding.program.memory);
    std::vector<Norm> norms = network.norms;
    const Moment moment{quantizers.data(), shifts.data(), slopes.data(), offsets.data(), norms.data()};
    sinusoids(t, half, shift, cosine_first, waves.data());
    std::copy(waves.begin(), waves.end(), time.begin());
    execute(&embedding.program, &moment, time.data());
    for (const Added& part : added)
      for (int64_t i = 0; i < part.channels; ++i) offsets[part.first_channel + i] += time[part.state + i];
    std::vector<std::vector<float>> factors;
    for (const Modulated& part : modulated) {
      std::vector<float> weight(part.channels), bias(part.channels);
      for (int64_t i = 0; i < part.channels; ++i) {
        const float factor = 1.0f + time[part.state + i];
        weight[i] = norms[part.norm].weight[i] * factor;
        bias[i] = norms[part.norm].bias[i] * factor + time[part.state + part.channels + i];
      }
      norms[part.norm].weight = factors.emplace_back(std::move(weight)).data();
      norms[part.norm].bias = factors.emplace_back(std::move(bias)).data();
    }
    write(output, offsets);

    std::vector<float> eps(program.out_channels * program.out_pixels), memory(program.memory);
    const Moment* const moments[] = {&moment};
    denoise(&program, moments, sample.data(), eps.data(), 1, nullptr, 1, nullptr);
    write(output, eps);

    Job::enter(sample.data(), program.in_channels, program.in_pixels, memory.data() + program.sample);
    run_line_by_line(program, moment, memory);
    for (int64_t i = 0; i < program.out_channels * program.out_pixels; ++i) {
      const int64_t channel = i / program.out_pixels, pixel = i % program.out_pixels;
      const float value = memory[program.result + pixel * filled(program.out_channels) + channel];
      require(std::memcmp(&value, &eps[i], sizeof value) == 0, "line by line it is another image");
    }
  }
  require(std::fclose(output) == 0, "the output cannot be written");
  std::fclose(input);
}
