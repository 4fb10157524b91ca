# The Vulkan shaders and what calls them, for ggml-vulkan. find_package(Vulkan COMPONENTS glslc) comes first.

# Adds them to the sources of a target.
function(mobie_vulkan_sources target)
    set(from ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
    set(to ${CMAKE_CURRENT_BINARY_DIR}/mobie-vulkan)
    file(MAKE_DIRECTORY ${to})
    foreach(shader quantize route mul_vec mul_mat get_rows)
        add_custom_command(
            OUTPUT ${to}/${shader}.inc
            COMMAND ${Vulkan_GLSLC_EXECUTABLE} -O --target-env=vulkan1.2 -mfmt=c
                    -o ${to}/${shader}.inc ${from}/${shader}.comp
            DEPENDS ${from}/${shader}.comp ${from}/mobie.glsl ${from}/product.glsl
            COMMENT "Compiling the shader ${shader}")
        target_sources(${target} PRIVATE ${to}/${shader}.inc)
    endforeach()
    target_sources(${target} PRIVATE ${from}/mobie-vulkan.cpp ${from}/../ggml_glue/mobie-ggml-vulkan.cpp)
    target_include_directories(${target} PRIVATE ${to})
endfunction()
