// Writes tests/numeric/e4m3.bin from the CUDA toolkit's own host conversions:
//   65,536 bytes: the e4m3 code of every bf16 bit pattern (round to nearest even, satfinite)
//   256 x 4 bytes: the f32 bits of every e4m3 code (little endian)
// The test numeric_tables builds it where a CUDA toolkit is, and compares. By hand:
//                nvcc -x cu -o gen_numeric_tables gen_numeric_tables.cpp
//                ./gen_numeric_tables tests/numeric/e4m3.bin
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s OUTPUT\n", argv[0]);
    return 1;
  }
  std::FILE* file = std::fopen(argv[1], "wb");
  if (file == nullptr) {
    std::fprintf(stderr, "cannot write %s\n", argv[1]);
    return 1;
  }
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const std::uint32_t bits = i << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    std::fputc(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3), file);
  }
  for (int code = 0; code < 256; ++code) {
    const __half half(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(code), __NV_E4M3));
    const float value = __half2float(half);
    std::fwrite(&value, 4, 1, file);
  }
  return std::fclose(file) == 0 ? 0 : 1;
}
