"""Times a train step of the same model in PyTorch: transformers' Llama, AdamW, gradient clipping.

`python pytorch_step.py '{"size": {...}, "dtype": "bfloat16", "compiled": true, "steps": 8}'` prints
one JSON line with the wall and processor seconds of every step. bfloat16 is autocast over float32
parameters; AdamW is the fused one, attention is scaled_dot_product_attention (its fastest forms).
"""

import json
import sys
import time

WARM_UP = 2


def make_step(job: dict):
    """Returns a function that does one step and returns its loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = job["size"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size["vocab"],
            hidden_size=size["width"],
            intermediate_size=size["mlp"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["heads"],
            head_dim=size["head_dim"],
            max_position_embeddings=size["seq"],
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if job["compiled"] else model
    tokens = torch.randint(0, size["vocab"], (size["batch"], size["seq"]))

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def matmul_rate(size: dict, dtype: str) -> float:
    """Returns PyTorch's best FLOP/s on the MLP's product."""
    import torch

    x = torch.ones(size["batch"] * size["seq"], size["width"], dtype=getattr(torch, dtype))
    w = torch.ones(size["width"], size["mlp"], dtype=x.dtype)
    x @ w
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        x @ w
        best = min(best, time.perf_counter() - begin)
    return 2 * x.numel() * size["mlp"] / best


def main() -> None:
    job = json.loads(sys.argv[1])
    step = make_step(job)
    seconds, processor = [], []
    for _ in range(job["steps"] + WARM_UP):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        seconds.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
    print(
        json.dumps(
            {
                "seconds": seconds[WARM_UP:],
                "processor_seconds": processor[WARM_UP:],
                "loss": loss,
                "matmul_flops": matmul_rate(job["size"], job["dtype"]),
            }
        )
    )


if __name__ == "__main__":
    main()
