# The sources of the kernels and their compile options, for include() in a CMakeLists.txt.
#
# Sets MOBIE_CODEC_SOURCES (ggml-base), MOBIE_KERNEL_SOURCES (ggml-cpu) and MOBIE_CUDA_SOURCES (ggml-cuda), absolute paths. Properties of sources are
# visible only to targets of the including directory: include this where the target is defined, in each such directory.
# One list serves every platform: a file of a foreign instruction set compiles to an empty entry.

set(MOBIE_CODEC_SOURCES ${CMAKE_CURRENT_LIST_DIR}/codec.cpp)
set(MOBIE_KERNEL_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/dispatch.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels_ref.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels_avx2.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels_avxvnni.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels_avx512.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels_avx512vnni.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels_avx512vbmi.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels_amx.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels_neon.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels_neon_dotprod.cpp)
set(MOBIE_SEARCH_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/search.cpp
    ${CMAKE_CURRENT_LIST_DIR}/search_avx2.cpp
    ${CMAKE_CURRENT_LIST_DIR}/search_avx512.cpp)
list(APPEND MOBIE_KERNEL_SOURCES ${MOBIE_SEARCH_SOURCES})
set(MOBIE_CUDA_SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda/mobie-cuda.cu)

# -ffp-contract=off: a fused multiply-add rounds once where FORMAT.md rounds twice. -O3 also in debug builds of the
# host project: kernels are unusable without.
set(MOBIE_OPTIONS -O3 -ffp-contract=off)
set_source_files_properties(${MOBIE_CODEC_SOURCES} ${MOBIE_KERNEL_SOURCES}
    PROPERTIES COMPILE_OPTIONS "${MOBIE_OPTIONS}")
# The search for signs is no part of the format: sums may be rounded once.
set_source_files_properties(${MOBIE_SEARCH_SOURCES} PROPERTIES COMPILE_OPTIONS "-O3;-ffp-contract=fast")

if(CMAKE_OSX_ARCHITECTURES)
    set(MOBIE_ARCH ${CMAKE_OSX_ARCHITECTURES})
else()
    set(MOBIE_ARCH ${CMAKE_SYSTEM_PROCESSOR})
endif()
if("${MOBIE_ARCH}" MATCHES "^(x86_64|AMD64|amd64)$")
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/search_avx2.cpp
        PROPERTIES COMPILE_OPTIONS "-O3;-ffp-contract=fast;-mavx2;-mfma")
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/search_avx512.cpp
        PROPERTIES COMPILE_OPTIONS "-O3;-ffp-contract=fast;-mavx512f;-mprefer-vector-width=512")
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_avx2.cpp
        PROPERTIES COMPILE_OPTIONS "${MOBIE_OPTIONS};-mavx2")
    include(CheckCXXCompilerFlag)
    check_cxx_compiler_flag(-mavxvnni MOBIE_COMPILER_HAS_AVXVNNI)  # GCC 11, Clang 12; without, the file is empty
    if(MOBIE_COMPILER_HAS_AVXVNNI)
        set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_avxvnni.cpp
            PROPERTIES COMPILE_OPTIONS "${MOBIE_OPTIONS};-mavx2;-mavxvnni")
    endif()
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_avx512.cpp
        PROPERTIES COMPILE_OPTIONS "${MOBIE_OPTIONS};-mavx512f;-mavx512bw;-mavx512vl")
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_avx512vnni.cpp
        PROPERTIES COMPILE_OPTIONS "${MOBIE_OPTIONS};-mavx512f;-mavx512bw;-mavx512vl;-mavx512vnni")
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_avx512vbmi.cpp
        PROPERTIES COMPILE_OPTIONS "${MOBIE_OPTIONS};-mavx512f;-mavx512bw;-mavx512vl;-mavx512vnni;-mavx512vbmi")
    check_cxx_compiler_flag("-mamx-tile -mamx-int8" MOBIE_COMPILER_HAS_AMX)  # GCC 11, Clang 12
    if(MOBIE_COMPILER_HAS_AMX)
        set(MOBIE_AMX_OPTIONS
            -mavx512f -mavx512bw -mavx512vl -mavx512vnni -mavx512vbmi -mprfchw -mamx-tile -mamx-int8)
        set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_amx.cpp
            PROPERTIES COMPILE_OPTIONS "${MOBIE_OPTIONS};${MOBIE_AMX_OPTIONS}")
    endif()
elseif("${MOBIE_ARCH}" MATCHES "^(aarch64|arm64|ARM64)$")
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels_neon_dotprod.cpp
        PROPERTIES COMPILE_OPTIONS "${MOBIE_OPTIONS};-march=armv8.2-a+dotprod")
endif()
