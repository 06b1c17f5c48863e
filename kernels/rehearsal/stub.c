/* The part of libcuda.so.1 that Triton's launchers call. Nothing is loaded and nothing launched: grids, blocks and
 * tensor maps are checked as the driver checks them, and counted. cuda.h is the one in Triton's wheel. */
#include "cuda.h"
#include <stdint.h>
#include <stdio.h>

static int multiprocessors, shared_of_a_block;
static long launches, tensor_maps;
static char refusal[512] = "refused by the rehearsal";

void rehearsal_begin(int count, int shared) {
    multiprocessors = count;
    shared_of_a_block = shared;
    launches = tensor_maps = 0;
}
long rehearsal_launches(void) { return launches; }
long rehearsal_tensor_maps(void) { return tensor_maps; }

/* stands for a kernel of torch's on the CPU, whatever it takes (torch_kernels.py) */
static long replaced_calls;
void rehearsal_torch_kernel(void) { ++replaced_calls; }
long rehearsal_replaced_calls(void) { return replaced_calls; }

CUresult cuGetErrorString(CUresult error, const char **text) { *text = refusal; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_of_a_block; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_of_a_block + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    default: *value = 1; /* clocks and bus, which nothing here asks for */
    }
    return CUDA_SUCCESS;
}
#undef cuDevicePrimaryCtxRetain
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)1;
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    *count = 1;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(uint64_t *)data = pointer;
    return CUDA_SUCCESS;
}

#undef cuLaunchKernelEx
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
    launches++;
    if (config->gridDimX == 0 || config->gridDimX > 2147483647u || config->gridDimY == 0 || config->gridDimY > 65535 ||
        config->gridDimZ == 0 || config->gridDimZ > 65535) {
        snprintf(refusal, sizeof refusal, "the rehearsal refuses the grid %u x %u x %u", config->gridDimX,
                 config->gridDimY, config->gridDimZ);
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (threads == 0 || threads > 1024 || config->sharedMemBytes > (unsigned)shared_of_a_block) {
        snprintf(refusal, sizeof refusal, "the rehearsal refuses a block of %u threads with %u bytes of shared memory",
                 threads, config->sharedMemBytes);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

/* CUDA Driver API, cuTensorMapEncodeTiled: what it demands of its arguments without interleaving. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box,
                                const cuuint32_t *element_stride, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
    const char *wrong = NULL;
    unsigned element = 2, span = 0;
    tensor_maps++;
    if (type == CU_TENSOR_MAP_DATA_TYPE_UINT8) element = 1;
    if (type == CU_TENSOR_MAP_DATA_TYPE_UINT32 || type == CU_TENSOR_MAP_DATA_TYPE_INT32 ||
        type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ ||
        type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ) element = 4;
    if (type == CU_TENSOR_MAP_DATA_TYPE_UINT64 || type == CU_TENSOR_MAP_DATA_TYPE_INT64 ||
        type == CU_TENSOR_MAP_DATA_TYPE_FLOAT64) element = 8;
    if (swizzle == CU_TENSOR_MAP_SWIZZLE_32B) span = 32;
    if (swizzle == CU_TENSOR_MAP_SWIZZLE_64B) span = 64;
    if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B) span = 128;
    if (rank < 1 || rank > 5) wrong = "its rank is not 1 to 5";
    else if ((uintptr_t)address % 16) wrong = "its address is no multiple of 16";
    for (unsigned axis = 0; axis < rank && !wrong; axis++) {
        if (size[axis] == 0 || size[axis] > (1ull << 32)) wrong = "an axis has no element or more than 2^32";
        else if (box[axis] == 0 || box[axis] > 256) wrong = "a side of its box is not 1 to 256";
        else if (element_stride[axis] < 1 || element_stride[axis] > 8) wrong = "an element stride is not 1 to 8";
        else if (axis + 1 < rank && (stride[axis] % 16 || stride[axis] >= (1ull << 40)))
            wrong = "a stride in bytes is no multiple of 16 below 2^40";
    }
    if (!wrong && rank > 1 && stride[0] < size[0] * element) wrong = "its rows overlap";
    if (!wrong && box[0] * element % 16) wrong = "the inner side of its box is no multiple of 16 bytes";
    if (!wrong && span && box[0] * element > span) wrong = "the inner side of its box is wider than its swizzle";
    if (!wrong) return CUDA_SUCCESS;
    snprintf(refusal, sizeof refusal, "the rehearsal refuses a tensor map, for %s: type %d, rank %u, inner size %llu, box %u",
             wrong, type, rank, (unsigned long long)size[0], box[0]);
    return CUDA_ERROR_INVALID_VALUE;
}
