# The flags of the files that are written for one instruction set. Which of them runs is decided on the machine of the user, so no other file
# has such flags. Without multiply-adds (-mfma): the definition rounds twice where they round once.

include(CheckCXXCompilerFlag)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(avx2_flags -mavx2 -mf16c -mpopcnt)
  set(avx512_flags ${avx2_flags} -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")  # its own header makes an undefined vector by reading one
    list(APPEND avx512_flags -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  check_cxx_compiler_flag("-mavx512f -mavx512bw -mprefer-vector-width=512" DUALBIN_HAS_AVX512_FLAGS)
  if(DUALBIN_HAS_AVX512_FLAGS)
    target_compile_definitions(dualbin_cpu PRIVATE DUALBIN_WITH_X86_SIMD=1)
    set_source_files_properties(cuda/cpu/simd/avx2.cpp PROPERTIES COMPILE_OPTIONS "${avx2_flags}")
    set_source_files_properties(cuda/cpu/simd/avx512.cpp PROPERTIES COMPILE_OPTIONS "${avx512_flags}")
  endif()
endif()
