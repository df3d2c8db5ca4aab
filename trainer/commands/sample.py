"""`torus sample`: continues texts with the parameters of a run's checkpoint."""

import argparse

from sharding.errors import UsageError
from trainer.commands.parser import CommandParser

USAGE = """\
usage: torus sample RUN [--prompt TEXT ...] [--max-tokens N] [--temperature T] [--top-k K]
                        [--top-p P] [--greedy] [--seed S] [--step N]

Continues each TEXT with a checkpoint of RUN (the newest complete one by default) and prints the
text with its continuation. Without --prompt it starts a document of its own.

  --max-tokens N     longest continuation (200)
  --temperature T    below 1 plays safe, above 1 dares more (0.8); 0 is --greedy
  --top-k K          draw from the K likeliest tokens only; 0 = all (0)
  --top-p P          draw from the fewest tokens that hold P of the probability (1.0)
  --seed S           the same seed gives the same text; the i-th prompt draws with S + i (0)

  torus sample runs/a --prompt "def main("
  torus sample runs/a --prompt "The " --prompt "A " --temperature 0.5 --seed 7
"""


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("sample")
    parser.add_argument("run")
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int)
    args = parser.parse(argv)
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: at least 0")
    return args


def main(argv: list[str]) -> int:
    """Prints the texts; raises UsageError for a run, step, prompt or value that cannot be used."""
    from checkpoint.steps import pick_step
    from trainer.data.dataset import run_tokenizer
    from trainer.run import CHECKPOINTS, read_experiment

    args = _arguments(argv)
    experiment = read_experiment(args.run)
    step = pick_step(f"{args.run}/{CHECKPOINTS}", args.step)
    tokenizer = run_tokenizer(args.run, experiment.data)
    prompts = [[tokenizer.spec.bos, *tokenizer.encode(text)] for text in args.prompt or [""]]
    if (largest := max(map(max, prompts))) >= experiment.model.vocab:
        raise UsageError(
            f"the prompt holds token {largest}, the model's vocabulary has {experiment.model.vocab}"
        )

    import jax
    import numpy as np

    from models.decode import Sampling, check_length, make_generate, pad_prompts
    from trainer.restore import restore_params

    sampling = Sampling(
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k, top_p=args.top_p, stop=(tokenizer.spec.eos,),
    )  # fmt: skip
    generate = make_generate(experiment.model, args.max_tokens, sampling)
    check_length(experiment.model, max(map(len, prompts)), args.max_tokens)
    experiment.mesh.seq = 1  # one new token at a time cannot be split
    params, mesh = restore_params(args.run, experiment, step)
    tokens_BT, real_BT = pad_prompts(prompts, mesh.shape["data"] * mesh.shape["fsdp"])
    seeds_B = ((args.seed + np.arange(len(tokens_BT))) % 2**32).astype(np.uint32)
    with jax.set_mesh(mesh):
        tokens_BM, lengths_B = jax.device_get(
            jax.jit(generate)(params, tokens_BT, real_BT, seeds_B)
        )
    for i, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"--- {i + 1} of {len(prompts)}")
        print(tokenizer.decode([*prompt, *tokens_BM[i, : lengths_B[i]]]))
    return 0
