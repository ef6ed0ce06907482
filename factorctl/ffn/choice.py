"""Which execution path a factored FFN takes: decided by sizes, dtype and device, never by what the router chose.

A choice is a ladder of steps: "up to this many tokens, this path". `shipped_steps` is the rule of thumb that comes
with factorctl; `factorctl profile --tune` times the paths on this machine and caches ladders of its own, one per
device, dtype and shape: `ffn.tuned`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from factorctl.config.shape import FactorShape
from factorctl.ffn import tuned as tuned_paths
from factorctl.ffn.paths import PathName, Step, Steps, serves_grouped
from factorctl.processor import multiplies_tiles, processor_name

SLOT_READS = 5.0
"""What a chosen expert's weights cost in `slot`, which copies them, in readings by `masked`; eager, on an H100 in bf16.
From TinyLlama's layer less its dense one, where the factor is 4.5 to 6. UNTIMED: compiled, which copies nothing."""
SLOT_SAVED_BYTES = 8e6
"""What fewer launches save `slot` for one token with one expert, as bytes read in that time: 3.7 us on an H100."""
GROUPED_COST_FLOPS = 250e9
"""On a GPU, the arithmetic of a layer that `grouped` must save to pay for its sort, gathers and launches. A bound: it
was never seen to pay. Up to 16 GFLOP `masked` was ahead (SmolLM2's layer, 4096 tokens). At 212 (TinyLlama's, 1R4E1K)
`grouped` took 0.5 ms more than dense, over which `masked` should take less. UNTIMED: `masked` there, and all beyond."""
LEARNING_GROUPED_FROM_TOKENS = 449
"""The same under autograd. UNTIMED: there `grouped` also keeps K/N of the activations, on which `finetune` counts."""
LOOP_CALL_BYTES = 1 << 20
"""What an expert costs `loop` on a CPU besides its weights, as bytes read in that time."""
GROUPED_ROWS = 32
"""On a CPU in 32 bits, the rows per expert up to which `grouped` leaves cores idle: MKL gives so few to one of them."""
EXPERT_CALL_FLOPS = {8: 6e6, 4: 6e6, 2: 60e6}
"""What an expert costs on a CPU besides its products, as arithmetic done in that time, by bytes per weight. In 16 bits
oneDNN looks up a primitive for each shape."""
FEW_ROWS_SLOWDOWN = {8: 1.6, 4: 1.6, 2: 1.0}
"""How much longer an expert's few rows take for the same arithmetic; between what one core and two took."""
KERNEL_ROWS, KERNEL_ROWS_OF_ALL = {4: 2048, 2: 1024}, {4: 8192, 2: 512}
"""Tokens per expert up to which our kernel was seen ahead of torch's products, and tokens up to which it was ahead of
one dense product, by bytes per weight: of MKL's in 32 bits (no more were measured), of oneDNN's in 16."""
KERNEL_ROWS_BESIDE_AMX = 16
"""The same in 16 bits on a processor that multiplies tiles of bfloat16, which the kernel does not (an estimate)."""


@dataclass(frozen=True)
class Site:
    """Everything that a choice may depend on."""

    device: str
    """As `device_name` gives it."""
    dtype: torch.dtype
    hidden_size: int
    shape: FactorShape
    cuda: bool = False
    can_group: bool = False
    """Whether `grouped` runs at speed here: aligned sizes, and on a GPU bf16 and SM80 or later."""
    kernel: bool = False
    """Whether our CPU kernel serves here: without gradient, with an activation and a dtype that it knows."""
    learns: bool = False
    """Whether a backward pass will follow. Tuned ladders, timed without one, serve either way."""

    @property
    def key(self) -> str:
        """The name of this site in the cache file."""
        shape = self.shape
        sizes = f"D{self.hidden_size} N{shape.num_experts} H{shape.expert_size} S{shape.shared_size} K{shape.top_k}"
        runtime = " | kernel" if self.kernel else ""
        return f"{self.device} | {str(self.dtype).removeprefix('torch.')} | {sizes}{runtime}"


