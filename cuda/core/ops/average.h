// The average of two tables.
#pragma once

#include <tuple>

#include "core/arguments.h"

namespace dualbin {

// (1 - weight) * a + weight * b in expectation; `out` may be a or b. `context` is on the device: its lr is the weight. One outside [0, 1]
// is an error on the CPU and gives scales of NaN on CUDA.
struct AverageCall {
  Table a;
  Table b;
  const StepContext* context = nullptr;
  Table out;

  Status check() const {
    for (const Table* table : {&a, &b, &out}) {
      DUALBIN_TRY(check_table(*table));
      DUALBIN_REQUIRE(table->rows == a.rows && table->dim == a.dim && table->planes == a.planes, Code::kInvalidArgument,
                      "the tables must have one shape, got %" PRId64 " x %" PRId64 " of %d planes and %" PRId64 " x %" PRId64
                      " of %d planes",
                      a.rows, a.dim, a.planes, table->rows, table->dim, table->planes);
    }
    return check_data("context", context);
  }

  struct Given {
    Array bits_a;   // uint8 [V, planes * B], B = ceil(D/8)
    Array scale_a;  // float32 [V, 1]
    Array bits_b;   // as of a
    Array scale_b;
    int64_t dim = 0;
    Array context;  // StepContext: 8 words of 32 bits or 4 of 64
    Array bits;     // as of a
    Array scale;
  };

  static constexpr const char* kDoc = "The average of two tables in expectation; the weight of b is the lr of the context.";
  static constexpr auto arguments() {
    return std::make_tuple(in("bits_a", &Given::bits_a), in("scale_a", &Given::scale_a), in("bits_b", &Given::bits_b),
                           in("scale_b", &Given::scale_b), number("dim", &Given::dim), in("context", &Given::context),
                           dualbin::out("bits", &Given::bits), dualbin::out("scale", &Given::scale));
  }

  Status read(const Given& given) {
    DUALBIN_TRY(read_table(given.bits_a, given.scale_a, given.dim, &a));
    DUALBIN_TRY(read_table(given.bits_b, given.scale_b, given.dim, &b));
    DUALBIN_TRY(read_table(given.bits, given.scale, given.dim, &out));
    return read_words(given.context, &context);
  }
};

}  // namespace dualbin
