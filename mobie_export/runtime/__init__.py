"""The patched llama.cpp: find its sources, build it, put it into this Python environment, check it, take it out again.

Layout while building (the folder survives, so that a second build is incremental):

    $MOBIE_CACHE or ~/.cache/mobie-export/
        llama_cpp_python-0.3.36.tar.gz          the pinned sdist, verified
        runtime-<digest of pin and patches>/
            src/                                unpacked, patched, kernels copied in
            build/                              cmake (build-cuda/ with --cuda, build-vulkan/ with --vulkan)
        converter-<digest of pin and parts>/    upstream's convert_hf_to_gguf.py, see `converter`

and once installed, inside the environment's site-packages:

    llama_cpp/lib/*.so          the libraries, loaded by llama_cpp without any environment variable
    llama_cpp/bin/llama-*       the tools; links in the environment's bin/ make them commands
    llama_cpp/mobie-runtime.json    what was installed, for `doctor` and `restore`
    llama_cpp.stock/            what was there before, if anything
"""
