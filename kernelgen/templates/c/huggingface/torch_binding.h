#pragma once

#include <ATen/core/Tensor.h>

#include <string>

// w (N, row bytes) uint8, blocks as a file has them -> what matmul takes, uint8
at::Tensor prepare(const at::Tensor &w, std::string format, int64_t k);
// x (M, K) float32 by prepared weights (N, K) -> (M, N) float32
at::Tensor matmul(const at::Tensor &x, const at::Tensor &prepared, std::string format, int64_t n,
                  std::string precision);
// w (N, row bytes) uint8 -> (N, K) float32
at::Tensor dequantize(const at::Tensor &w, std::string format, int64_t k);
// the instruction set in use
std::string isa();
