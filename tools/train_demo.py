"""Train the small Llama that ships in the package, on the text of ``demo_corpus``.

    python tools/train_demo.py -o build/demo-model            # about an hour on 2 CPU cores
    python tools/build_demo_checkpoint.py build/demo-model    # then: selection, quality, the one-for-all checkpoint

The model is an ordinary Llama of 12 blocks: hidden 256, 8 query heads of 32 over 4 key/value heads, 512 neurons,
a tied vocabulary of 1024 from its own byte-level BPE. Half of the training rows are packed documents between
``<s>`` and ``</s>``; the other half are cut from running text without special tokens, which is how evaluation reads
text. One step in four uses rows of 512 tokens instead of 256, so that the whole context is trained.

Everything is seeded. On one machine with one number of threads a run repeats itself; across processors the last
bits of floating-point sums differ, so the shipped weights are *a* result of this script, not the only one.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import demo_corpus
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
TOKENS_PER_STEP = 8192
CONTEXT = 512


def train_tokenizer(world: demo_corpus.World) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1024 entries learnt from 20,000 training documents; it puts ``<s>`` in front by itself."""
    stream = demo_corpus.documents(world, seed=0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((next(stream) for _ in range(20_000)), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def rows(world: demo_corpus.World, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Batches of token ids [rows, length] without end; see the module's text for the two kinds of row."""
    stream = demo_corpus.documents(world, seed)
    running: list[int] = []
    step = 0

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def packed(length: int) -> list[int]:
        row: list[int] = []
        while len(row) < length:
            row += [0, *encode(next(stream)), 1]
        return row[:length]

    def cut(length: int) -> list[int]:
        nonlocal running
        while len(running) < length:
            running += encode("\n\n" + next(stream))
        row, running = running[:length], running[length:]
        return row

    while True:
        length = CONTEXT if step % 4 == 3 else CONTEXT // 2
        count = TOKENS_PER_STEP // length
        yield torch.tensor([packed(length) if i % 2 else cut(length) for i in range(count)])
        step += 1


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    return [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over 2%, constant to 40%, then a cosine down to nothing."""
    progress = step / steps
    if progress < 0.02:
        return (step + 1) / (0.02 * steps + 1)
    if progress < 0.4:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.4) / 0.6))


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Mean next-token cross-entropy (nats) over rows [n, length]."""
    losses = []
    for batch in ids.split(16):
        logits = model(input_ids=batch).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())


def train(output: Path, steps: int, seed: int) -> None:
    """Train for ``steps`` steps of 8192 tokens and save model and tokenizer as a Hugging Face folder."""
    torch.manual_seed(seed)
    world = demo_corpus.build_world()
    tokenizer = train_tokenizer(world)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    compiled = torch.compile(model, dynamic=False)
    stream = demo_corpus.documents(world, seed=1)
    held = tokenizer.encode("\n\n".join(next(stream) for _ in range(400)), add_special_tokens=False)
    held_rows = torch.tensor(held[: len(held) // 256 * 256]).view(-1, 256)
    chain = optimizers(model)
    base_rates = [group["lr"] for optimizer in chain for group in optimizer.param_groups]
    began = time.time()
    for step, ids in zip(range(steps), rows(world, tokenizer, seed=2 * seed), strict=False):
        groups = [group for optimizer in chain for group in optimizer.param_groups]
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = rate * schedule(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chain:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 49 or step == steps - 1:
            rate = (step + 1) * TOKENS_PER_STEP / (time.time() - began)
            print(
                f"step {step + 1}/{steps} loss {loss.item():.4f} validation {validation_loss(model, held_rows):.4f} "
                f"{rate:.0f} tokens/s",
                flush=True,
            )
        if step % 300 == 299 or step == steps - 1:
            model.save_pretrained(output, max_shard_size="64MB")
            tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.output, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
