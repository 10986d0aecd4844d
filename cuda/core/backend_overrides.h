// The functions of a back end, for the body of its class: what Backend (dualbin/backend.h) declares and explains. Included once a class, so
// without #pragma once.
size_t workspace_bytes(Op op, const Executor* executor, int64_t count, int64_t rows, int64_t dim) const override;
Status pack(const Launch& launch, Floats w, int64_t rows, int64_t dim, int planes, uint8_t* bits, float* scale) const override;
Status unpack(const Launch& launch, const Table& table, void* out) const override;
Status fewer_planes(const Launch& launch, const Table& table, int fewer, uint8_t* bits, float* scale) const override;
Status lookup(const Launch& launch, const Table& table, Ids ids, BadIds bad_ids, void* out, FloatType type) const override;
Status lookup_bag(const Launch& launch, const Table& table, const Bags& bags, BadIds bad_ids, void* out, FloatType type) const override;
Status bag_counts(const Launch& launch, const float* scale, int64_t rows, const Bags& bags, int32_t* out) const override;
Status bag_gradient(const Launch& launch, const Bags& bags, Floats dy, int64_t dim, const int32_t* counts, void* rows) const override;
Status bag_weight_gradient(const Launch& launch, const Table& table, const Bags& bags, Floats dy, float* out) const override;
Status reduce_rows(const Launch& launch, Ids ids, Floats dy, int64_t rows, int64_t dim, const RowsOut& out) const override;
Status segment_sum(const Launch& launch, Ids slots, Floats dy, int64_t segments, int64_t dim, float* out) const override;
Status update(const Launch& launch, const Table& table, const State& state, const Rule& rule, const StepContext* context, Ids ids,
              Floats dy, bool strict, const UpdateOut& out) const override;
Status advance(const Launch& launch, int64_t* step) const override;
Status xor_rows(const Launch& launch, uint8_t* bits, int64_t rows, int64_t width, Ids ids, const uint8_t* mask) const override;
Status average(const Launch& launch, const Table& a, const Table& b, const StepContext* context, const Table& out) const override;
