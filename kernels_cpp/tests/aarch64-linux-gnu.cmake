# Cross compilation with Debian's g++-aarch64-linux-gnu; tests run in qemu-user, on a core without optional instructions
# (so nothing beyond ARMv8.0 slips in) and on one with dot products.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR "qemu-aarch64;-L;/usr/aarch64-linux-gnu")
set(MOBIE_EMULATED_CPUS cortex-a53 cortex-a76)
