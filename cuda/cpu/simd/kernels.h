// What vector code does with rows: a table of functions for each instruction set. Calls are for whole rows, so that one through a pointer
// costs nothing beside the row, and what happens once a row (finish_row) is compiled once, for every processor.
//
// The files that are compiled for an instruction set include this header and those beside it, and nothing with inline functions that the
// rest of the library uses too: a linker keeps one copy of such a function, and it could be the one that older processors cannot run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dualbin::detail {

// The columns that a lane of 128 bits takes at a time: 16 bytes of every plane. Rows of evidence are padded to whole chunks.
constexpr int64_t kChunk = 128;
constexpr int64_t kChunkBytes = kChunk / 8;

constexpr int kFloatFormats = 3;  // in the order of FloatType

// How a row becomes evidence: what its sign plane says about the gradient, and the two factors of its quantiser.
struct EvidenceRow {
  const uint8_t* bits;  // plane 0 of the row, the others behind it
  int64_t width;
  int64_t dim;
  int planes;
  bool negative;  // the scale is below 0
  float first;
  float second;
};

// Of one row: sum(q * q), and sum(w * q) with w = s * (2m + 1).
struct EvidenceSums {
  uint64_t squares;
  int64_t aligned;
};

// What the counters of a row are moved by.
struct FlipRow {
  uint8_t* table;           // plane 0 of the row
  uint8_t* counter;         // the first plane below those of the table; null without one
  uint8_t* target;          // where the planes of the table go: the table itself, or a mask that takes what changes
  const int16_t* evidence;  // quantised gradient, positive for the sign as it is; whole chunks
  uint32_t k0, k1;          // the row's key
  int32_t coef;             // levels in 2^-32
  uint32_t share;           // of one bit: the rate in 1/65536
  int16_t zone;
  int16_t mean;       // of the evidence
  const void* later;  // a gradient that is fetched while the row is moved, 128 columns with each chunk
};

struct FlipShape {
  int64_t width;
  int planes;             // of the table
  uint8_t last;           // the bits of the last byte of a plane that stand for columns
  bool masked;            // the targets are masks
  int64_t later_element;  // bytes of a value of the later gradients
};

struct FlipCounts {
  uint64_t flips;
  uint64_t clipped;
};

// A row of one plane that is updated by another rule than a counter's: bits flip by the gradient's sign, or by its average.
struct SignRow {
  const void* gradient;
  const uint8_t* bits;
  uint8_t* target;  // the row itself, or a mask: bits that flip are inverted there
  int64_t dim;
  bool negative;               // the scale is below 0
  const void* later_gradient;  // fetched while this row is worked on
};

struct AveragedRow {
  SignRow row;
  float* average;
  float first, second;  // the two factors of the quantiser
  float rms;
  float gamma;
  float tau;
  const float* later_average;
};

// What a later row of a table is read from. It is fetched while an earlier row is worked on.
struct LaterRow {
  const uint8_t* bits;
  const float* scale;
};

// A row of a lookup. With more than one plane the scale is finite and at least kLeastLevelScale in magnitude: its product with 2^-30 is
// exact.
struct LookupRow {
  const uint8_t* bits;  // plane 0, the others behind it
  float scale;
  void* out;
  LaterRow later;
};

constexpr float kLeastLevelScale = 0x1p-96f;

struct LookupShape {
  int64_t dim;
  int64_t width;
  int planes;
  bool streamed;  // stores go past the caches: every row of the output is aligned to 64 bytes
};

// A row of a bag, and what its weights are multiplied with.
struct BagRow {
  const uint8_t* bits;
  float factor;
  LaterRow later;
};

// Where the rows of bags come from, for rows of one or two planes and at most kMostNarrow columns: few enough that to write down which rows
// take part would cost as much as adding them.
constexpr int64_t kMostNarrow = 128;

struct BagSource {
  const uint8_t* bits;
  const float* scale;
  int64_t rows;
  int64_t padding;  // an id that takes no part, as those outside [0, rows)
  const void* ids;
  bool narrow_ids;  // of 32 bits
  int64_t count;
  int64_t ahead;         // positions that are fetched before their turn
  const float* weights;  // null: all are 1
  bool votes;            // every row has the factor 1
};

