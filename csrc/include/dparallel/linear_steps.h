// The steps of linear_swiglu and linear_kv_write, for devices whose kernels do not take them at
// once.
#pragma once

#include "dparallel/launch.h"

namespace dparallel {

// Columns [first, first + width) of a product, into `out` [count, width].
inline LinearArgs columns_of(LinearArgs args, int64_t first, int64_t width, void* out) {
  const int64_t size = args.scale != nullptr ? 1 : element_size(args.dtype);
  args.weight = static_cast<const char*>(args.weight) + first * args.in * size;
  if (args.scale != nullptr) args.scale += first;
  if (args.bias != nullptr)
    args.bias = static_cast<const char*>(args.bias) + first * element_size(args.dtype);
  args.out_width = width;
  args.out = out;
  return args;
}

struct LinearSwigluSteps {
  LinearArgs product;
  SwigluArgs swiglu;

  static int64_t scratch(const LinearArgs& args) {
    return args.count * args.out_width * element_size(args.dtype);
  }
  LinearSwigluSteps(const LinearArgs& args, void* scratch)
      : product(columns_of(args, 0, args.out_width, scratch)) {
    const int64_t width = args.out_width / 2;
    const RowStrides rows{args.count, 0, args.out_width};
    const char* up = static_cast<char*>(scratch) + width * element_size(args.dtype);
    swiglu = {args.dtype, scratch, up, rows, rows, args.count, width, args.out};
  }
};

struct LinearKvWriteSteps {
  LinearArgs queries, keys_values;
  KvWriteArgs write;

  static int64_t scratch(const LinearKvWriteArgs& args) {
    const CacheLayout& layout = args.write.k_layout;
    return args.write.count * 2 * layout.heads * layout.head_dim * element_size(args.write.dtype);
  }
  LinearKvWriteSteps(const LinearKvWriteArgs& args, void* scratch) : write(args.write) {
    const int64_t dim = write.k_layout.head_dim, width = write.k_layout.heads * dim;
    const int64_t q_width = write.q_heads * dim;
    queries = columns_of(args.product, 0, q_width, args.product.out);
    keys_values = columns_of(args.product, q_width, 2 * width, scratch);
    write.q = queries.out;
    write.k = scratch;
    write.v = static_cast<char*>(scratch) + width * element_size(write.dtype);
    write.q_stride = q_width;
    write.k_stride = write.v_stride = 2 * width;
  }
};

}  // namespace dparallel
