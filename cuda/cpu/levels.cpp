// Which instruction set the CPU back end uses.
#include <atomic>
#include <cstring>

#include "cpu/cpu_backend.h"
#include "cpu/simd/levels.h"

#if defined(DUALBIN_WITH_X86_SIMD)
#include <cpuid.h>
#endif

namespace dualbin {

namespace {

struct Level {
  const char* name;
  detail::CpuBackend backend;
  bool (*runs)();
};

bool always() { return true; }

#if defined(DUALBIN_WITH_X86_SIMD)
// Bits of cpuid: leaf 1, ECX; leaf 7, EBX.
constexpr uint32_t kOsSaves = 1u << 27;
constexpr uint32_t kAvx = 1u << 28;
constexpr uint32_t kF16c = 1u << 29;
constexpr uint32_t kAvx2 = 1u << 5;
constexpr uint32_t kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL

// What the system saves and restores when it switches threads: bits 1 and 2 are vectors of 128 and 256 bits, 5 to 7 masks and 512 bits.
uint32_t saved_registers() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool runs(uint32_t leaf7, uint32_t saved) {
  uint32_t a = 0;
  uint32_t b = 0;
  uint32_t c = 0;
  uint32_t d = 0;
  constexpr uint32_t kLeaf1 = kOsSaves | kAvx | kF16c;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kLeaf1) != kLeaf1 || (saved_registers() & saved) != saved) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b & leaf7) == leaf7;
}

bool runs_avx2() { return runs(kAvx2, 0x06); }
bool runs_avx512() { return runs(kAvx2 | kAvx512, 0xe6); }
#endif

const Level kLevels[] = {
    {"portable", detail::CpuBackend(nullptr), always},
#if defined(DUALBIN_WITH_X86_SIMD)
    {"avx2", detail::CpuBackend(&detail::kAvx2), runs_avx2},
    {"avx512", detail::CpuBackend(&detail::kAvx512), runs_avx512},
#endif
};

const Level& best() {
  const Level* found = kLevels;
  for (const Level& level : kLevels) {
    if (level.runs()) found = &level;
  }
  return *found;
}

std::atomic<const Level*>& in_use() {
  static std::atomic<const Level*> level{&best()};
  return level;
}

}  // namespace

const Backend& cpu() { return in_use().load(std::memory_order_acquire)->backend; }

const char* simd_level() { return in_use().load(std::memory_order_acquire)->name; }

const char* simd_level(int index) {
  for (const Level& level : kLevels) {
    if (level.runs() && index-- == 0) return level.name;
  }
  return nullptr;
}

Status use_simd(const char* name) {
  char names[64] = {0};
  for (const Level& level : kLevels) {
    if (!level.runs()) continue;
    if (name != nullptr && std::strcmp(level.name, name) == 0) {
      in_use().store(&level, std::memory_order_release);
      return {};
    }
    if (names[0] != 0) std::strcat(names, ", ");
    std::strcat(names, level.name);
  }
  DUALBIN_REQUIRE(name == nullptr, Code::kInvalidArgument,
                  "the instruction set must be one that this build and this processor have (%s), got '%s'", names, name);
  in_use().store(&best(), std::memory_order_release);
  return {};
}

}  // namespace dualbin
