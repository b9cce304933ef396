#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace dlkernels {

namespace baseline {
extern const KernelTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#endif

namespace {

// Narrowest first. __builtin_cpu_supports asks cpuid and, for the wide registers, xgetbv.
int usable_tables(const KernelTable* tables[4]) {
  int count = 0;
  tables[count++] = &baseline::table;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (has_avx2) tables[count++] = &avx2::table;
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    tables[count++] = &avx512::table;
  }
#endif
  return count;
}

const KernelTable* find_table(const char* name) {
  const KernelTable* tables[4];
  const int count = usable_tables(tables);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(name, tables[i]->isa) == 0) return tables[i];
  }
  return nullptr;
}

const KernelTable* choose_table() {
  const KernelTable* tables[4];
  const int count = usable_tables(tables);
  const char* forced = std::getenv("DLKERNELS_ISA");
  if (forced == nullptr || *forced == '\0') return tables[count - 1];
  if (const KernelTable* table = find_table(forced)) return table;
  std::string usable;
  for (int i = 0; i < count; ++i) usable += std::string(i == 0 ? "" : ", ") + tables[i]->isa;
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

int available_isas(const char* names[4]) {
  const KernelTable* tables[4];
  const int count = usable_tables(tables);
  for (int i = 0; i < count; ++i) names[i] = tables[i]->isa;
  return count;
}

}  // namespace dlkernels
