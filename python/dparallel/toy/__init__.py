"""Word problems whose answers can be checked, the models that ship (trained on them), and a demo."""
