// update_words for 16-bit gradients: a file of its own, so that both are compiled at a time.
#include "kernels/update_words.cuh"

namespace dualbin::kernels {

WordKernel narrow_word_kernel(const Rule& rule, bool block, bool ragged) {
  return block ? word_kernel<Narrow, true>(rule, ragged) : word_kernel<Narrow, false>(rule, ragged);
}

}  // namespace dualbin::kernels
