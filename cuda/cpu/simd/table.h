// The functions of an instruction set as a table. Included last.
#pragma once

#include "cpu/simd/averages.h"
#include "cpu/simd/bag_gradients.h"
#include "cpu/simd/bags.h"
#include "cpu/simd/evidence.h"
#include "cpu/simd/flips.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/lookups.h"
#include "cpu/simd/packs.h"
#include "cpu/simd/signs.h"
#include "cpu/simd/sums.h"

namespace dualbin::detail {
namespace {

constexpr Kernels make_kernels(const char* name) {
  return {name,
          {lookup<WriteF32>, lookup<WriteF16>, lookup<WriteBF16>},
          settle_streams,
          add_block,
          sum_narrow_bag,
          {finish_bag<WriteF32>, finish_bag<WriteF16>, finish_bag<WriteBF16>},
          {sum_rows<ReadF32>, sum_rows<ReadF16>, sum_rows<ReadBF16>},
          {largest<float>, largest<uint16_t>, largest<uint16_t>},
          {make_evidence<ReadF32>, make_evidence<ReadF16>, make_evidence<ReadBF16>},
          {nullptr, flip<1>, flip<2>, flip<3>, flip<4>, flip<5>, flip<6>, flip<7>, flip<8>},
          {flip_signs<ReadF32>, flip_signs<ReadF16>, flip_signs<ReadBF16>},
          {flip_averages<ReadF32>, flip_averages<ReadF16>, flip_averages<ReadBF16>},
          {share_row<ReadF32, WriteF32>, share_row<ReadF16, WriteF16>, share_row<ReadBF16, WriteBF16>},
          {weigh_row<ReadF32>, weigh_row<ReadF16>, weigh_row<ReadBF16>},
          {pack_row<ReadF32>, pack_row<ReadF16>, pack_row<ReadBF16>},
          {sum_magnitudes<ReadF32>, sum_magnitudes<ReadF16>, sum_magnitudes<ReadBF16>},
          {search_sums<ReadF32>, search_sums<ReadF16>, search_sums<ReadBF16>},
          average_rows,
          sums_of_fewer,
          unpack_row};
}

}  // namespace
}  // namespace dualbin::detail
