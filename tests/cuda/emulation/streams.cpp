// csrc/cuda/core/stream.h in a process that has, or has not, loaded a libtorch_cuda for itself alone, as
// Python does. Prints the streams of devices 0 to 2, of a torch that tells them and of one that does not, or
// "none".
#include <cstdio>

#include "../../../csrc/cuda/core/stream.h"

struct Telling {
  int8_t device;
  void* native_handle() const { return reinterpret_cast<void*>(0x200 + device); }
};
struct Silent {
  int8_t device;
  int8_t device_index() const { return device; }
};

template <class Stream>
void print() {
  for (int8_t device = 0; device < 3; ++device) {
    void* handle = nullptr;
    if (vitdiv::cuda_stream_of(Stream{device}, &handle))
      std::printf("%p ", handle);
    else
      std::printf("none ");
  }
}

int main(int count, char** arguments) {
  if (count > 1 && dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL) == nullptr) return 1;
  print<Telling>();
  print<Silent>();
}
