// The library of the ops: torch.ops.dparallel. Each op adds itself, by DPARALLEL_OP of backend.h,
// in the file of its family. Only csrc/torch knows torch, through its stable ABI, so that one build
// serves later releases; Python (dparallel_ext/ops) turns user input into the ops' arguments.
#include <torch/csrc/stable/library.h>

// Compiled as one: torch's headers, and the code they bring, cost more than the files.
#include "attention.cpp"
#include "automaton.cpp"
#include "decoding.cpp"
#include "errors.cpp"
#include "layers.cpp"
#include "loss.cpp"

STABLE_TORCH_LIBRARY(dparallel, m) { static_cast<void>(m); }
