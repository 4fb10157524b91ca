// The compiled shaders. glslc writes each as the words of an initializer (shaders.cmake).
#include "mobie-vulkan.h"

namespace {

const uint32_t quantize[] =
#include "quantize.inc"
    ;
const uint32_t route[] =
#include "route.inc"
    ;
const uint32_t mul_vec[] =
#include "mul_vec.inc"
    ;
const uint32_t mul_mat[] =
#include "mul_mat.inc"
    ;
const uint32_t get_rows[] =
#include "get_rows.inc"
    ;

}  // namespace

const mobie_vulkan_shader mobie_vulkan_shaders[MOBIE_VULKAN_SHADERS] = {
    { "mobie_quantize", quantize, sizeof(quantize), sizeof(mobie_vulkan_quantize) },
    { "mobie_route", route, sizeof(route), sizeof(mobie_vulkan_route) },
    { "mobie_mul_vec", mul_vec, sizeof(mul_vec), sizeof(mobie_vulkan_product) },
    { "mobie_mul_mat", mul_mat, sizeof(mul_mat), sizeof(mobie_vulkan_product) },
    { "mobie_get_rows", get_rows, sizeof(get_rows), sizeof(mobie_vulkan_get_rows) },
};
