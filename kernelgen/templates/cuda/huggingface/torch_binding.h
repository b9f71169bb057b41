#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

// Starts a kernel on the current stream: a grid of groups_x by groups_y blocks, on contiguous tensors
// and sizes in the kernel's order.  Results and scratch memory are among the tensors.
void launch(std::string entry, std::vector<at::Tensor> buffers, std::vector<int64_t> sizes,
            int64_t groups_x, int64_t groups_y, int64_t threads, int64_t shared_bytes);
