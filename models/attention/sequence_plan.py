"""How attention is spread over the `seq` mesh axis: the strategies, their choice, the column order.

A plan is a pure function of sizes and of the chip, so that the config check, the train step and the
layers each ask for it and get the same one. The moving of data is `sequence.py`. Imports no JAX.

Every strategy is heads exchanged among `head_devices` neighbours (Ulysses, arXiv:2309.14509) times
a ring of what is left (arXiv:2310.01889): all exchange and no ring is `ulysses`, the reverse is
`ring`, both are `hybrid` (arXiv:2405.07719). `bidirectional` sends half of the keys each way round;
`gather` collects all keys instead of passing them on.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from models.config import SEQ_STRATEGIES, ModelConfig
from sharding.errors import UsageError
from sharding.hardware import Chip

# Share of the chip's peak that the estimates credit attention with: splash forward on v5e reaches
# 0.61 by the compiler's static schedule.
EFFICIENCY = 0.6
# Bytes through memory for each number of a layer's queries and each block of keys that it meets:
# partial results and their gradients are read, summed in float32 and written. From the programs of
# small models compiled for TPUs (docs/benchmarks.md, "The search").
MERGED = 45
# `auto` takes the simplest strategy among those that cost about as little as the best.
_SIMPLEST_FIRST = ("ulysses", "gather", "ring", "bidirectional", "hybrid")


@dataclass(frozen=True)
class Sizes:
    """What the choice depends on; heads are those of one device of the tensor axis."""

    devices: int  # of the seq axis
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    item_bytes: int  # of the compute dtype
    window: int  # 0 when some layer sees everything
    chip: Chip | None  # None: not in the table, as CPU

    @classmethod
    def of(cls, config: ModelConfig, mesh: dict[str, int], length: int, chip: Chip | None):
        """Sizes of `config` on mesh axes `mesh` for rows of `length` columns."""
        tensor = mesh["tensor"]
        return cls(
            devices=mesh["seq"],
            length=length,
            heads=config.heads // tensor,
            kv_heads=max(1, config.kv_heads // tensor),
            head_dim=config.head_dim,
            item_bytes=2 if config.dtype == "bfloat16" else 4,
            window=0 if "global" in config.pattern else config.window,
            chip=chip,
        )


@dataclass(frozen=True)
class SequencePlan:
    """One way to spread rows of `length` columns over the `devices` of the seq axis."""

    strategy: str
    order: str
    devices: int
    head_devices: int
    length: int
    reason: str = field(default="", compare=False)

    @property
    def ring(self) -> int:
        """Stations of the ring: groups of `head_devices` neighbours."""
        return self.devices // self.head_devices

    @property
    def streams(self) -> int:
        """Directions in which keys travel."""
        return 2 if self.strategy == "bidirectional" else 1

    @property
    def parts(self) -> int:
        """Stretches of neighbouring columns that a station holds."""
        return 2 if self.order == "zigzag" else 1

    def hops(self, window: int | None) -> int:
        """Blocks of keys that a station must see, its own included.

        In contiguous order a window reaches back over a known number of stations.
        """
        if window is None or self.order != "contiguous" or self.streams > 1:
            return self.ring
        return min(self.ring, (window - 2) // (self.length // self.ring) + 2)

    def columns(self) -> np.ndarray:
        """Returns the column of the row that each place holds: a permutation, int32 (length,).

        contiguous: station i has the i-th stretch; under a causal mask the last one works most.
        zigzag: stretches i and 2n-1-i of 2n, the same work everywhere (Llama 3, arXiv:2407.21783).
        striped: columns i, i + n, i + 2n, ... (arXiv:2311.09431), even for short packed documents.
        """
        columns = np.arange(self.length, dtype=np.int32)
        if self.order == "zigzag":
            halves = columns.reshape(2 * self.ring, -1)
            return np.concatenate([halves[: self.ring], halves[: self.ring - 1 : -1]], 1).ravel()
        if self.order == "striped":
            return columns.reshape(-1, self.ring).T.ravel()
        return columns


def sequence_plan(config: ModelConfig, sizes: Sizes) -> SequencePlan:
    """Returns the plan that `config` asks for, or under `auto` the one that costs least.

    Raises:
      UsageError: the strategy or the order asked for cannot be done with these sizes.
    """
    strategy, order = config.seq_strategy, config.seq_order
    if sizes.devices == 1:
        return SequencePlan("gather", "contiguous", 1, 1, sizes.length)
    names = _SIMPLEST_FIRST if strategy == "auto" else (strategy,)
    tried = [_candidate(name, order, config.seq_head_devices, sizes) for name in names]
    plans = [plan for plan, refusal in tried if not refusal]
    if not plans:
        raise UsageError("; ".join(refusal for _, refusal in tried))
    if strategy != "auto":
        return replace(plans[0], reason="asked for")
    if sizes.chip is None:
        plan = next((p for p in plans if p.strategy == "gather"), plans[0])
        return replace(plan, reason="auto, on links whose speed is not known")
    costs = {plan: estimate(plan, sizes) for plan in plans}
    fitting = [p for p in plans if p.strategy != "gather" or _fits(sizes)] or plans
    attention = 3.5 * _compute(sizes)  # backward 2.5 times the forward
    limit = min(costs[p] for p in fitting) + 0.05 * attention
    listed = ", ".join(f"{p.strategy} {1e3 * s:.3g}" for p, s in costs.items())
    reason = (
        f"auto, by estimated ms that a layer and row lose to links and sums of blocks: {listed}; "
        f"attention itself takes {1e3 * attention:.3g} ({sizes.chip.name}, {sizes.heads} heads, "
        f"{sizes.kv_heads} KV heads, length {sizes.length})"
    )
    return replace(next(p for p in fitting if costs[p] <= limit), reason=reason)


def _candidate(
    strategy: str, order: str, head_devices: int, sizes: Sizes
) -> tuple[SequencePlan, str | None]:
    """Returns the plan of a strategy, and in words why these sizes do not allow it."""
    devices, heads = sizes.devices, sizes.heads
    u = {"ulysses": devices, "hybrid": head_devices}.get(strategy, 1)
    if strategy == "hybrid" and not u:  # as many as need no copies of KV heads
        u = math.gcd(devices, sizes.kv_heads)
        u = u if 1 < u < devices else math.gcd(devices // 2, heads)
    ring = devices // u if devices % u == 0 else 1
    if order == "auto":
        even = sizes.length % (2 * ring * (2 if strategy == "bidirectional" else 1)) == 0
        balanced = strategy != "ulysses" and not sizes.window and even
        order = "zigzag" if balanced else "contiguous"
    plan = SequencePlan(strategy, order, devices, u, sizes.length)
    stretches = math.lcm(plan.parts * plan.streams * ring, devices)
    refusal = None
    if strategy == "hybrid" and (devices % u or not 1 < u < devices):
        refusal = (
            f"exchanges heads among seq_head_devices = {u} of seq = {devices}, which must divide "
            f"it and be neither 1 nor all of it"
        )
    elif heads % u:
        refusal = (
            f"exchanges heads among {u} devices, which do not divide the {heads} query heads of a "
            f"device of the tensor axis"
        )
    elif strategy == "ulysses" and order != "contiguous":
        refusal = f"gives every device whole rows: leave seq_order auto, not {order!r}"
    elif sizes.length % stretches:
        refusal = (
            f"in {order} order cuts rows into {stretches} stretches, which do not divide their "
            f"length {sizes.length}"
        )
    if refusal:
        others = ", ".join(s for s in SEQ_STRATEGIES if s not in ("auto", strategy))
        refusal = f"config.model.seq_strategy = {strategy!r} {refusal}; other strategies: {others}"
    return plan, refusal


# ---------------------------------------------------------------- what a strategy costs


def _compute(sizes: Sizes) -> float:
    """Seconds of one layer's attention over one row, forward, spread evenly."""
    reach = min(sizes.window or sizes.length, sizes.length / 2)
    pairs = sizes.length / sizes.devices * reach
    return 4 * sizes.heads * sizes.head_dim * pairs / (EFFICIENCY * sizes.chip.flops_bf16)


