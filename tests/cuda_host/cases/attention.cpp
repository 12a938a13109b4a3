// Cases of the paged cache and the attention over it.
#include "cases.h"

namespace cases {

void kv_write_case() {
  const DType dtype = one_of({DType::float32, DType::bfloat16, DType::float16});
  const int64_t dim = one_of({2, 6, 16, 64, 80, 128, 512}), heads = 1 + below(3),
                group = 1 + below(3);
  const int64_t count = below(12), page_size = one_of({1, 5, 16}), pages = 1 + below(4) + count;
  const int64_t table = 1 + below(9), gap = chance(0.5) ? below(9) : 0;
  const CacheLayout layout = random_layout(pages, page_size, heads, dim);
  const int64_t q_stride = group * heads * dim + gap, k_stride = heads * dim + gap;
  Numbers q(dtype, count * q_stride), k(dtype, count * k_stride), v(dtype, count * k_stride);
  Numbers keys(dtype, pages * page_size * heads * dim), values(keys);
  const int64_t rotary = chance(0.5) ? dim : 2 * below(dim / 2 + 1);
  std::vector<float> cos(table * rotary / 2), sin(table * rotary / 2);
  for (auto& x : cos) x = static_cast<float>(uniform(-1, 1));
  for (auto& x : sin) x = static_cast<float>(uniform(-1, 1));
  std::vector<int64_t> slots(pages * page_size), positions(count);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), engine);
  slots.resize(count);
  for (auto& slot : slots)
    if (chance(0.2)) slot = -1;
  for (auto& position : positions) position = below(table);
  Numbers q2(q), keys2(keys), values2(values);
  KvWriteArgs args{dtype,
                   q.memory.get(),
                   k.memory.get(),
                   v.memory.get(),
                   q_stride,
                   k_stride,
                   k_stride,
                   count,
                   group * heads,
                   positions.data(),
                   slots.data(),
                   cos.data(),
                   sin.data(),
                   table,
                   rotary,
                   keys.memory.get(),
                   values.memory.get(),
                   layout,
                   layout};
  const Numbers q_norm(dtype, dim), k_norm(dtype, dim), q_first(q);
  if (chance(0.5)) {
    args.q_norm = q_norm.memory.get();
    args.k_norm = k_norm.memory.get();
    args.eps = 1e-3f;
  }
  cpu::kv_write(args, serial);
  args.q = q2.memory.get();
  args.k_cache = keys2.memory.get();
  args.v_cache = values2.memory.get();
  launched(cuda::kv_write(args, nullptr));
  near(q2, q, "q");
  near(keys2, keys, "k_cache");
  near(values2, values, "v_cache");
  if (args.q_norm == nullptr || count == 0) return;
  // A row alone, to the bit.
  const int64_t row = below(count), row_bytes = q.bytes() / std::max<int64_t>(1, count);
  Numbers alone(q_first), keys3(keys2);
  if (const int64_t slot = slots[row]; slot >= 0)
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at = layout.offset(slot / page_size, slot % page_size, head);
      for (int64_t i = 0; i < dim; ++i) keys3.set(at + i, 3.0);  // to be written over
    }
  args.q = alone.memory.get() + row * row_bytes;
  args.k = k.memory.get() + row * (k.bytes() / count);
  args.v = v.memory.get() + row * (v.bytes() / count);
  args.k_cache = keys3.memory.get();
  args.positions += row;
  args.slot_mapping += row;
  args.count = 1;
  launched(cuda::kv_write(args, nullptr));
  REQUIRE(std::memcmp(alone.memory.get() + row * row_bytes, q2.memory.get() + row * row_bytes,
                      row_bytes) == 0,
          "q of a row alone is not what it is among others");
  REQUIRE(std::memcmp(keys3.memory.get(), keys2.memory.get(), keys2.bytes()) == 0,
          "a key alone is not what it is among others");
}

