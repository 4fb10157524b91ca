// kernels_amx.cpp with tiles played in C++, for CPUs that have AVX-512 but no AMX.
#define MOBIE_PLAYED_TILES
#define mobie_kernels_amx mobie_kernels_amx_played
#include "../kernels_amx.cpp"
