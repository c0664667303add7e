"""One GRPO step of TRL on the model of ``alignment_benchmark``: run by it, in an environment that has trl and torch.

Prints one JSON line: seconds of every step after the first.
"""

import argparse
import json
import os
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class StepTimes(TrainerCallback):
    """Wall time between the ends of optimiser steps."""

    def __init__(self):
        self.marks = []

    def on_step_end(self, *_, **__):
        self.marks.append(time.perf_counter())


def tokenizer(vocabulary):
    """One word a token: what a word is does not matter for the time."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, vocabulary)}}
    base = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def main():
    """Trains for a few steps and prints their times."""
    parser = argparse.ArgumentParser()
    for name in ("vocabulary", "width", "layers", "heads", "kv_heads", "ffn", "prompts", "group", "prompt_tokens",
                 "tokens", "steps"):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=options.ffn,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ))  # fmt: skip
    words = tokenizer(options.vocabulary)
    prompts = [
        " ".join(f"w{3 + (97 * i + j) % 1000}" for j in range(options.prompt_tokens)) for i in range(options.prompts)
    ]

    def parity(completions, **_):
        return [float(sum(map(ord, text)) % 2) for text in completions]

    def length(completions, **_):
        return [len(text) / 1000 for text in completions]

    def variety(completions, **_):
        return [len(set(text.split())) / options.tokens for text in completions]

    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=options.prompts * options.group,
            num_generations=options.group, max_completion_length=options.tokens, max_steps=options.steps,
            learning_rate=1e-5, beta=0.0, temperature=1.0, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=[parity, length, variety], args=config, processing_class=words,
            train_dataset=Dataset.from_dict({"prompt": prompts * options.steps}), callbacks=[times],
        )  # fmt: skip
        trainer.train()
    seconds = [after - before for before, after in zip(times.marks, times.marks[1:], strict=False)]
    print(json.dumps({"seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