void kv_move_case() {
  // Paths that a block holds, and those of which it holds some columns alone, down to one vector.
  const int64_t size = one_of<int64_t>({2, 2, 4, 8}), lanes = below(4);
  const int64_t dim = one_of<int64_t>({1, 3, 8, 16, 64, 80});
  const int64_t count =
      lanes > 0 && chance(0.05) ? 1 + below(kMostMoves) : below(chance(0.1) ? 300 : 20);
  const int64_t page_size = one_of<int64_t>({1, 5, 16}), heads = 1 + below(3);
  const int64_t pages = (lanes * count + page_size - 1) / page_size + 1 + below(3);
  const CacheLayout layout = random_layout(pages, page_size, heads, dim);
  const int64_t layers = 1 + below(3), gap = one_of<int64_t>({0, 0, 8, 3});
  const int64_t kv_stride = pages * page_size * heads * dim + gap,
                layer_stride = 2 * kv_stride + gap;
  const int64_t bytes = (layers * layer_stride - gap) * size;
  std::unique_ptr<char[]> on_cpu(new char[bytes]), on_cuda(new char[bytes]);
  for (int64_t i = 0; i < bytes; ++i) on_cpu[i] = on_cuda[i] = static_cast<char>(below(256));
  std::vector<int64_t> slots(pages * page_size), source, target;
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), engine);
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int64_t i = 0; i < count; ++i) {  // within the lane anything may be a source
      source.push_back(chance(0.1) ? -1 - below(9) : slots[lane * count + below(count)]);
      target.push_back(chance(0.1) ? INT64_MIN + below(9) : slots[lane * count + i]);
    }
  KvMoveArgs args{on_cpu.get(), size,  layers, layer_stride,  kv_stride,
                  layout,       lanes, count,  source.data(), target.data()};
  cpu::kv_move(args, serial);
  for (auto* list : {&source, &target})  // on a device nobody has looked
    for (auto& slot : *list)
      if (slot < 0 && chance(0.5))
        slot = one_of<int64_t>({pages * page_size, INT64_MAX, 1LL << 32});
  args.kv_cache = on_cuda.get();
  launched(cuda::kv_move(args, nullptr));
  REQUIRE(std::memcmp(on_cuda.get(), on_cpu.get(), bytes) == 0, "kv_cache differs");
}

