"""The ops alone: one unmasking step over LLaDA's vocabulary, then the loss that makes it sure.

python examples/kernels.py
"""

import torch

import dparallel_ext as dx

VOCAB, MASK = 126464, 126336


def main(device: str = "cuda" if torch.cuda.is_available() else "cpu") -> None:
    tokens = torch.full((2, 16), MASK, device=device)
    logits = 4 * torch.randn(2, 16, VOCAB, device=device, dtype=torch.bfloat16)

    stats = dx.row_stats(logits, mask_id=MASK)  # what a rule of your own would decide by
    print(f"most certain: {float(stats.confidence.max()):.3f}, entropy {float(stats.entropy.min()):.2f}")

    out = dx.unmask_(tokens, logits, mask_id=MASK, selector="confidence", threshold=0.3)  # one launch
    print("committed of each sequence:", out.committed.tolist(), "left:", int((tokens == MASK).sum()))

    logits = logits.float().requires_grad_()
    labels, active = logits.argmax(-1), torch.ones(2, 16, dtype=torch.bool, device=device)
    loss = dx.certainty_forcing_loss(logits, labels, active).loss
    loss.backward()
    print("loss:", round(loss.item(), 3))


if __name__ == "__main__":
    main()
