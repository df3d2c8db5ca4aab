"""Drives: experiments, the training loop and step, optimizers, data, metrics and the commands.

The top floor but for configs: imports everything below, nothing below imports it.
"""
