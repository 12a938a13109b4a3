// The cache and the attention over it: kv_write, linear_kv_write, kv_move, block_attention.
#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "backend.h"
#include "linear_args.h"

namespace dparallel {
namespace {

// [count, heads, head_dim]; rows become contiguous.
void expect_heads(Tensor& t, const char* name, int64_t count, int64_t heads, int64_t dim,
                  const Tensor& like) {
  check_shape(t, name, like.scalar_type(), {count, heads, dim});
  check_device(t, name, like, "q");
  if ((t.stride(2) != 1 && dim != 1) || (t.stride(1) != dim && heads != 1))
    t = torch::stable::contiguous(t);
}

// (pages, heads, page_size, head_dim); the last becomes contiguous.
CacheLayout layout_of(Tensor& cache, const char* name, const Tensor& q) {
  DP_CHECK(q.dim() == 3, "q: expected 3 dimensions, got ", q.dim());
  DP_CHECK(cache.scalar_type() == q.scalar_type() && cache.dim() == 4 &&
               cache.size(3) == q.size(2) && cache.size(1) > 0 && q.size(1) % cache.size(1) == 0 &&
               q.size(1) <= 64 * cache.size(1) && cache.size(2) > 0,
           name, ": expected ", name_of(q.scalar_type()), " (pages, heads, page_size, ", q.size(2),
           "), of whose heads each serves as many, up to 64, of q's ", q.size(1), ", got ",
           described(cache));
  check_device(cache, name, q, "q");
  make_rows(cache);
  return {cache.size(0),   cache.size(2),   cache.size(1),  cache.size(3),
          cache.stride(0), cache.stride(1), cache.stride(2)};
}

// The arguments of a write to caches (pages, heads, page_size, head_dim), of which q (N, H, D) is
// given or made; no q, k and v yet. Caches of other strides than the kernels write become copies.
KvWriteArgs write_args(const Tensor& q, Tensor& k_cache, Tensor& v_cache, Tensor& positions,
                       Tensor& slot_mapping, Tensor& cos, Tensor& sin,
                       std::optional<Tensor>& q_norm, std::optional<Tensor>& k_norm, double eps) {
  KvWriteArgs args{};
  args.dtype = dtype_of(q, "q");
  args.k_layout = layout_of(k_cache, "k_cache", q);
  check_shape(v_cache, "v_cache", q.scalar_type(), sizes_of(k_cache));
  args.v_layout = layout_of(v_cache, "v_cache", q);
  const int64_t dim = q.size(2);
  args.count = q.size(0);
  args.q_heads = q.size(1);
  DP_CHECK(dim % 2 == 0, "q: expected an even head_dim, got ", dim);
  expect(positions, "positions", ScalarType::Long, {args.count}, q);
  expect(slot_mapping, "slot_mapping", ScalarType::Long, {args.count}, q);
  DP_CHECK(cos.dim() == 2, "cos: expected 2 dimensions, got ", cos.dim());
  const int64_t table = cos.size(0), half = cos.size(1);
  DP_CHECK(2 * half <= dim, "cos: expected at most ", dim / 2, " pairs of a head, got ", half);
  expect(cos, "cos", ScalarType::Float, {table, half}, q);
  expect(sin, "sin", ScalarType::Float, {table, half}, q);
  args.positions = data<int64_t>(positions);
  args.slot_mapping = data<int64_t>(slot_mapping);
  args.cos = data<float>(cos);
  args.sin = data<float>(sin);
  args.table = table;
  args.rotary_dim = 2 * half;
  args.k_cache = k_cache.data_ptr();
  args.v_cache = v_cache.data_ptr();
  DP_CHECK(q_norm.has_value() == k_norm.has_value(), q_norm.has_value() ? "k_norm" : "q_norm",
           ": expected beside ", q_norm.has_value() ? "q_norm" : "k_norm", ", got None");
  if (q_norm.has_value()) {
    expect(*q_norm, "q_norm", q.scalar_type(), {dim}, q);
    expect(*k_norm, "k_norm", q.scalar_type(), {dim}, q);
    args.q_norm = q_norm->data_ptr();
    args.k_norm = k_norm->data_ptr();
    args.eps = static_cast<float>(eps);
  }
  return args;
}

void check_contents(const KvWriteArgs& args) {
  within("positions", args.positions, args.count, 0, args.table);
  within("slot_mapping", args.slot_mapping, args.count, std::numeric_limits<int64_t>::min(),
         args.k_layout.pages * args.k_layout.page_size);
}

template <class Backend>
void kv_write(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor positions,
              Tensor slot_mapping, Tensor cos, Tensor sin, std::optional<Tensor> q_norm,
              std::optional<Tensor> k_norm, double eps) {
  Tensor q_rows = q, k_rows = k_cache, v_rows = v_cache;
  KvWriteArgs args =
      write_args(q, k_rows, v_rows, positions, slot_mapping, cos, sin, q_norm, k_norm, eps);
  const int64_t count = q.size(0), heads = args.k_layout.heads, dim = q.size(2);
  expect_heads(q_rows, "q", count, q.size(1), dim, q);
  expect_heads(k, "k", count, heads, dim, q);
  expect_heads(v, "v", count, heads, dim, q);
  args.q = q_rows.data_ptr();
  args.k = k.data_ptr();
  args.v = v.data_ptr();
  args.q_stride = q_rows.stride(0);
  args.k_stride = k.stride(0);
  args.v_stride = v.stride(0);
  own_memory({{v_cache, "v_cache"}, {k_cache, "k_cache"}, {q, "q"}},
             {{k, "k"},
              {v, "v"},
              {positions, "positions"},
              {slot_mapping, "slot_mapping"},
              {cos, "cos"},
              {sin, "sin"},
              {q_norm, "q_norm"},
              {k_norm, "k_norm"}});
  if constexpr (Backend::kHostReads) check_contents(args);
  Backend::template launch<cpu::kv_write, cuda::kv_write>("kv_write", args, q);
  write_back(q, q_rows);
  write_back(k_cache, k_rows);
  write_back(v_cache, v_rows);
}

DPARALLEL_OP(
    kv_write,
    "kv_write(Tensor(a!) q, Tensor k, Tensor v, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor "
    "positions, Tensor slot_mapping, Tensor cos, Tensor sin, Tensor? q_norm=None, Tensor? "
    "k_norm=None, float eps=1e-6) -> ()")

template <class Backend>
Tensor linear_kv_write(Tensor x, Tensor weight, std::optional<Tensor> scale,
                       std::optional<Tensor> bias, Tensor k_cache, Tensor v_cache, Tensor positions,
                       Tensor slot_mapping, Tensor cos, Tensor sin, std::optional<Tensor> q_norm,
                       std::optional<Tensor> k_norm, double eps, bool constant) {
  LinearArgs product = linear_args(x, weight, scale, bias, constant);
  DP_CHECK(k_cache.dim() == 4, "k_cache: expected (pages, heads, page_size, head_dim), got ",
           k_cache.dim(), " dimensions");
  const int64_t dim = k_cache.size(3), kv_heads = k_cache.size(1);
  const int64_t heads = dim > 0 ? product.out_width / dim - 2 * kv_heads : 0;
  DP_CHECK(heads > 0 && (heads + 2 * kv_heads) * dim == product.out_width,
           "weight: expected rows of queries and of ", kv_heads, " heads of ", dim,
           " for keys and for values, got ", product.out_width);
  Tensor q = torch::stable::new_empty(x, {product.count, heads, dim});
  product.out = q.data_ptr();
  Tensor k_rows = k_cache, v_rows = v_cache;
  const KvWriteArgs args =
      write_args(q, k_rows, v_rows, positions, slot_mapping, cos, sin, q_norm, k_norm, eps);
  own_memory({{v_cache, "v_cache"}, {k_cache, "k_cache"}}, {{x, "x"},
                                                            {weight, "weight"},
                                                            {scale, "scale"},
                                                            {bias, "bias"},
                                                            {positions, "positions"},
                                                            {slot_mapping, "slot_mapping"},
                                                            {cos, "cos"},
                                                            {sin, "sin"},
                                                            {q_norm, "q_norm"},
                                                            {k_norm, "k_norm"}});
  if constexpr (Backend::kHostReads) check_contents(args);
  Backend::template launch<cpu::linear_kv_write, cuda::linear_kv_write,
                           cuda::linear_kv_write_scratch>("linear_kv_write",
                                                          LinearKvWriteArgs{product, args}, x);
  write_back(k_cache, k_rows);
  write_back(v_cache, v_rows);
  return q;
}

DPARALLEL_OP(linear_kv_write,
             "linear_kv_write(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor(a!) "
             "k_cache, Tensor(b!) v_cache, Tensor positions, Tensor slot_mapping, Tensor cos, "
             "Tensor sin, Tensor? q_norm=None, Tensor? k_norm=None, float eps=1e-6, bool "
             "constant=False) -> Tensor")

// A slot that a lane writes is not read or written by another lane, nor written twice.
void check_apart(const KvMoveArgs& args) {
  std::vector<std::tuple<int64_t, int64_t, bool>> uses;  // slot, lane, whether it is read
  for (int64_t i = 0; i < args.lanes * args.count; ++i)
    if (args.source[i] >= 0 && args.target[i] >= 0) {
      uses.emplace_back(args.source[i], i / args.count, true);
      uses.emplace_back(args.target[i], i / args.count, false);
    }
  std::sort(uses.begin(), uses.end());  // of a slot and lane, writes come first
  for (size_t i = 1; i < uses.size(); ++i) {
    const auto& [slot, lane, read] = uses[i];
    const auto& [last_slot, last_lane, last_read] = uses[i - 1];
    if (slot != last_slot) continue;
    DP_CHECK(lane == last_lane, "target: expected lanes that share no slot, got slot ", slot,
             " in lanes ", last_lane, " and ", lane);
    DP_CHECK(read || last_read, "target: expected each slot once, got slot ", slot,
             " twice in lane ", lane);
  }
}

void check_contents(const KvMoveArgs& args) {
  const int64_t slots = args.layout.pages * args.layout.page_size;
  constexpr int64_t low = std::numeric_limits<int64_t>::min();
  within("source", args.source, args.lanes * args.count, low, slots);
  within("target", args.target, args.lanes * args.count, low, slots);
  check_apart(args);
}

template <class Backend>
void kv_move(Tensor kv_cache, Tensor source, Tensor target) {
  const DType dtype = dtype_of(kv_cache, "kv_cache", true);
  DP_CHECK(kv_cache.dim() == 6 && kv_cache.size(1) == 2 && kv_cache.size(4) > 0,
           "kv_cache: expected (layers, 2, pages, heads, page_size, head_dim), got ",
           described(kv_cache));
  DP_CHECK(source.dim() == 2, "source: expected 2 dimensions, got ", source.dim());
  const int64_t lanes = source.size(0), count = source.size(1);
  DP_CHECK(count <= kMostMoves, "source: expected at most ", kMostMoves, " entries a lane, got ",
           count);
  expect(source, "source", ScalarType::Long, {lanes, count}, kv_cache);
  expect(target, "target", ScalarType::Long, {lanes, count}, kv_cache);
  own_memory({{kv_cache, "kv_cache"}}, {{source, "source"}, {target, "target"}});
  Tensor rows = kv_cache;
  make_rows(rows);
  const KvMoveArgs args{rows.data_ptr(),
                        element_size(dtype),
                        rows.size(0),
                        rows.stride(0),
                        rows.stride(1),
                        {rows.size(2), rows.size(4), rows.size(3), rows.size(5), rows.stride(2),
                         rows.stride(3), rows.stride(4)},
                        lanes,
                        count,
                        data<int64_t>(source),
                        data<int64_t>(target)};
  if constexpr (Backend::kHostReads) check_contents(args);
  Backend::template launch<cpu::kv_move, cuda::kv_move>("kv_move", args, kv_cache);
  write_back(kv_cache, rows);
}

DPARALLEL_OP(kv_move, "kv_move(Tensor(a!) kv_cache, Tensor source, Tensor target) -> ()")

void check_contents(const BlockAttentionArgs& args) {
  const int64_t size = args.k_layout.page_size, capacity = args.table_width * size;
  runs_apart("segment", args.q_start, args.q_end, args.segments, args.count);
  within("kv_lens", args.kv_lens, args.segments, 0, capacity + 1);
  for (int64_t s = 0; s < args.segments; ++s) {
    if (args.restricted()) {
      const int64_t rows = args.q_end[s] - args.q_start[s];
      DP_CHECK(rows <= args.kv_lens[s], "kv_lens: expected a slot for each of the segment's ", rows,
               " rows, got ", args.kv_lens[s], " at ", s);
      DP_CHECK(args.causal || rows <= 64 * args.words,
               "ancestors: expected a bit for each of the segment's ", rows, " rows, got ",
               64 * args.words, " at ", s);
    }
    within("block_table", args.block_table + s * args.table_width,
           (args.kv_lens[s] + size - 1) / size, 0, args.k_layout.pages);
  }
}

template <class Backend>
Tensor block_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor q_start, Tensor q_end,
                       Tensor kv_lens, Tensor block_table, int64_t max_q_len, int64_t max_kv_len,
                       double scale, bool causal, std::optional<Tensor> ancestors) {
  const DType dtype = dtype_of(q, "q");
  const CacheLayout keys = layout_of(k_cache, "k_cache", q);
  check_shape(v_cache, "v_cache", q.scalar_type(), sizes_of(k_cache));
  const CacheLayout values = layout_of(v_cache, "v_cache", q);
  const int64_t count = q.size(0), heads = q.size(1), dim = q.size(2);
  const int64_t segments = length_of(q_start, "q_start");
  expect_heads(q, "q", count, heads, dim, q);
  expect(q_start, "q_start", ScalarType::Long, {segments}, q);
  expect(q_end, "q_end", ScalarType::Long, {segments}, q);
  expect(kv_lens, "kv_lens", ScalarType::Long, {segments}, q);
  DP_CHECK(block_table.dim() == 2, "block_table: expected 2 dimensions, got ", block_table.dim());
  const int64_t table_width = block_table.size(1);
  expect(block_table, "block_table", ScalarType::Long, {segments, table_width}, q);
  DP_CHECK(max_q_len >= 0, "max_q_len: expected >= 0, got ", max_q_len);
  DP_CHECK(max_kv_len >= 0, "max_kv_len: expected >= 0, got ", max_kv_len);
  int64_t words = 0;
  if (ancestors.has_value()) {
    DP_CHECK(ancestors->dim() == 2, "ancestors: expected 2 dimensions, got ", ancestors->dim());
    DP_CHECK(!causal, "ancestors: expected instead of causal, got both");
    words = ancestors->size(1);
    expect(*ancestors, "ancestors", ScalarType::Long, {count, words}, q);
  }
  Tensor out = torch::stable::new_empty(q, {count, heads, dim});
  const BlockAttentionArgs args{dtype,
                                q.data_ptr(),
                                q.stride(0),
                                count,
                                heads,
                                k_cache.data_ptr(),
                                v_cache.data_ptr(),
                                keys,
                                values,
                                segments,
                                data<int64_t>(q_start),
                                data<int64_t>(q_end),
                                data<int64_t>(kv_lens),
                                data<int64_t>(block_table),
                                table_width,
                                max_q_len,
                                max_kv_len,
                                static_cast<float>(scale),
                                out.data_ptr(),
                                causal,
                                listed(ancestors),
                                words};
  if (out.numel() == 0) return out;
  if constexpr (Backend::kHostReads) check_contents(args);
  Backend::template launch<cpu::block_attention, cuda::block_attention,
                           cuda::block_attention_scratch>("block_attention", args, q);
  return out;
}

DPARALLEL_OP(block_attention,
             "block_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor q_start, Tensor "
             "q_end, Tensor "
             "kv_lens, Tensor block_table, int max_q_len, int max_kv_len, float scale, bool "
             "causal, Tensor? ancestors) -> Tensor")

}  // namespace
}  // namespace dparallel
