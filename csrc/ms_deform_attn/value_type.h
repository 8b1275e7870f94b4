// Types of values, as the kernels are compiled for them. No other header is needed.
#pragma once

namespace dn_detr {

enum class ValueType { float32, float64, bfloat16, float16 };
constexpr int kValueTypes = 4;

}  // namespace dn_detr
