# Flags of every target. The same bits on every device need IEEE arithmetic, one operation at a time: no contraction into multiply-adds and
# no fast-math. The two other switches only drop errno and trap handling, which lets the compiler vectorise.

function(dualbin_target target)
  if(DUALBIN_SANITIZE)
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${DUALBIN_SANITIZE};-fno-sanitize-recover=all;-fno-omit-frame-pointer;-O1>)
    target_link_options(${target} PRIVATE -fsanitize=${DUALBIN_SANITIZE})
  endif()
  set(ieee -ffp-contract=off -fno-math-errno -fno-trapping-math)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:${ieee};-Wall;-Wextra>
    $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;--expt-relaxed-constexpr;-lineinfo;-Xcompiler=-ffp-contract=off,-Wall>)
endfunction()
