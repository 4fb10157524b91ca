// The choice of an implementation, once per process.
//
// A new instruction set is one kernel file, one line in kernels.h, one in the table below and one in sources.cmake.
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

namespace {

bool runs_always() {
    return true;
}

#if defined(__x86_64__)
// __builtin_cpu_supports asks the CPU, and whether the operating system saves the registers.
bool runs_avx2() {
    return __builtin_cpu_supports("avx2");
}
bool runs_avxvnni() {
    unsigned eax, ebx, ecx, edx;  // GCC 12 has no name for the feature
    return runs_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
bool runs_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
}
bool runs_avx512vnni() {
    return runs_avx512() && __builtin_cpu_supports("avx512vnni");
}
bool runs_avx512vbmi() {
    return runs_avx512vnni() && __builtin_cpu_supports("avx512vbmi");
}

// The CPU has the tiles and the products of int8, the operating system saves the registers of both kinds, and it gives
// the tiles to this process: Linux (5.16 and later) only to those that ask, once for all of their threads.
bool runs_amx() {
#if defined(__linux__)
    unsigned eax, ebx, ecx, edx;
    if (!runs_avx512vbmi() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) ||
        (edx >> 24 & 3) != 3) {  // amx-tile, amx-int8
        return false;
    }
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // AVX-512 is there, so the instruction is
    const int TILE_DATA = 18;                            // of XCR0; 17 are the tiles' shapes
    return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

#if defined(__aarch64__)
bool runs_neon_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    int    has  = 0;
    size_t size = sizeof(has);
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
#endif
}
#endif

struct implementation {
    const mobie_kernels * kernels;
    bool (*runs)();
};

// Slowest first.
const implementation TABLE[] = {
    { &mobie_kernels_ref, runs_always },
#if defined(__x86_64__)
    { &mobie_kernels_avx2, runs_avx2 },
    { &mobie_kernels_avxvnni, runs_avxvnni },
    { &mobie_kernels_avx512, runs_avx512 },
    { &mobie_kernels_avx512vnni, runs_avx512vnni },
    { &mobie_kernels_avx512vbmi, runs_avx512vbmi },
    { &mobie_kernels_amx, runs_amx },
#endif
#if defined(__aarch64__)
    { &mobie_kernels_neon, runs_always },
    { &mobie_kernels_neon_dotprod, runs_neon_dotprod },
#endif
};

struct choice {
    const mobie_kernels * all[sizeof(TABLE) / sizeof(TABLE[0])];
    int                   n;
    const mobie_kernels * best;

    choice() : n(0) {
        for (const implementation & i : TABLE) {
            if (i.kernels->name && i.runs()) {
                all[n++] = i.kernels;
            }
        }
        best = all[n - 1];

        const char * wanted = getenv("MOBIE_ISA");
        if (!wanted || !*wanted) {
            return;
        }
        for (int i = 0; i < n; i++) {
            if (strcmp(all[i]->name, wanted) == 0) {
                best = all[i];
                return;
            }
        }
        fprintf(stderr, "mobie: MOBIE_ISA=%s is not among the implementations this CPU runs (", wanted);
        for (int i = 0; i < n; i++) {
            fprintf(stderr, "%s%s", i ? ", " : "", all[i]->name);
        }
        fprintf(stderr, "); using %s\n", best->name);
    }
};

const choice & get_choice() {
    static const choice c;  // C++11: initialized once, whatever thread comes first
    return c;
}

}  // namespace

const mobie_kernels * mobie_kernels_best(void) {
    return get_choice().best;
}

const mobie_kernels * const * mobie_kernels_all(int * n) {
    *n = get_choice().n;
    return get_choice().all;
}
