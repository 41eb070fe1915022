# The instruction sets kernels.cpp is compiled for, best first: name, compiler flags, CPU features to look for.
set(architecture "${CMAKE_SYSTEM_PROCESSOR}")
if(CMAKE_OSX_ARCHITECTURES)  # macOS compiles for what this names, on either kind of machine
  set(architecture "${CMAKE_OSX_ARCHITECTURES}")
endif()
if(architecture MATCHES "^(x86_64|amd64|AMD64)$")
  rnnkern_isa(avx512 "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx2 -mfma" avx512f avx512dq avx512vl avx512bw fma)
  rnnkern_isa(avx2 "-mavx2 -mfma" avx2 fma)
  if(RNNKERN_WIDE)  # slow, for tests: the shape of the AVX-512 code on a machine that has only AVX2
    rnnkern_isa(avx2_wide "-mavx2 -mfma -DRNNKERN_VECTOR_BYTES=64" avx2 fma)
  endif()
  rnnkern_isa(baseline "-march=x86-64-v2" sse4.2 popcnt)
elseif(architecture MATCHES "^(aarch64|arm64|ARM64)$")
  rnnkern_isa(neon "")  # of every such CPU
else()
  rnnkern_isa(baseline "")
endif()
