// The size of one feature level, as the CUDA kernels and the checks of all operators know it.
#pragma once

#include <cstdint>

namespace dn_detr {

struct LevelSize {
  int32_t height;
  int32_t width;
  int32_t first_cell;  // within the cells of all levels
};

}  // namespace dn_detr