@functools.lru_cache(maxsize=8)
def device_name(device: torch.device, threads: int) -> str:
    """The GPU's name, or the processor's with its number of threads: what timings depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def site_of(
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    shape: FactorShape,
    *,
    kernel: bool = False,
    learns: bool = False,
) -> Site:
    """Look up the machine's side of a choice; whether the kernel serves and gradients are asked for is the layer's."""
    cuda = device.type == "cuda"
    groups = serves_grouped(dtype, hidden_size, shape.expert_size, shape.shared_size)
    fast = not cuda or (dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0))
    name = device_name(device, torch.get_num_threads())
    return Site(name, dtype, hidden_size, shape, cuda, groups and fast, kernel, learns)


def path_at(steps: Steps, tokens: int) -> PathName:
    """The path of the first step that reaches `tokens`."""
    for limit, path in steps:
        if limit is None or tokens <= limit:
            return path
    raise AssertionError(f"the last step of {steps} must have no limit")


def shipped_steps(site: Site) -> Steps:
    """The ladder that comes with factorctl; docs/profile.md has the measurements behind it."""
    if site.cuda:
        return _gpu_steps(site)
    return _kernel_steps(site) if site.kernel else _cpu_steps(site)


def _kernel_steps(site: Site) -> Steps:
    """The kernel while it is ahead of GEMM libraries, which many rows per expert suit better."""
    limit = kernel_tokens(site.dtype, share=site.shape.top_k / site.shape.num_experts)
    return ((limit, "kernel"), *(step for step in _cpu_steps(site) if step[0] is None or step[0] > limit))


def kernel_tokens(dtype: torch.dtype, *, share: float | None = None) -> int:
    """Up to how many tokens our kernel serves where each uses this share of the experts, K/N.

    Args:
        share: None where every neuron runs for every token.
    """
    rows = (KERNEL_ROWS_OF_ALL if share is None else KERNEL_ROWS)[dtype.itemsize]
    if dtype.itemsize == 2 and multiplies_tiles():
        rows = min(rows, KERNEL_ROWS_BESIDE_AMX)
    return int(rows / (share or 1.0))


def _gpu_steps(site: Site) -> Steps:
    """`slot` while copying the chosen experts costs less than reading all, then `masked`, then `grouped` once it saves
    arithmetic enough.
    """
    slot: Step = (_slot_tokens(site), "slot")
    if not site.can_group:
        return _climbing(slot, (None, "masked"))
    return _climbing(slot, (_before_grouped_on_gpu(site), "masked"), (None, "grouped"))


def _cpu_steps(site: Site) -> Steps:
    """`loop` while it reads less than `masked`, then that, until experts of their own save more arithmetic than their
    calls cost: `loop` while their rows are few, then `grouped`. Where a layer learns, `loop` would build N gradients.
    """
    loop: Step = (0 if site.learns else _loop_tokens(site), "loop")
    if not site.can_group:
        return _climbing(loop, (None, "masked"))
    rows = 0 if site.learns or site.dtype.itemsize == 2 else _tokens_of_full_rows(site)
    return _climbing(loop, (_last_masked_on_cpu(site), "masked"), (rows, "loop"), (None, "grouped"))


def _climbing(*steps: Step) -> Steps:
    """The steps that reach further than those before them."""
    ladder: list[Step] = []
    reached = 0
    for limit, path in steps:
        if limit is None or limit > reached:
            if ladder and ladder[-1][1] == path:
                ladder.pop()
            ladder.append((limit, path))
            reached = limit or 0
    return tuple(ladder)


def _slot_tokens(site: Site) -> int:
    """Up to how many tokens `slot` pays; 0 where for none."""
    num_experts, top_k = site.shape.num_experts, site.shape.top_k
    tokens = math.ceil(num_experts / (SLOT_READS * top_k)) - 1
    launches_pay = top_k == 1 and (SLOT_READS - num_experts) * _expert_bytes(site) < SLOT_SAVED_BYTES
    return max(tokens, 1 if launches_pay else 0)


def _before_grouped_on_gpu(site: Site) -> int:
    """The last token count at which `grouped` saves less than it costs."""
    if site.learns:
        return LEARNING_GROUPED_FROM_TOKENS - 1
    saved = 6 * site.hidden_size * (site.shape.num_experts - site.shape.top_k) * site.shape.expert_size
    return int(GROUPED_COST_FLOPS / saved)


def _loop_tokens(site: Site) -> int:
    """Up to how many tokens, which choose at random, `loop` pays; 0 where for none."""
    pays_until_hit = _expert_bytes(site) / (_expert_bytes(site) + LOOP_CALL_BYTES)
    unchosen = 1 - site.shape.top_k / site.shape.num_experts
    return math.ceil(math.log(1 - pays_until_hit, unchosen)) - 1


def _last_masked_on_cpu(site: Site) -> int:
    """The last token count at which experts of their own save less than they cost."""
    size = site.dtype.itemsize
    saved_share = 1 - FEW_ROWS_SLOWDOWN[size] * site.shape.top_k / site.shape.num_experts
    expert_flops = 6 * site.hidden_size * site.shape.expert_size
    tokens = EXPERT_CALL_FLOPS[size] / (saved_share * expert_flops) if saved_share > 0 else math.inf
    return int(tokens if size == 2 else min(tokens, _tokens_of_full_rows(site)))


def _tokens_of_full_rows(site: Site) -> int:
    return GROUPED_ROWS * site.shape.num_experts // site.shape.top_k


def _expert_bytes(site: Site) -> int:
    return 3 * site.shape.expert_size * site.hidden_size * site.dtype.itemsize


@functools.lru_cache(maxsize=512)
def _steps(
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    shape: FactorShape,
    threads: int,
    kernel: bool,
    learns: bool,
    generation: int,
) -> Steps:
    """As `steps_for`; `threads` and `generation` are there to be looked up anew when they change."""
    site = site_of(device, dtype, hidden_size, shape, kernel=kernel, learns=learns)
    return tuned_paths.ladders(tuned_paths.cache_file()).get(site.key) or shipped_steps(site)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def steps_for(
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    sizes: Sequence[int],
    kernel: bool = False,
    learns: bool = False,
) -> Steps:
    """The tuned ladder of this site if there is one, else the shipped one. A constant to torch.compile.

    Args:
        sizes: the fields of a FactorShape, one by one: torch.compile in torch 2.11 takes no dataclass here.
    """
    shape, threads = FactorShape(*sizes), torch.get_num_threads()
    return _steps(device, dtype, hidden_size, shape, threads, kernel, learns, tuned_paths.generation())