// A row of two tables and what becomes of it, as rules/average.h has it; `out` may be a or b.
struct RowPair {
  const uint8_t* a;  // plane 0, the others behind it
  const uint8_t* b;
  uint8_t* out;
  uint32_t k0, k1;  // the row's key
  uint32_t share;   // of the way from a to b, in 1/65536
  bool invert_b;
};

struct AverageShape {
  int64_t width;
  int planes;
  uint8_t last;  // the bits of the last byte of a plane that stand for columns
};

struct PackShape {
  int64_t dim;
  int64_t width;
  int planes;
};

// A candidate of the search for the scale of a row, as rules/pack.h has it, and the quantiser of the row. Rows have at most kMostSearched
// columns: sums are exact in double then.
constexpr int64_t kMostSearched = int64_t{1} << 17;

struct SearchStep {
  float first;
  float second;
  double numerator;
  double denominator;
  double top;
};

struct SearchSums {
  int64_t a;
  int64_t c;
};

struct Kernels {
  const char* name;

  // Rows of a table in a type of floats. What is not exact in it is rounded once; scales of 16-bit types are finite.
  void (*lookup[kFloatFormats])(const LookupRow* rows, int64_t count, const LookupShape& shape);

  // Waits for the stores of a thread that went past the caches.
  void (*finish_streams)();

  // The sum of a block of a bag, row by row from +0.0, into total[dim], or added to it.
  void (*add_block)(const BagRow* rows, int64_t count, const LookupShape& shape, bool first, float* total);

  // total[dim] = the sum of the bag at positions [begin, end), block by block; returns how many rows took part.
  int64_t (*sum_narrow_bag)(const BagSource& source, int64_t begin, int64_t end, const LookupShape& shape, float* total);

  // total[dim] over `divisor`, or its signs, +1 where it is 0, in a type of floats.
  void (*finish_bag[kFloatFormats])(const float* total, int64_t dim, float divisor, bool signs, void* out);

  // sum[dim] = the row sum of dy[positions[0 .. count)] as docs/design.md defines it; `block` is scratch of the same size.
  void (*sum_rows[kFloatFormats])(const void* dy, int64_t dim, const int64_t* positions, int64_t count, float* sum, float* block);

  // The largest magnitude of a row, as the bits of its type.
  uint32_t (*largest[kFloatFormats])(const void* row, int64_t dim);

  // Writes the evidence of a row; what lies behind `dim` in its last chunk becomes 0.
  EvidenceSums (*make_evidence[kFloatFormats])(const void* gradient, const EvidenceRow& row, int16_t* evidence);

  // Moves the counters of `count` different rows, by the number of bits of a counter.
  FlipCounts (*flip[9])(const FlipRow* rows, int64_t count, const FlipShape& shape);

  // Flips by the sign of the gradient, and by its average, which moves; both return how many. All values are finite.
  uint64_t (*flip_signs[kFloatFormats])(const SignRow& row);
  uint64_t (*flip_averages[kFloatFormats])(const AveragedRow& row);

  // out[dim] = the row of a bag's gradient times `factor` over `divisor`, one of which is 1, rounded to its own type.
  void (*share_row[kFloatFormats])(const void* dy, int64_t dim, float factor, float divisor, bool streamed, void* out);

  // Sum of dy times the weights of a row: column d in lane d % 32, in double, then the lanes folded in halves.
  double (*weigh_row[kFloatFormats])(const void* dy, const uint8_t* bits, const LookupShape& shape);

  // The planes of a row of finite floats (of one plane: floats that are no NaN); `scale` is that of more than one.
  void (*pack_row[kFloatFormats])(const void* w, const PackShape& shape, float scale, uint8_t* bits);

  // The sum that the mean of magnitudes comes from.
  double (*sum_magnitudes[kFloatFormats])(const void* w, int64_t dim);

  SearchSums (*search_sums[kFloatFormats])(const void* w, int64_t dim, const SearchStep& step);

  // The weights of the average of `count` rows.
  void (*average_rows)(const RowPair* rows, int64_t count, const AverageShape& shape);

  // The exact sums that the scale of the first `fewer` planes of a row comes from.
  SearchSums (*sums_of_fewer)(const uint8_t* bits, const PackShape& shape, int fewer);

  // int8 +1 and -1; of more than one plane int16 s * (2m + 1).
  void (*unpack_row)(const uint8_t* bits, const PackShape& shape, void* out);
};

}  // namespace dualbin::detail
