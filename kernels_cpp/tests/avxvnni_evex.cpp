// kernels_avxvnni.cpp on CPUs that have its instructions only in AVX-512's encoding, so that it is checked there too.
#define MOBIE_EVEX
#define mobie_kernels_avxvnni mobie_kernels_avxvnni_evex
#include "../kernels_avxvnni.cpp"
