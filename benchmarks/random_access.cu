// How fast a GPU does nothing but the memory accesses of a bag, a lookup or an update: rows at random places, no arithmetic. What the copy
// bandwidth promises is out of reach where rows are shorter than what the memory moves at once.
//
//     nvcc -O3 -std=c++17 -arch=native benchmarks/random_access.cu -o random_access && ./random_access
//
// Medians of nine launches in microseconds, of the best of three grids; "share" is the time in which a copy moves the bytes that
// benchmarks/speed.py counts, over that time.
#include <cstdint>
#include <cstdio>

#include <algorithm>
#include <vector>

namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;  // rows of a thread or team on their way

__device__ uint32_t hash(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

__device__ uint32_t random_row(uint32_t n, uint32_t seed, uint32_t rows) { return static_cast<uint64_t>(hash(n ^ seed)) * rows >> 32; }

// Bits and scales of `count` rows: what a bag reads. `Row` is as wide as the bits of a row.
template <typename Row>
__global__ void read_rows(const Row* bits, const float* scale, uint32_t rows, uint32_t count, uint32_t seed, float* out) {
  const uint32_t threads = gridDim.x * kThreads;
  float sum = 0.0f;
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += threads * kAtOnce) {
    Row row[kAtOnce];
    float of_row[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const uint32_t at = random_row(i + k * threads, seed, rows);
      row[k] = __ldg(bits + at);
      of_row[k] = __ldg(scale + at);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) sum += of_row[k] + static_cast<float>(row[k].x ^ row[k].y);
  }
  if (sum == 1.2345f) *out = sum;  // never; but the compiler does not know
}

// What an update of Counter(8) moves: a row of the gradient in order, and at a random place 7 D / 8 bytes of counters, D / 8 of bits, a
// record and a scale, read and written. D / 4 threads a row.
template <int kDim>
__global__ void update_rows(const float4* gradient, char* counters, char* bits, int4* records, float* scales, uint32_t rows, uint32_t count,
                            uint32_t seed, float* out) {
  constexpr int kTeam = kDim / 4;
  constexpr int kCounter = kDim * 7 / 8;
  constexpr int kBits = kDim / 8;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t lane = thread % kTeam;
  const uint32_t teams = gridDim.x * kThreads / kTeam;
  float sum = 0.0f;
  for (uint32_t first = thread / kTeam; first < count; first += teams * 2) {
    float4 g[2];
    uint2 counter[2];
    uint2 word[2];
    int4 record[2];
    float scale[2];
    uint32_t at[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t n = min(first + k * teams, count - 1);
      at[k] = random_row(n, seed, rows);
      g[k] = __ldcs(gradient + static_cast<size_t>(n) * kTeam + lane);
      if (lane < kCounter / 8) counter[k] = *reinterpret_cast<uint2*>(counters + static_cast<size_t>(at[k]) * kCounter + 8 * lane);
      if (lane < kBits / 8) word[k] = *reinterpret_cast<uint2*>(bits + static_cast<size_t>(at[k]) * kBits + 8 * lane);
      if (lane == 0) record[k] = records[at[k]], scale[k] = scales[at[k]];
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      sum += g[k].x + g[k].y + g[k].z + g[k].w;
      counter[k].x ^= 1, word[k].x ^= 1;
      if (lane < kCounter / 8) *reinterpret_cast<uint2*>(counters + static_cast<size_t>(at[k]) * kCounter + 8 * lane) = counter[k];
      if (lane < kBits / 8) *reinterpret_cast<uint2*>(bits + static_cast<size_t>(at[k]) * kBits + 8 * lane) = word[k];
      if (lane == 0) records[at[k]] = make_int4(record[k].x + 1, 0, 0, 0), scales[at[k]] = scale[k] + 1.0f;
    }
  }
  if (sum == 1.2345f) *out = sum;
}

template <typename Launch>
double seconds(Launch launch) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<float> times;
  for (uint32_t seed = 0; seed < 9; ++seed) {
    cudaEventRecord(begin);
    launch(77 * seed);
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float milliseconds = 0.0f;
    cudaEventElapsedTime(&milliseconds, begin, end);
    times.push_back(milliseconds * 1e-3f);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <typename Launch>
double best(int processors, Launch launch) {
  double least = 1.0;
  for (const int blocks : {4, 8, 16}) least = std::min(least, seconds([&](uint32_t seed) { launch(blocks * processors, seed); }));
  return least;
}

}  // namespace

int main() {
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) return 77;
  constexpr size_t kGiB = size_t{1} << 30;
  char* memory = nullptr;
  float* out = nullptr;
  cudaMalloc(&memory, 6 * kGiB);
  cudaMalloc(&out, sizeof(float));
  cudaMemset(memory, 0, 6 * kGiB);
  const double copy = 2 * kGiB / seconds([&](uint32_t) { cudaMemcpyAsync(memory, memory + 2 * kGiB, kGiB, cudaMemcpyDeviceToDevice); });
  std::printf("%s, copy %.0f GB/s\n", device.name, copy * 1e-9);
  const auto report = [&](const char* what, double time, double bytes) {
    std::printf("%-58s %6.1f us, share %.2f\n", what, time * 1e6, bytes / copy / time);
  };
  const int processors = device.multiProcessorCount;
  const auto* scale = reinterpret_cast<const float*>(memory + 2 * kGiB);
  constexpr uint32_t kMembers = 65536 * 20;
  report("rows of 65536 bags of 20, 10000000 x 128",
         best(processors,
              [&](int blocks, uint32_t seed) {
                read_rows<<<blocks, kThreads>>>(reinterpret_cast<const uint4*>(memory), scale, 10000000, kMembers, seed, out);
              }),
         kMembers * 64.0);
  report("rows of 65536 bags of 20, 10000000 x 64",
         best(processors,
              [&](int blocks, uint32_t seed) {
                read_rows<<<blocks, kThreads>>>(reinterpret_cast<const uint2*>(memory), scale, 10000000, kMembers, seed, out);
              }),
         kMembers * 64.0);
  report("rows of a lookup, 10000000 x 128, N = 262144",
         best(processors,
              [&](int blocks, uint32_t seed) {
                read_rows<<<blocks, kThreads>>>(reinterpret_cast<const uint4*>(memory), scale, 10000000, 262144, seed, out);
              }),
         262144 * 20.0);
  const auto* gradient = reinterpret_cast<const float4*>(memory);
  char* counters = memory + kGiB;
  char* bits = memory + 3 * kGiB;
  auto* records = reinterpret_cast<int4*>(memory + 4 * kGiB);
  auto* scales = reinterpret_cast<float*>(memory + 5 * kGiB);
  report("update, 10000000 x 128, N = 262144, Counter(8), fp32",
         best(processors,
              [&](int blocks, uint32_t seed) {
                update_rows<128><<<blocks, kThreads>>>(gradient, counters, bits, records, scales, 10000000, 262144, seed, out);
              }),
         262144.0 * (128 * 4 + 2 * 128 + 8));
  report("update, 5000000 x 64, N = 131072, Counter(8), fp32",
         best(processors,
              [&](int blocks, uint32_t seed) {
                update_rows<64><<<blocks, kThreads>>>(gradient, counters, bits, records, scales, 5000000, 131072, seed, out);
              }),
         131072.0 * (64 * 4 + 2 * 64 + 8));
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) std::printf("%s\n", cudaGetErrorString(error));
  return error == cudaSuccess ? 0 : 1;
}
