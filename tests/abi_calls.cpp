// Makes the calls of rnnkern_abi.h that come from the standard input, and writes what they give to the standard output:
// for machines that are emulated, where Python is not. tools/bits is at the other end; `Program` there says what an
// array is and in which order they come. Its argument is how many threads to use.
#include <rnnkern_abi.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

namespace {

struct Call {
  char cell[32];
  std::int64_t element_bytes, input_size, hidden_size, proj_size, num_layers, directions, biased, steps, batch;
};

[[noreturn]] void fail(const char* what, const char* why) {
  std::fprintf(stderr, "%s: %s\n", what, why);
  std::exit(1);
}

bool read(void* to, std::size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

struct Array {
  bool given = true;
  std::vector<char> bytes;

  Array() = default;
  explicit Array(std::int64_t size) : bytes(static_cast<std::size_t>(size)) {}

  void* data() { return given ? bytes.data() : nullptr; }
  std::int64_t size() const { return static_cast<std::int64_t>(bytes.size()); }
  rnnkern_memory memory() { return {data(), size()}; }
};

// Its size in bytes comes first; -1: null.
Array read_array() {
  std::int64_t size = 0;
  if (!read(&size, sizeof size)) fail("array", "the input ends");
  Array array(size < 0 ? 0 : size);
  array.given = size >= 0;
  if (!read(array.bytes.data(), array.bytes.size())) fail("array", "the input ends");
  return array;
}

struct Arrays {
  std::vector<Array> all;
  std::vector<void*> pointers;

  static Arrays read(std::int64_t count) {
    Arrays arrays;
    for (std::int64_t i = 0; i < count; ++i) arrays.all.push_back(read_array());
    return arrays;
  }
  static Arrays like(const Arrays& others) {
    Arrays arrays;
    for (const Array& one : others.all) arrays.all.emplace_back(one.size());
    return arrays;
  }
  rnnkern_arrays get() {
    pointers.clear();
    for (Array& one : all) pointers.push_back(one.data());
    return {pointers.data(), static_cast<std::int64_t>(pointers.size())};
  }
};

void write(const Array& array) { std::fwrite(array.bytes.data(), 1, array.bytes.size(), stdout); }
void write(const Arrays& arrays) {
  for (const Array& one : arrays.all) write(one);
}

void run(const rnnkern_functions& kernels, const Call& given) {
  rnnkern_stack stack{};
  stack.cell = given.cell, stack.element_bytes = given.element_bytes;
  stack.input_size = given.input_size, stack.hidden_size = given.hidden_size, stack.proj_size = given.proj_size;
  stack.num_layers = given.num_layers, stack.directions = given.directions;
  stack.reverse[1] = true, stack.biased = given.biased != 0;
  rnnkern_message why;
  rnnkern_sizes sizes;
  if (!kernels.sizes(&stack, given.steps, given.batch, &sizes, &why)) fail("sizes", why.text);
  Arrays weights = Arrays::read(sizes.weights);
  Array x = read_array(), lengths = read_array(), resets = read_array();
  Arrays masks = Arrays::read(given.num_layers - 1);
  Arrays initial = Arrays::read(sizes.states);
  Array dy = read_array();
  Arrays dlast = Arrays::read(sizes.states);

  const std::int64_t P = given.proj_size ? given.proj_size : given.hidden_size;
  const std::int64_t rows = given.batch * given.directions * given.element_bytes;
  Array y(given.steps * rows * P), dx(x.size());
  Arrays last;
  for (std::int64_t s = 0; s < sizes.states; ++s)
    last.all.emplace_back(given.num_layers * rows * (s == 0 ? P : given.hidden_size));
  Arrays dinitial = Arrays::like(last), gradients = Arrays::like(weights);

  const bool masked = given.num_layers > 1 && masks.all[0].given;
  for (const bool training : {true, false}) {
    if (masked && !training) break;
    Array packed(training ? sizes.packed_for_training : sizes.packed_for_inference);
    Array kept(!training ? 0 : masked ? sizes.kept_with_masks : sizes.kept);
    const rnnkern_pack pack{training, weights.get(), packed.memory()};
    if (!kernels.pack(&stack, &pack, &why)) fail("pack", why.text);
    rnnkern_forward forward{};
    forward.steps = given.steps, forward.batch = given.batch;
    forward.lengths = static_cast<const std::int64_t*>(lengths.data());
    forward.resets = static_cast<const std::uint8_t*>(resets.data());
    forward.masks = masked ? masks.get().data : nullptr;
    forward.x = x.data(), forward.y = y.data();
    forward.initial = initial.get(), forward.last = last.get();
    forward.packed = packed.memory();
    forward.training = training, forward.kept = kept.memory();
    if (!kernels.forward(&stack, &forward, &why)) fail("forward", why.text);
    write(y), write(last);
    if (!training) break;
    const rnnkern_backward backward{&forward, dy.data(), dlast.get(), dx.data(), dinitial.get(), gradients.get()};
    if (!kernels.backward(&stack, &backward, &why)) fail("backward", why.text);
    write(dx), write(dinitial), write(gradients);
  }
  std::fflush(stdout);
}

}  // namespace

extern "C" void rnnkern_set_num_threads(int count);

int main(int, char** arguments) {
  if (arguments[1]) rnnkern_set_num_threads(std::atoi(arguments[1]));
  const rnnkern_functions* kernels = rnnkern_abi(RNNKERN_ABI_VERSION);
  if (kernels == nullptr) fail("rnnkern_abi", "another version");
  for (Call call; read(&call, sizeof call);) run(*kernels, call);
}