void block_attention_case() {
  const DType dtype = one_of({DType::float32, DType::bfloat16, DType::float16});
  // Splits that no cluster can merge; or tiles so many that they are large, and not split.
  const bool longer = chance(0.03), wider = !longer && chance(0.03);
  const int64_t dim =
      longer || wider ? one_of({16, 64}) : one_of({2, 5, 32, 64, 64, 80, 96, 128, 128, 256, 300});
  const int64_t heads = 1 + below(2), group = wider ? 8 : one_of({1, 2, 3, 8});
  const int64_t segments = 1 + below(3), page_size = one_of({1, 7, 16, 64, 200});
  const int64_t longest =  // one split, or several
      longer ? 7000 + below(3000) : 1 + below(wider ? 200 : one_of({40, 200, 1500}));
  const int64_t width = (longest + page_size - 1) / page_size, pages = segments * width + 1;
  const CacheLayout layout = random_layout(pages, page_size, heads, dim);
  const CacheLayout v_layout = random_layout(pages, page_size, heads, dim);
  Numbers keys(dtype, pages * page_size * heads * dim), values(dtype, keys.count);
  std::vector<int64_t> order(pages), begin, end, length;
  for (int64_t i = 0; i < pages; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), engine);
  order.resize(segments * width);
  std::vector<bool> seen(pages * page_size);
  int64_t rows = 0, most = 0;
  const int64_t kind = below(3);  // all slots, causal, or by ancestors
  for (int64_t s = 0; s < segments; ++s) {
    rows += below(3);
    begin.push_back(rows);
    rows += wider && s == 0 ? 100 + below(200) : chance(0.1) ? 8 + below(40) : below(6);
    end.push_back(rows);
    most = std::max(most, end[s] - begin[s]);
    length.push_back(chance(0.1) ? 0 : longer ? longest : 1 + below(longest));
    if (kind != 0 && end[s] - begin[s] > length[s]) rows = end[s] = begin[s] + length[s];
    for (int64_t j = 0; j < length[s]; ++j)
      seen[order[s * width + j / page_size] * page_size + j % page_size] = true;
  }
  for (int64_t slot = 0; slot < pages * page_size; ++slot)
    for (int64_t h = 0; !seen[slot] && h < heads; ++h)  // what none may see
      for (int64_t d = 0; d < dim; ++d) {
        keys.set(layout.offset(slot / page_size, slot % page_size, h) + d, NAN);
        values.set(v_layout.offset(slot / page_size, slot % page_size, h) + d, NAN);
      }
  const int64_t stride = group * heads * dim + one_of({0, 0, 8, 3});
  Numbers q(dtype, rows * stride), out(dtype, rows * group * heads * dim);
  Numbers out2(out);
  for (int64_t s = 0; kind != 0 && s < segments; ++s) {  // what only some of a segment's rows see
    if (begin[s] == end[s] || !chance(0.3)) continue;
    const int64_t j = length[s] - 1 - below(end[s] - begin[s]);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t page = order[s * width + j / page_size];
        keys.set(layout.offset(page, j % page_size, h) + d, NAN);
        values.set(v_layout.offset(page, j % page_size, h) + d, NAN);
      }
  }
  const int64_t words = (most + 63) / 64 + below(2);
  std::vector<int64_t> ancestors(rows * words);
  for (auto& word : ancestors)
    word = static_cast<int64_t>(engine() & (chance(0.5) ? ~uint64_t{0} : engine()));
  BlockAttentionArgs args{dtype,
                          q.memory.get(),
                          stride,
                          rows,
                          group * heads,
                          keys.memory.get(),
                          values.memory.get(),
                          layout,
                          v_layout,
                          segments,
                          begin.data(),
                          end.data(),
                          length.data(),
                          order.data(),
                          width,
                          most + below(3),
                          longest,
                          static_cast<float>(uniform(0.05, dtype == DType::float32 ? 0.5 : 4)),
                          out.memory.get(),
                          kind == 1,
                          kind == 2 ? ancestors.data() : nullptr,
                          words};
  cpu::block_attention(args, serial);
  cuda_host::clusters(chance(0.7));  // a device has them or not; sums are of other orders
  const auto launch = [&args](Numbers& to) {
    std::memset(to.memory.get(), 0xff, to.bytes());
    const int64_t bytes = cuda::block_attention_scratch(args), enough = 1 << 14;  // as the kernels'
    BlockAttentionArgs one = args;
    one.segments = 1;
    REQUIRE(bytes <= std::max(enough, cuda::block_attention_scratch(one)),
            "scratch of %lld bytes for several segments", (long long)bytes);
    Memory memory(bytes, 0);
    args.out = to.memory.get();
    launched(cuda::block_attention(args, memory.workspace(), nullptr));
  };
  launch(out2);
  near(out2, out, "out");
  if (chance(0.1)) {  // wrong bounds are no fault of the memory's, nor of the next launch
    const BlockAttentionArgs right = args;
    args.max_q_len = below(most + 1);
    args.max_kv_len = below(longest);
    launch(out);
    args = right;
  }
  args.segments = 1;  // each segment alone, to the bit
  const int64_t row = out.bytes() / std::max<int64_t>(1, rows);
  for (int64_t s = 0; s < segments; ++s) {
    args.q_start = &begin[s];
    args.q_end = &end[s];
    args.kv_lens = &length[s];
    args.block_table = &order[s * width];
    args.max_q_len = end[s] - begin[s] + below(3);
    args.max_kv_len = length[s] + below(300);
    launch(out);
    const auto of = [&](const Numbers& numbers) {
      return reinterpret_cast<const char*>(numbers.memory.get()) + begin[s] * row;
    };
    REQUIRE(std::memcmp(of(out), of(out2), (end[s] - begin[s]) * row) == 0,
            "a segment alone is not what it is among others");
  }
  cuda_host::clusters(true);
}

}  // namespace cases
