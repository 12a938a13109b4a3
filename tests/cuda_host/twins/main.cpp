// Every CUDA kernel, executed by cuda_host, against its CPU twin on random cases, in memory of
// exact size. Usage: twins SEED CASES [OP]. Exits 1 at the first difference, after naming it.
#include "twins.h"

using namespace twins;

int main(int argc, char** argv) {
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10);
  const int cases = std::atoi(argv[2]);
  for (int i = 0; i < cases; ++i) {
    engine.seed(seed * 1000003 + static_cast<uint64_t>(i));
    cuda_host::seed(engine());
    const int64_t op = argc > 3 ? std::atoi(argv[3]) : i % 10;
    const char* const names[] = {
        "row_stats",  "select",          "unmask",   "certainty_forcing_loss",
        "kv_write",   "block_attention", "rms_norm", "swiglu",
        "fp8_linear", "commit"};
    now = std::string(names[op]) + " of seed " + argv[1] + ", case " + std::to_string(i);
    if (op == 0) row_stats_case();
    else if (op == 1) select_case();
    else if (op == 2) unmask_case();
    else if (op == 3) loss_case();
    else if (op == 4) kv_write_case();
    else if (op == 5) block_attention_case();
    else if (op == 6) rms_norm_case();
    else if (op == 7) swiglu_case();
    else if (op == 8) fp8_linear_case();
    else commit_case();
  }
  std::printf("%d cases, no difference\n", cases);
  return 0;
}
