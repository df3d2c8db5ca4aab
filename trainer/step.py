"""The train step and the evaluation step: pure functions that the loop jits once.

One step: microbatches (each a forward, a chunked loss and a backward), the global norm, a health
check, the update on fsdp shards. A step whose loss or gradient is not finite changes nothing but
the count of skipped steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from models.attention.sequence import in_order, plan_for
from models.decoder import forward, head_VD, param_specs
from models.loss import LossOptions, cross_entropy, loss_weights
from models.spec import Tree
from sharding.rules import BATCH, SEQ
from trainer.config import Experiment
from trainer.optimizers import clip_scale, make_optimizer
from trainer.plan.recipe import Choice, choose
from trainer.schedules import learning_rate
from trainer.state import Layout, TrainState

Batch = dict[str, jax.Array]


def loss_sums(params: Tree, batch: Batch, experiment: Experiment) -> tuple[jax.Array, jax.Array]:
    """Returns (objective, nll) summed over the real tokens of a batch, in nats."""
    batch = in_order(batch, plan_for(experiment.model, batch["tokens"].shape[1]))
    rows = (batch["tokens"], batch["positions"], batch["segment_ids"])
    x_BTD, _ = forward(params, *rows, experiment.model, prefix_BT=batch.get("prefix"))
    weights_BT = loss_weights(batch["targets"], batch["segment_ids"])
    options = LossOptions.of(experiment.model, experiment.train.z_loss)
    return cross_entropy(x_BTD, head_VD(params), batch["targets"], weights_BT, options)


def real_tokens(batch: Batch) -> jax.Array:
    """Returns the number of tokens that carry loss, over all devices."""
    return jnp.sum(loss_weights(batch["targets"], batch["segment_ids"]))


def _gradients(params: Tree, batch: Batch, experiment: Experiment, layout: Layout):
    """Returns (gradients, nll) of the mean objective over the batch, microbatch by microbatch."""
    tokens = jnp.maximum(real_tokens(batch), 1.0)

    def objective(params, micro):
        total, nll = loss_sums(params, micro, experiment)
        return total / tokens, nll / tokens

    def one(micro):
        (_, nll), gradients = jax.value_and_grad(objective, has_aux=True)(params, micro)
        return jax.tree.map(reshard, gradients, layout.gradients), nll

    count = experiment.train.accumulation
    if count == 1:
        return one(batch)

    def body(total, micro):
        return jax.tree.map(jnp.add, total, one(micro)), None

    start = jax.tree.map(
        lambda p, s: jnp.zeros(p.shape, jnp.float32, out_sharding=s), params, layout.gradients
    )
    return jax.lax.scan(body, (start, jnp.zeros(())), _microbatches(batch, count))[0]


def _microbatches(batch: Batch, count: int) -> Batch:
    """Returns the batch with a leading axis of `count` microbatches.

    Row b goes to microbatch b % count, so that no row changes device.
    """

    def split(a_BT):
        rows = a_BT.reshape(-1, count, a_BT.shape[1], out_sharding=P(BATCH, None, SEQ))
        return jnp.swapaxes(rows, 0, 1)

    return jax.tree.map(split, batch)


def make_train_step(
    experiment: Experiment, layout: Layout
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the step, to be jitted with its first argument donated.

    Metrics: loss (nats per token, without z-loss), grad_norm (before clipping), learning_rate,
    tokens (real ones in this batch) and skipped (updates left out so far). `limits`, if given, are
    the largest loss and gradient norm with which an update is not left out.
    """
    tx = make_optimizer(experiment.optimizer, param_specs(experiment.model))

    def train_step(state: TrainState, batch: Batch, limits: jax.Array | None = None):
        gradients, loss = _gradients(state.params, batch, experiment, layout)
        grad_norm = optax.tree.norm(gradients)
        rate = learning_rate(experiment.optimizer, experiment.train.steps, state.step)
        healthy = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if limits is not None:
            healthy &= (loss <= limits[0]) & (grad_norm <= limits[1])

        scale = clip_scale(grad_norm, experiment.optimizer.clip_norm)
        shards = jax.tree.map(lambda g, s: scale * reshard(g, s), gradients, layout.shards)
        params = jax.tree.map(reshard, state.params, layout.shards)
        direction, opt_state = tx.update(shards, state.opt_state, params)

        def keep(new, old):
            return jnp.where(healthy, new, old)

        params = jax.tree.map(lambda p, d: keep(p - rate * d, p), params, direction)
        new_state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + (~healthy).astype(jnp.int32),
            params=jax.tree.map(reshard, params, layout.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "tokens": real_tokens(batch),
            "skipped": new_state.skipped,
        }
        return new_state, metrics

    return train_step


def jit_train_step(experiment: Experiment, layout: Layout) -> tuple[Callable, Choice]:
    """Returns the step as it runs on the layout's mesh, jitted, and what was chosen for its chips.

    The planner compiles the very same.
    """
    mesh = layout.mesh
    choice = choose(experiment, mesh.devices.flat[0], dict(mesh.shape))
    step = make_train_step(choice.experiment, layout)
    return jax.jit(step, donate_argnums=0, compiler_options=choice.options or None), choice


def make_eval_step(experiment: Experiment) -> Callable[[Tree, Batch], dict[str, jax.Array]]:
    """Returns the function from (params, batch) to {"nll", "tokens"}, sums over real tokens.

    It takes as many rows at a time as training does: what fits by microbatches there fits here.
    """
    count = experiment.train.accumulation

    def eval_step(params: Tree, batch: Batch):
        if count == 1:
            _, nll = loss_sums(params, batch, experiment)
        else:

            def body(total, micro):
                return total + loss_sums(params, micro, experiment)[1], None

            nll, _ = jax.lax.scan(body, jnp.zeros(()), _microbatches(batch, count))
        return {"nll": nll, "tokens": real_tokens(batch)}

    return eval_step
