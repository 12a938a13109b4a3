// Every CUDA kernel, executed by cuda_host, against its CPU kernel on random cases, in memory of
// exact size. Usage: cases [--races] [--no-barriers] [--failing] SEED CASES [OP]. Exits 1 at the
// first difference, after naming it; --no-barriers is a planted fault, and with --failing launches
// fail, all from one of the first three of a case on.
#include "cases.h"

using namespace cases;

struct {
  const char* name;
  void (*run)();
} const cases_of[] = {{"row_stats", row_stats_case},
                      {"select", select_case},
                      {"unmask", unmask_case},
                      {"certainty_forcing_loss", loss_case},
                      {"kv_write", kv_write_case},
                      {"block_attention", block_attention_case},
                      {"rms_norm", rms_norm_case},
                      {"swiglu", swiglu_case},
                      {"linear", linear_case},
                      {"fp8_linear", fp8_linear_case},
                      {"linear_swiglu", linear_swiglu_case},
                      {"linear_kv_write", linear_kv_write_case},
                      {"commit", commit_case},
                      {"kv_move", kv_move_case},
                      {"row_topk", row_topk_case},
                      {"accept", accept_case},
                      {"distillation_loss", distillation_case},
                      {"keep_error", keep_error_case},
                      {"class_stats", class_stats_case},
                      {"best_path", best_path_case}};
constexpr int kOps = sizeof cases_of / sizeof cases_of[0];

int main(int argc, char** argv) {
  bool failing = false;
  for (; argv[1][0] == '-'; ++argv, --argc) {
    if (std::string(argv[1]) == "--races") cuda_host::looks_for_races = true;
    else if (std::string(argv[1]) == "--failing") failing = true;
    else cuda_host::barriers(false);
  }
  cuda_host::watches_early = true;
  int failed = 0;
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10);
  const int cases = std::atoi(argv[2]);
  for (int i = 0; i < cases; ++i) {
    engine.seed(seed * 1000003 + static_cast<uint64_t>(i));
    cuda_host::seed(engine());
    const auto& op = cases_of[argc > 3 ? std::atoi(argv[3]) : i % kOps];
    now = std::string(op.name) + " of seed " + argv[1] + ", case " + std::to_string(i);
    cuda_host::constant(nullptr, 0);
    if (failing) cuda_host::fail_launches(static_cast<int>(below(3)));
    try {
      op.run();
    } catch (LaunchFailed) {
      ++failed;
      cuda_host::clusters(true);
    }
  }
  if (failing) std::printf("%d cases, of which %d failed\n", cases, failed);
  else std::printf("%d cases, no difference\n", cases);
  return 0;
}