def _fits(sizes: Sizes) -> bool:
    """Whether all keys and values of a row, and their float32 gradients, take an eighth of HBM."""
    token = 2 * sizes.kv_heads * sizes.head_dim * (sizes.item_bytes + 4)
    return sizes.length * token <= sizes.chip.hbm_bytes / 8


def estimate(plan: SequencePlan, sizes: Sizes, *, again: bool = False) -> float:
    """Returns the seconds that spreading costs one layer and row, both passes.

    Links are those of one torus axis, half of their rate each way, or of a switch. Exchanges and
    gathers are exposed whole; a ring exposes what of a hop outlasts the hop's arithmetic, and sums
    what each block of keys gives.

    again: the forward pass is made again for the gradient.
    """
    chip, u, ring = sizes.chip, plan.head_devices, plan.ring
    switch = chip.torus_axes == 0
    rows = sizes.length // plan.devices
    head = rows * sizes.head_dim * sizes.item_bytes
    copies = u // math.gcd(sizes.kv_heads, u)
    seconds = 0.0
    if u > 1:  # q, k, v there and the output back, to u - 1 neighbours, u / 4 links away on a ring
        sent = head * 2 * (sizes.heads + sizes.kv_heads * copies) * (u - 1) / u
        away = 1 if switch else max(1, u / (4 if u == plan.devices else 2))
        passes = 2.75 + again / 4  # backward: q, k, v once more, and four gradients
        seconds += passes * sent * away / chip.ici_bandwidth
    if ring == 1:
        return seconds
    block, passes = 2 * head * sizes.kv_heads * copies, 4 + again  # gradients travel in float32
    hops = plan.hops(sizes.window or None)
    blocks = hops * plan.parts * plan.streams
    seconds += blocks * MERGED * rows * sizes.heads * sizes.head_dim / chip.hbm_bandwidth
    if plan.strategy == "gather":
        return seconds + passes * (ring - 1) * block / chip.ici_bandwidth
    both_ways = switch or plan.streams == 2
    hop = block / (chip.ici_bandwidth if both_ways else chip.ici_bandwidth / 2)
    return seconds + passes * (hops - 1) * max(0.0, hop - _compute(sizes) / hops)
