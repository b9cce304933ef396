#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace dlkernels {

// One table an instruction set; which of them a build has, CMake says by DLKERNELS_HAS_<instruction set>.
namespace baseline {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512_bf16 {
extern const KernelTable table;
}
namespace amx {
extern const KernelTable table;
}
namespace avx512_bf16_emulated {
extern const KernelTable table;
}
namespace amx_emulated {
extern const KernelTable table;
}
namespace simt {
extern const KernelTable table;
}

namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports asks cpuid and, for the wide registers, xgetbv.
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("f16c");
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// The processor has tiles of bfloat16, the system saves them, and it lets this process use them: Linux gives the
// permission once asked (Documentation/arch/x86/xstate.rst).
[[maybe_unused]] bool has_amx() {
#if defined(__linux__)
  unsigned eax, ebx, ecx, edx, state, unused;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kOsXsave = 1u << 27, kTileState = 3u << 17;
  if (!has_avx512() || !__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & kOsXsave) == 0) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  __asm__("xgetbv" : "=a"(state), "=d"(unused) : "c"(0));
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (state & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Tables {
  std::vector<const KernelTable*> usable;  // narrowest first, then emulated ones
  const KernelTable* widest;
  std::optional<KernelTable> simt;  // the CUDA kernels on the host: chosen by name, listed nowhere
};

#if defined(DLKERNELS_SIMT)
// What only processors are asked for is the processor's.
KernelTable on_host(const KernelTable& device, const KernelTable& processor) {
  KernelTable table = device;
  table.arithmetic_rate = processor.arithmetic_rate, table.elementary = processor.elementary;
  return table;
}
#endif

Tables find_tables() {
  Tables tables{{&baseline::table}, nullptr, std::nullopt};
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] auto use_if = [&](bool usable, const KernelTable& table) {
    if (usable) tables.usable.push_back(&table);
  };
#if defined(DLKERNELS_HAS_avx2)
  use_if(has_avx2(), avx2::table);
#endif
#if defined(DLKERNELS_HAS_avx512)
  use_if(has_avx512(), avx512::table);
#endif
#if defined(DLKERNELS_HAS_avx512_bf16)
  use_if(has_avx512() && __builtin_cpu_supports("avx512bf16"), avx512_bf16::table);
#endif
#if defined(DLKERNELS_HAS_amx)
  use_if(has_amx(), amx::table);
#endif
#endif
  tables.widest = tables.usable.back();
#if defined(DLKERNELS_HAS_avx512_bf16_emulated)
  use_if(has_avx2(), avx512_bf16_emulated::table);
#endif
#if defined(DLKERNELS_HAS_amx_emulated)
  use_if(has_avx2(), amx_emulated::table);
#endif
#if defined(DLKERNELS_SIMT)
  tables.simt = on_host(simt::table, *tables.widest);
#endif
  return tables;
}

const Tables& tables() {
  static const Tables found = find_tables();
  return found;
}

const KernelTable* find_table(const char* name) {
  for (const KernelTable* table : tables().usable) {
    if (std::strcmp(name, table->isa) == 0) return table;
  }
  if (tables().simt && std::strcmp(name, tables().simt->isa) == 0) return &*tables().simt;
  return nullptr;
}

const KernelTable* choose_table() {
  const char* forced = std::getenv("DLKERNELS_ISA");
  if (forced == nullptr || *forced == '\0') return tables().widest;
  if (const KernelTable* table = find_table(forced)) return table;
  std::string usable;
  for (const KernelTable* table : tables().usable) usable += std::string(usable.empty() ? "" : ", ") + table->isa;
  throw std::runtime_error("DLKERNELS_ISA=" + std::string(forced) + " cannot be used here: expected one of " + usable);
}

std::atomic<const KernelTable*>& table_in_use() {
  static std::atomic<const KernelTable*> table{choose_table()};
  return table;
}

}  // namespace

const KernelTable& kernels() {
  return *table_in_use().load(std::memory_order_relaxed);
}

bool select_isa(const char* name) {
  const KernelTable* table = find_table(name);
  if (table != nullptr) table_in_use().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

std::vector<const char*> available_isas() {
  std::vector<const char*> names;
  for (const KernelTable* table : tables().usable) names.push_back(table->isa);
  return names;
}

}  // namespace dlkernels
