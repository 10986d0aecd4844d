// update_words for float32 gradients: a file of its own, so that both are compiled at a time.
#include "kernels/update_words.cuh"

namespace dualbin::kernels {

WordKernel wide_word_kernel(const Rule& rule, bool block, bool ragged) {
  return block ? word_kernel<Wide, true>(rule, ragged) : word_kernel<Wide, false>(rule, ragged);
}

}  // namespace dualbin::kernels
