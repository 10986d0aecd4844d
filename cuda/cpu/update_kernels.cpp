// Updates of counters by kernels. A batch of rows goes through three phases: evidence, the coefficients of each row, flips.
#include <array>

#include "cpu/prefetch.h"
#include "cpu/update_rows.h"
#include "rules/row.h"

namespace dualbin::detail {

namespace {

constexpr uint32_t kKnownBiases = 4096;  // from there on both are 1

// Few numbers of updates occur, and a power is forty instructions.
const AdamBias* known_biases() {
  static const auto table = [] {
    std::array<AdamBias, kKnownBiases> biases;
    for (uint32_t n = 0; n < kKnownBiases; ++n) biases[n] = adam_bias(n);
    return biases;
  }();
  return table.data();
}

// A row between the phases.
struct PendingRow {
  int64_t segment;
  float scale;
  int exponent;
  EvidenceSums sums;
};

class Batches {
 public:
  Batches(const Kernels& kernels, const UpdateJob& job, const Scratch& scratch)
      : kernels_(kernels), job_(job), scratch_(scratch), dim_(job.table.dim), element_(job.dy.type == FloatType::kF32 ? 4 : 2) {
    const int64_t columns_of_last = dim_ - 8 * (job.table.width() - 1);
    shape_ = {job.table.width(), job.table.planes, static_cast<uint8_t>((1 << columns_of_last) - 1), job.out.mask != nullptr, element_};
    shared_ = step_shared(job.rule, job.context);
    shared_.biases = known_biases();
    shared_.known = kKnownBiases;
  }

  Stats run(int64_t begin, int64_t end) {
    const int64_t batch = batch_rows(dim_);
    for (int64_t s = begin; s < std::min(end, begin + batch); ++s) {
      prefetch_numbers(s);
      prefetch_planes(s);
      prefetch(occurrence(s), dim_ * element_);
    }
    for (int64_t first = begin; first < end; first += batch) {
      used_ = 0;
      for (int64_t s = first; s < std::min(end, first + batch); ++s) {
        if (s + batch < end) prefetch_planes(s + batch);
        gather_evidence(s);
      }
      for (int i = 0; i < used_; ++i) {
        const int64_t later = std::min(pending_[i].segment + batch, end - 1);
        prefetch_numbers(later);
        finish(pending_[i], &flips_[i]);
        flips_[i].later = occurrence(later);
      }
      const FlipCounts counts = kernels_.flip[job_.rule.bits](flips_, used_, shape_);
      stats_.rows += static_cast<uint64_t>(used_);
      stats_.flips += counts.flips;
      stats_.clipped += counts.clipped;
    }
    return stats_;
  }

 private:
  // The parts of a row are fetched in different phases, a few lines at a time.
  DUALBIN_FETCHES void prefetch_planes(int64_t s) const {
    const Table& table = job_.table;
    const int64_t row = job_.segments.row(s);
    prefetch(table.bits + row * table.row_bytes(), table.row_bytes());
    const int64_t below = (job_.rule.bits - table.planes) * table.width();
    if (below > 0) prefetch(job_.state.counter + row * below, below);
  }

  DUALBIN_FETCHES void prefetch_numbers(int64_t s) const {
    const State& state = job_.state;
    const int64_t row = job_.segments.row(s);
    prefetch(job_.table.scale + row);
    if (state.record != nullptr) prefetch(state.record + 4 * row);
    if (state.count != nullptr) prefetch(state.count + row);
    if (state.squares != nullptr) prefetch(state.squares + row);
  }

  const char* occurrence(int64_t s) const {
    return static_cast<const char*>(job_.dy.data) + job_.segments.positions(s)[0] * dim_ * element_;
  }

  // The row sum of segment s as evidence, if it has any effect.
  void gather_evidence(int64_t s) {
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
    const EvidenceRow of_row{
        table.bits + row * table.row_bytes(), shape_.width, dim_, table.planes, scale < 0.0f, quantise.first, quantise.second};
    pending_[used_] = {s, scale, quantise.exponent,
                       kernels_.make_evidence[static_cast<int>(gradient.type)](gradient.values, of_row, evidence(used_))};
    ++used_;
  }

  // What becomes of the row, but for its weights.
  void finish(const PendingRow& pending, FlipRow* flip) {
    const Table& table = job_.table;
    const int64_t row = job_.segments.row(pending.segment);
    RowSums sums;
    sums.squares = pending.sums.squares;
    sums.aligned = pending.sums.aligned;
    const RowStep step = finish_row(job_.rule, job_.context, shared_, job_.state, table, row, pending.scale, sums, pending.exponent);
    const int64_t below = (job_.rule.bits - table.planes) * shape_.width;
    flip->table = table.bits + row * table.row_bytes();
    flip->counter = below > 0 ? job_.state.counter + row * below : nullptr;
    flip->target = job_.target(pending.segment);
    flip->evidence = evidence(static_cast<int>(flip - flips_));
    flip->k0 = step.key.k0;
    flip->k1 = step.key.k1;
    flip->coef = step.coef;
    flip->share = step.share;
    flip->zone = static_cast<int16_t>(std::min(step.zone, 32767));  // no evidence is larger
    flip->mean = static_cast<int16_t>(step.negative ? step.mean : -step.mean);
    job_.set_scale(pending.segment, step.new_scale);
  }

  int16_t* evidence(int i) const { return scratch_.evidence + i * padded_dim(dim_); }

  const Kernels& kernels_;
  const UpdateJob& job_;
  const Scratch& scratch_;
  const int64_t dim_;
  const int64_t element_;
  FlipShape shape_;
  StepShared shared_;
  Stats stats_{};
  int used_ = 0;
  PendingRow pending_[kMostBatch];
  FlipRow flips_[kMostBatch];
};

}  // namespace

Stats update_by_kernels(const Kernels& kernels, const UpdateJob& job, int64_t begin, int64_t end, const Scratch& scratch) {
  return Batches(kernels, job, scratch).run(begin, end);
}

}  // namespace dualbin::detail
