// Fibers, collectives and the shadow of shared and device memory; README.md tells how they work.
#undef _FORTIFY_SOURCE  // its longjmp refuses to leave one stack for another
#include "emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <csetjmp>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4 << 10;
constexpr int kGrain = 2;  // bytes per cell of a shadow
constexpr int kMany = -1;  // more than one thread, warp or block

struct Copy {
  uint32_t to;
  const void* from;
  Place place;
};

enum class State { kReady, kInCollective, kAtBarrier, kDone };

class Stack {
 public:
  Stack()
      : base_(static_cast<char*>(mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (base_ == MAP_FAILED || mprotect(base_, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
  }
  ~Stack() { munmap(base_, kGuardBytes + kStackBytes); }
  Stack(const Stack&) = delete;
  char* data() const { return base_ + kGuardBytes; }

 private:
  char* base_;
};

struct Fiber {
  int id = 0;
  State state = State::kReady;
  uint32_t block_barriers = 0, warp_barriers = 0;  // passed; a block barrier counts as both
  Place place;                                     // of the last thing waited for
  std::vector<std::vector<Copy>> groups;           // the last one is open
  Stack stack;
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
};

struct Warp {
  int arrived = 0;
  void (*operation)(void* const*) = nullptr;
  void* lane[32];
};

struct Stamp {
  Place place;
  uint32_t launch, block_barriers, warp_barriers;
  int block, warp, thread;
};
struct Cell {
  Stamp written, read;
  bool initialised, has_written, has_read, in_flight;
};
struct Region {
  const unsigned char* begin;
  int64_t bytes;
  bool writable, initialised;
  std::vector<Cell> shadow;  // of writable memory
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> arena;
std::vector<Cell> arena_shadow;
std::vector<Region> regions;
Fiber* self;
jmp_buf scheduler;
const std::function<void()>* body;
std::string failure;
int waiting;  // at the block's barrier
uint32_t launch_number;

std::string text(Place p) { return std::string(p.file_name()) + ":" + std::to_string(p.line()); }

bool same(Place a, Place b) { return a.line() == b.line() && a.column() == b.column(); }

// setjmp and longjmp between stacks: swapcontext would make two system calls each time.
void yield() {
  ++counts.switches;
  if (_setjmp(self->resume) == 0) _longjmp(scheduler, 1);
}

void resume(Fiber& f) {
  self = &f;
  position.thread = f.id;
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.resume, 1);
  f.started = true;
  setcontext(&f.start);
}

void fiber_main() {
  for (;;) {  // one fiber serves the same thread of every block
    try {
      (*body)();
      if (!self->groups.back().empty() || self->groups.size() > 1)
        for (const auto& group : self->groups)
          if (!group.empty()) fault("copy never waited for", group.front().place);
    } catch (const std::exception& e) {
      failure = e.what();
    }
    self->state = State::kDone;
    yield();
  }
}

Stamp stamp(Place place, bool whole_warp) {
  return {place,          launch_number, self->block_barriers,         self->warp_barriers,
          position.block, self->id / 32, whole_warp ? kMany : self->id};
}

// Is access a ordered before access b, which is happening now? In any schedule: no clock is involved.
bool before(const Stamp& a, const Stamp& b) {
  if (a.launch != b.launch) return true;
  if (a.block != b.block) return false;
  if (a.block_barriers < b.block_barriers) return true;
  if (a.warp != b.warp || a.warp == kMany) return false;
  return a.warp_barriers < b.warp_barriers || (a.thread == b.thread && a.thread != kMany);
}

void check_cell(Cell& c, const Stamp& now, bool write, const char* memory) {
  const auto race = [&](const char* what, const Stamp& earlier) {
    fault(std::string("race in ") + memory + " memory: " + what +
              (earlier.block != now.block ? ", by another block, at " : " and no barrier since, at ") +
              text(earlier.place),
          now.place);
  };
  if (c.in_flight)
    fault("shared memory touched before its copy was waited for, issued at " + text(c.written.place),
          now.place);
  if (c.has_written && !before(c.written, now)) race("written", c.written);
  if (write) {
    if (c.has_read && !before(c.read, now)) race("read", c.read);
    c.written = now;
    c.has_written = c.initialised = true;
    c.has_read = false;
    return;
  }
  if (!c.initialised) fault(std::string(memory) + " memory read before it was written", now.place);
  const Stamp earlier = c.read;
  const bool merge = c.has_read && earlier.launch == now.launch;
  c.read = now;
  c.has_read = true;
  if (!merge) return;
  if (earlier.block != now.block) c.read.block = kMany;
  if (earlier.block_barriers != now.block_barriers) return;
  if (earlier.warp != now.warp) c.read.warp = kMany;
  if (earlier.thread != now.thread && earlier.warp_barriers == now.warp_barriers) c.read.thread = kMany;
}

void check_shared(uint32_t offset, int bytes, Access access, Place place) {
  if (offset % bytes) fault("misaligned shared access of " + std::to_string(bytes) + " bytes", place);
  if (offset + bytes > arena.size()) fault("shared access outside the launch's shared memory", place);
  const Stamp now = stamp(place, access == Access::kWarpRead);
  for (uint32_t c = offset / kGrain; c < (offset + bytes) / kGrain; ++c)
    check_cell(arena_shadow[c], now, access == Access::kWrite, "shared");
}

void run_block(const std::vector<int>& warp_order, const std::vector<int>& lane_order, std::mt19937& random) {
  std::fill(arena.begin(), arena.end(), 0xff);  // NaN
  std::fill(arena_shadow.begin(), arena_shadow.end(), Cell{});
  waiting = 0;
  for (auto& w : warps) w = Warp{};
  for (auto& f : fibers) {
    f->state = State::kReady;
    f->block_barriers = f->warp_barriers = 0;
    f->groups.assign(1, {});
  }
  std::vector<int> order = warp_order;
  for (bool progress = true; progress;) {
    progress = false;
    if (config.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
    for (int w : order) {
      bool again = true;
      while (again) {  // a warp runs until it waits for another or, at random, is interrupted
        again = false;
        for (int l : lane_order) {
          Fiber& f = *fibers[32 * w + l];
          if (f.state != State::kReady) continue;
          resume(f);
          if (!failure.empty()) return;
          again = progress = true;
        }
        if (config.order == Order::kRandom && random() % 4 == 0) break;
      }
    }
  }
  for (auto& f : fibers)
    if (f->state != State::kDone) {
      failure = text(f->place) + ": deadlock: some threads wait in a " +
                (f->state == State::kAtBarrier ? "barrier" : "warp collective") + " that others never reach";
      return;
    }
}

}  // namespace

void fault(const std::string& what, Place place) {
  throw Fault(text(place) + ": " + what + " (block " + std::to_string(position.block) + ", thread " +
              std::to_string(position.thread) + ")");
}

void out_of_range(int index, int n, Place place) {
  fault("shared index out of range: " + std::to_string(index) + " of " + std::to_string(n), place);
}

void allow(const void* memory, int64_t bytes, bool writable, bool initialised) {
  if (int64_t(regions.size()) == config.withheld) bytes -= kGrain;
  Region r{static_cast<const unsigned char*>(memory), bytes, writable, initialised, {}};
  if (writable) r.shadow.resize((bytes + kGrain - 1) / kGrain);
  for (Cell& c : r.shadow) c.initialised = initialised;
  regions.push_back(std::move(r));
}
void forbid_all() { regions.clear(); }

void check_global(const void* memory, int bytes, Access access, Place place) {
  const auto* p = static_cast<const unsigned char*>(memory);
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fault("misaligned access of " + std::to_string(bytes) + " bytes of device memory", place);
  for (Region& r : regions) {
    const int64_t offset = p - r.begin;
    if (p < r.begin || offset + bytes > r.bytes) continue;
    if (access == Access::kWrite && !r.writable) fault("an input is written", place);
    counts.global_bytes += bytes;
    if (!r.writable) return;
    const Stamp now = stamp(place, false);
    for (int64_t c = offset / kGrain; c < (offset + bytes) / kGrain; ++c)
      check_cell(r.shadow[c], now, access == Access::kWrite, "device");
    return;
  }
  fault("device memory index out of range", place);
}

int64_t shared_size() { return arena.size(); }

unsigned char* shared_memory(uint32_t offset, int bytes, Access access, Place place) {
  check_shared(offset, bytes, access, place);
  counts.shared_bytes += bytes;
  return &arena[offset];
}

void collective(void (*operation)(void* const*), void* mine, Place place) {
  Warp& w = warps[self->id / 32];
  if (w.arrived > 0 && w.operation != operation) {
    for (const auto& f : fibers)
      if (f->id / 32 == self->id / 32 && f->state == State::kInCollective)
        fault("lanes of one warp meet in different collectives, also at " + text(f->place), place);
  }
  self->place = place;
  w.operation = operation;
  w.lane[self->id % 32] = mine;
  self->state = State::kInCollective;
  if (++w.arrived < 32) return yield();
  for (int l = 0; l < 32; ++l) {
    Fiber& f = *fibers[self->id / 32 * 32 + l];
    if (!same(f.place, place))
      fault("lanes of one warp meet at different places, also at " + text(f.place), place);
    f.state = State::kReady;
  }
  w.arrived = 0;
  operation(w.lane);
}

void warp_barrier(Place place) {
  collective(+[](void* const*) {}, nullptr, place);
  ++self->warp_barriers;
}

void barrier(Place place) {
  self->place = place;
  self->state = State::kAtBarrier;
  if (++waiting < int(fibers.size())) {
    yield();
  } else {
    waiting = 0;
    ++counts.barriers;
    for (auto& f : fibers) {
      if (!same(f->place, place))
        fault("threads meet at different barriers, also at " + text(f->place), place);
      f->state = State::kReady;
    }
  }
  ++self->block_barriers;
  ++self->warp_barriers;
}

void copy_issue(uint32_t to, const void* from, Place place) {
  check_shared(to, 16, Access::kWrite, place);  // nobody may still be using the destination
  for (int c = 0; c < 16 / kGrain; ++c) arena_shadow[to / kGrain + c].in_flight = true;
  self->groups.back().push_back({to, from, place});
  if (from) counts.copied_bytes += 16;
}
void copy_commit() { self->groups.emplace_back(); }
void copy_wait(int groups_left) {
  auto& groups = self->groups;
  while (int(groups.size()) - 1 > groups_left) {
    for (const Copy& c : groups.front()) {
      for (int i = 0; i < 16 / kGrain; ++i) arena_shadow[c.to / kGrain + i].in_flight = false;
      check_shared(c.to, 16, Access::kWrite,
                   c.place);  // now it is this thread's write: others need a barrier
      if (c.from)
        std::memcpy(&arena[c.to], c.from, 16);
      else
        std::memset(&arena[c.to], 0, 16);
    }
    groups.erase(groups.begin());
  }
}

void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& thread) {
  if (threads < 32 || threads % 32) throw Fault("a block must be of whole warps");
  body = &thread;
  failure.clear();
  ++launch_number;
  ++counts.launches;
  arena.resize(shared_bytes);
  arena_shadow.resize((shared_bytes + kGrain - 1) / kGrain);
  warps.resize(threads / 32);
  fibers.resize(threads);
  for (auto& f : fibers)
    if (!f) {
      f = std::make_unique<Fiber>();
      f->id = static_cast<int>(&f - fibers.data());
      getcontext(&f->start);
      f->start.uc_stack.ss_sp = f->stack.data();
      f->start.uc_stack.ss_size = kStackBytes;
      f->start.uc_link = nullptr;
      makecontext(&f->start, fiber_main, 0);
    }
  std::mt19937 random(config.seed);
  std::vector<int> warp_order(warps.size()), lane_order(32), block_order(blocks);
  for (auto* order : {&warp_order, &lane_order, &block_order}) {
    std::iota(order->begin(), order->end(), 0);
    if (config.order == Order::kReverse) std::reverse(order->begin(), order->end());
    if (config.order == Order::kRandom) std::shuffle(order->begin(), order->end(), random);
  }
  position.threads = threads;
  position.blocks = static_cast<int>(blocks);
  for (int block : block_order) {
    position.block = block;
    run_block(warp_order, lane_order, random);
    if (!failure.empty()) {
      fibers.clear();  // their stacks are left where they stand
      throw Fault(failure);
    }
  }
}

}  // namespace emulation
