"""The options of `factorctl export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from factorctl.config.common import CHECKPOINT, OVERWRITE, CommonConfig
from factorctl.config.kinds import AUTO_OR_WHOLE, SIZE
from factorctl.config.option import Option

ExportTarget = Literal["hf", "gguf", "dense", "bnb-4bit", "bnb-8bit"]

if TYPE_CHECKING:
    Arch = str
else:
    # Each file there is an architecture. Their names are all that a command line needs, and importing them takes torch.
    _FILES = (Path(__file__).parents[1] / "exporting" / "stock" / "architectures").glob("[a-z]*.py")
    Arch = Literal[("auto", *sorted(path.stem.replace("_", "-") for path in _FILES))]


@dataclass(frozen=True)
class ExportConfig(CommonConfig):
    """`factorctl export`."""

    checkpoint: Annotated[Path | None, CHECKPOINT] = None
    target: Annotated[
        ExportTarget,
        Option(
            "hf: a stock transformers mixture of experts; gguf: llama.cpp and Ollama; dense: the source's "
            "architecture; bnb-4bit, bnb-8bit: quantised by bitsandbytes, routed experts for factorctl.load.",
            flag="--to",
        ),
    ] = "hf"
    arch: Annotated[
        Arch, Option("Stock transformers architecture; auto takes the one that most engines run right.")
    ] = "auto"
    pad_experts: Annotated[
        int | Literal["auto"],
        Option(
            "Fill experts up to a multiple of N neurons with zeros, which is exact; 1 adds none. auto: 32 where "
            "transformers' grouped_mm or a block-wise GGUF type would refuse the size.",
            kind=AUTO_OR_WHOLE,
            metavar="N",
            least=1,
            hint="1 adds none",
        ),
    ] = "auto"
    quant: Annotated[
        str,
        Option(
            "GGUF storage: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; by llama.cpp's own quantiser q6_k, "
            "q5_k_m, q4_k_m, q3_k_m and their kin (pip install cyllama); auto keeps the dtype."
        ),
    ] = "auto"
    exact: Annotated[bool, Option("Refuse what is only near the native function (gate hard, several experts).")] = False
    untie_lm_head: Annotated[bool, Option("Store the head beside the embeddings it equals; SGLang needs it.")] = False
    max_shard_bytes: Annotated[
        int, Option("Largest weight file, e.g. 500MB; also bounds memory.", flag="--max-shard-size", kind=SIZE)
    ] = 2_000_000_000
    """One shard is built at a time."""
    verify_gguf: Annotated[bool, Option("Demand a comparison in llama.cpp itself (pip install xllamacpp).")] = False
    accept_difference: Annotated[
        float | None,
        Option(
            "Publish where rounding moves the model by up to this many nats per token; the card says how far. "
            "[default: any, if it is 0.1 with the same experts, 0.5 in 4 and 5 bits]",
            metavar="KL",
            least=0,
        ),
    ] = None
    """None leaves near ties out of the judgement."""
    push: Annotated[
        str | None, Option("Upload the finished export to this Hub repository.", metavar="REPO", role="effect")
    ] = None
    private: Annotated[bool, Option("Make a repository that --push creates private.", role="effect")] = False
    overwrite: Annotated[bool, OVERWRITE] = False
