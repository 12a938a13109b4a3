"""A student in about five minutes of two cores: answers, certainty forcing, and what it brought.

python examples/train_a_student.py [OUT]

It needs the extra `train`: pip install "dparallel-ext[cli,train]". The whole recipe is recipes/builtin.yaml,
and `make distill` is its study.
"""

import subprocess
import sys
from pathlib import Path

RECIPE = """
model: builtin:teacher
training: {max_steps: STEPS, per_device_train_batch_size: 32, learning_rate: 5.0e-4, warmup_steps: 10,
  entropy_weight: 0.5, temperature: 0.5, block_length: 32, mask_ratio: [0.0, 1.2], logging_steps: 10}
"""


def run(*words: object) -> None:
    print("dparallel", *words, flush=True)
    subprocess.run([sys.executable, "-m", "dparallel", *map(str, words)], check=True)


def main(out: Path = Path("out/student"), problems: int = 1500, steps: int = 100) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(RECIPE.replace("STEPS", str(steps)))
    run("trajectories", out / "answers", "--data", f"builtin:{problems}", "--policy", "entropy_bound:0.1",
        "--gen-length", 64, "--checker", "hashes")  # fmt: skip
    run("distill", out / "recipe.yaml", "--answers", out / "answers", "--out", out / "student")
    # The student is stored in bfloat16, which not every CPU multiplies fast; in float32 the seconds compare.
    run("evaluate", "--model", "builtin:teacher", "--model", out / "student", "--policy", "entropy:0.5",
        "--problems", min(100, problems), "--dtype", "float32")  # fmt: skip


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
