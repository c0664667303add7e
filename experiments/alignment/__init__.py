"""Online alignment of language models to several rewards whose weights may change during training."""
