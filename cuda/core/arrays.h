// Arrays as a framework hands them over, and how the core's arguments are made of them. Everything that a call trusts about its memory is
// checked here, once, for all frontends: type, shape, and that the sizes of all arrays agree. What kind of object an array came from, where
// it lies and whether it is contiguous is the business of the bindings.
#pragma once

#include "dualbin/backend.h"

namespace dualbin {

// Element types, those of foreign arrays included so that messages can name them: enumerator, name, bytes.
#define DUALBIN_ELEMENT_TYPES(X) \
  X(kBool, "bool", 1)            \
  X(kU8, "uint8", 1)             \
  X(kI8, "int8", 1)              \
  X(kU16, "uint16", 2)           \
  X(kI16, "int16", 2)            \
  X(kU32, "uint32", 4)           \
  X(kI32, "int32", 4)            \
  X(kU64, "uint64", 8)           \
  X(kI64, "int64", 8)            \
  X(kF16, "float16", 2)          \
  X(kBF16, "bfloat16", 2)        \
  X(kF32, "float32", 4)          \
  X(kF64, "float64", 8)          \
  X(kOther, "of another type", 1)

enum class ElementType : int {
#define DUALBIN_MEMBER(enumerator, name, bytes) enumerator,
  DUALBIN_ELEMENT_TYPES(DUALBIN_MEMBER)
#undef DUALBIN_MEMBER
};

const char* type_name(ElementType type);
int64_t element_bytes(ElementType type);

// A contiguous array. One without a name is absent.
struct Array {
  const char* name = nullptr;
  void* data = nullptr;
  ElementType type = ElementType::kOther;
  int rank = 0;
  const int64_t* shape = nullptr;
  int64_t size = 0;  // elements

  bool present() const { return name != nullptr; }
};

int64_t element_count(const int64_t* shape, int rank);

// ---- what the calls of a Backend take ---------------------------------------------------------------------------------------------------

struct PackCall {
  Floats w;
  int64_t rows;
  int64_t dim;
  int planes;
  uint8_t* bits;
  float* scale;
};

struct UnpackCall {
  Table table;
  void* out;
};

struct FewerCall {
  Table table;
  int fewer;
  uint8_t* bits;
  float* scale;
};

struct LookupCall {
  Table table;
  Ids ids;
  void* out;
  FloatType type;
};

struct BagCall {
  Table table;
  Bags bags;
  void* out;
  FloatType type;
};

struct BagCountsCall {
  const float* scale;
  int64_t rows;
  Bags bags;
  int32_t* out;
};

struct BagGradientCall {
  Bags bags;
  Floats dy;
  int64_t dim;
  const int32_t* counts;
  void* out;
};

struct BagWeightGradientCall {
  Table table;
  Bags bags;
  Floats dy;
  float* out;
};

struct ReduceCall {
  Ids ids;
  Floats dy;
  int64_t rows;
  int64_t dim;
  RowsOut out;
};

struct SegmentCall {
  Ids slots;
  Floats dy;
  int64_t segments;
  int64_t dim;
  float* out;
};

struct UpdateCall {
  Table table;
  State state;
  Rule rule;
  const StepContext* context;
  Ids ids;
  Floats dy;
  UpdateOut out;
};

struct XorCall {
  uint8_t* bits;
  int64_t rows;
  int64_t width;
  Ids ids;
  const uint8_t* mask;
};

struct AverageCall {
  Table a;
  Table b;
  const StepContext* context;
  Table out;
};

// ---- the arrays of a call: shapes in comments, B = ceil(dim/8), [V, 1] may be [V] -------------------------------------------------------

struct UpdateArrays {
  Array bits;                 // uint8 [V, B]
  Array scale;                // float32 [V, 1]
  Array state[kStateArrays];  // as DUALBIN_STATE_ARRAYS says; absent where the rule needs none
  Array context;              // StepContext: 8 words of 32 bits or 4 of 64
  Array ids;                  // int32 or int64 [N]
  Array dy;                   // float32, float16 or bfloat16 [N, D]
  Array mask;                 // uint8 [N, B], or absent
  Array new_scale;            // float32 [N, 1], or absent
  Array stats;                // Stats: 8 words of 32 bits or 4 of 64; or absent
};

// w float32, float16 or bfloat16 [V, D], bits [V, B], scale [V, 1] or absent
Status read_pack(const Array& w, const Array& bits, const Array& scale, PackCall* call);

// bits [V, B], out int8 [V, D]
Status read_unpack(const Array& bits, int64_t dim, const Array& out, UnpackCall* call);

// out_bits [V, fewer * width]; out_scale absent: the scales stay as they are.
Status read_fewer_planes(const Array& bits, const Array& scale, int64_t dim, const Array& out_bits, const Array& out_scale,
                         FewerCall* call);

// bits [V, B], scale [V, 1], ids int32 or int64 of any shape, out float32, float16 or bfloat16 [*shape of ids, D]
Status read_lookup(const Array& bits, const Array& scale, int64_t dim, const Array& ids, const Array& out, LookupCall* call);

// ids int32 or int64 [N], offsets int32 or int64 [G + 1], weights float32 [N] or absent, out [G, D]
Status read_lookup_bag(const Array& bits, const Array& scale, int64_t dim, const Array& ids, const Array& offsets, const Array& weights,
                       BagMode mode, int64_t padding_idx, const Array& out, BagCall* call);

// scale [V, 1], ids [N], offsets [G + 1], out int32 [G]
Status read_bag_counts(const Array& scale, const Array& ids, const Array& offsets, int64_t padding_idx, const Array& out,
                       BagCountsCall* call);

// ids [N], offsets [G + 1], dy float32, float16 or bfloat16 [G, D], counts int32 [G] or absent, weights float32 [N] or absent, out [N, D]
// of the type of dy
Status read_bag_gradient(const Array& ids, const Array& offsets, const Array& dy, BagMode mode, const Array& counts, const Array& weights,
                         int64_t padding_idx, const Array& out, BagGradientCall* call);

// bits [V, B], scale [V, 1], ids [N], offsets [G + 1], dy [G, D], out float32 [N]
Status read_bag_weight_gradient(const Array& bits, const Array& scale, const Array& ids, const Array& offsets, const Array& dy,
                                int64_t padding_idx, const Array& out, BagWeightGradientCall* call);

// ids [N], dy [N, D], out_ids int32 or int64 [C], out_rows float32 [C, D], out_count int32 or int64 [1]
Status read_reduce_rows(const Array& ids, const Array& dy, int64_t rows, const Array& out_ids, const Array& out_rows,
                        const Array& out_count, ReduceCall* call);

// slots int32 or int64 [N], dy [N, D], out float32 [U, D]
Status read_segment_sum(const Array& slots, const Array& dy, const Array& out, SegmentCall* call);

Status read_update(const UpdateArrays& arrays, const Rule& rule, int64_t dim, UpdateCall* call);

// step int64 []
Status read_step(const Array& step, int64_t** count);

// bits [V, B], ids [N], mask uint8 [N, B]
Status read_xor_rows(const Array& bits, const Array& ids, const Array& mask, XorCall* call);

// bits_a, bits_b and bits [V, B], scale_a, scale_b and scale [V, 1], context a StepContext
Status read_average(const Array& bits_a, const Array& scale_a, const Array& bits_b, const Array& scale_b, int64_t dim, const Array& context,
                    const Array& bits, const Array& scale, AverageCall* call);

}  // namespace dualbin
