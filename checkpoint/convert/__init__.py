"""Moves: checkpoints of other stacks to ours and back, bit for bit, one tensor at a time.

`mapping` is the language of tables, `families` the tables, `fields` their config.json half;
`safetensors` and `huggingface` read and write folders, `native` our steps; `engine` plans and runs.
`pickles` and `torchfiles` are files of torch, `torch_dcp` and `deepspeed` what is made of them,
`pieces` tensors in pieces; `trees`, `orbax_trees` and `msgpack_trees` are what JAX stacks write,
`maxtext` the table of one. `sources` opens any of these, `moves` adds Adam's moments to weights.
"""
