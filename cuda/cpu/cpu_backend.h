// The CPU back end with the kernels of one instruction set. Its functions are spread over the files of this folder.
#pragma once

#include "cpu/simd/kernels.h"
#include "dualbin/backend.h"

namespace dualbin::detail {

class CpuBackend final : public Backend {
 public:
  // Without kernels it runs the code of rules/, which every processor can.
  constexpr explicit CpuBackend(const Kernels* kernels) : kernels_(kernels) {}

#include "core/backend_overrides.h"

 private:
  const Kernels* kernels_;
};

}  // namespace dualbin::detail
