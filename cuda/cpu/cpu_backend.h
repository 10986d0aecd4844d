// The CPU back end with the kernels of one instruction set. Its functions are spread over the files of this folder.
#pragma once

#include "core/backend.h"
#include "cpu/simd/kernels.h"

namespace dualbin::detail {

class CpuBackend final : public Backend {
 public:
  // Without kernels it runs the code of rules/, which every processor can.
  constexpr explicit CpuBackend(const Kernels* kernels) : kernels_(kernels) {}

  DUALBIN_BACKEND_FUNCTIONS

 private:
  const Kernels* kernels_;
};

}  // namespace dualbin::detail
