// Updates of one plane without counters, by kernels: a row at a time, since what it waits for is memory.
#include "cpu/prefetch.h"
#include "cpu/update_rows.h"
#include "rules/row.h"

namespace dualbin::detail {

namespace {

class SignRows {
 public:
  SignRows(const Kernels& kernels, const UpdateJob& job, const Scratch& scratch)
      : kernels_(kernels),
        job_(job),
        scratch_(scratch),
        dim_(job.table.dim),
        element_(job.dy.type == FloatType::kF32 ? 4 : 2),
        shared_(step_shared(job.rule, job.context)) {}

  Stats run(int64_t begin, int64_t end) {
    if (begin == end) return stats_;
    fetch_row(begin);
    prefetch(occurrence(begin), dim_ * element_);
    for (int64_t s = begin; s < end; ++s) {
      later_ = s + 1 < end ? s + 1 : s;
      fetch_row(later_);
      step(s);
    }
    return stats_;
  }

 private:
  DUALBIN_FETCHES void fetch_row(int64_t s) const {
    const int64_t row = job_.segments.row(s);
    const State& state = job_.state;
    prefetch(job_.table.scale + row);
    prefetch(job_.table.bits + row * job_.table.row_bytes(), job_.table.row_bytes());
    if (state.record != nullptr) prefetch(state.record + 4 * row);
    if (state.count != nullptr) prefetch(state.count + row);
    if (state.squares != nullptr) prefetch(state.squares + row);
  }

  const char* occurrence(int64_t s) const {
    return static_cast<const char*>(job_.dy.data) + job_.segments.positions(s)[0] * dim_ * element_;
  }

  void step(int64_t s) {
    const Table& table = job_.table;
    const int64_t row = job_.segments.row(s);
    const float scale = table.scale[row];
    if (scale == 0.0f) return;
    const RowGradient gradient = sum_of_segment(kernels_, job_, s, scratch_);
    if (std::max(gradient.largest, float_bits(scale) & 0x7fffffffu) >= kInfinityBits) {
      ++stats_.skipped;
      return;
    }
    const Quantiser quantise = make_quantiser(gradient.largest);
    const int format = static_cast<int>(gradient.type);
    const uint8_t* bits = table.bits + row * table.row_bytes();
    const EvidenceRow of_row{bits, table.width(), dim_, 1, scale < 0.0f, quantise.first, quantise.second};
    const EvidenceSums found = kernels_.make_evidence[format](gradient.values, of_row, scratch_.evidence);
    RowSums sums;
    sums.squares = found.squares;
    sums.aligned = found.aligned;
    const RowStep step = finish_row(job_.rule, job_.context, shared_, job_.state, table, row, scale, sums, quantise.exponent);
    const SignRow signs{gradient.values, bits, job_.target(s), dim_, step.negative, occurrence(later_)};
    if (job_.rule.kind == RuleKind::kSign) {
      stats_.flips += kernels_.flip_signs[format](signs);
    } else {
      float* averages = job_.state.ema;
      stats_.flips +=
          kernels_.flip_averages[format]({signs, averages + row * dim_, quantise.first, quantise.second, static_cast<float>(step.rms),
                                          step.gamma, job_.rule.tau, averages + job_.segments.row(later_) * dim_});
    }
    job_.set_scale(s, step.new_scale);
    ++stats_.rows;
  }

  const Kernels& kernels_;
  const UpdateJob& job_;
  const Scratch& scratch_;
  const int64_t dim_;
  const int64_t element_;
  const StepShared shared_;
  int64_t later_ = 0;
  Stats stats_{};
};

}  // namespace

Stats update_signs_by_kernels(const Kernels& kernels, const UpdateJob& job, int64_t begin, int64_t end, const Scratch& scratch) {
  return SignRows(kernels, job, scratch).run(begin, end);
}

}  // namespace dualbin::detail
