"""What `accelerate launch` and `accelerate config` ask for through the environment, beside sharding.

accelerate reads these variables wherever an `Accelerator` is made. Here it only joins processes: what would take the
training over is refused, and what factorctl has its own options for is said not to be used and kept from acting.
"""

from __future__ import annotations

import os

from factorctl.errors import UsageError

_TRUE = ("1", "true", "yes", "on", "y", "t")
_PLUGINS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor, context or sequence parallelism)",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's own data parallelism",
}
"""Variable -> what trains in factorctl's place."""
_UNUSED = {
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "no", "--precision chooses it"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "gradient_accumulation_steps", "1", "--batch-tokens and --micro-batch give a step's rounds",
    ),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "none", "--clip-norm sets it"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "no", "--compile compiles the layers"),
    "ACCELERATE_DOWNCAST_BF16": ("downcast_bf16", "no", "--precision chooses the dtype"),
    "ACCELERATE_FP8_BACKEND": ("fp8_backend", "no", "--precision chooses the dtype"),
}  # fmt: skip
"""Variable -> its name in accelerate's config, the value that asks for nothing, and what factorctl has for it."""
NEUTRAL = {
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DYNAMO_BACKEND": "no",
}
"""To be set while an `Accelerator` is made: it would divide losses and compile models by these, and shard."""


def refuse_other_trainers(device_type: str) -> None:
    """Refuse what would train in factorctl's place, or on another device.

    Raises:
        UsageError: naming the variable.
    """
    for variable, trainer in _PLUGINS.items():
        if _is_on(variable):
            raise UsageError(
                f"finetune does not train with {trainer}, which {variable} asks for",
                f"unset {variable}, or launch without it; to share one model over several processes: "
                "accelerate launch --use_fsdp --fsdp_version 2",
            )
    if _is_on("ACCELERATE_USE_CPU") and device_type != "cpu":
        raise UsageError(f"accelerate asks for the CPU, and --device for {device_type}", "add --device cpu")
    elsewhere = os.environ.get("ACCELERATE_TORCH_DEVICE", device_type)
    if elsewhere.partition(":")[0] != device_type:
        raise UsageError(
            f"ACCELERATE_TORCH_DEVICE asks for {elsewhere}, and --device for {device_type}",
            "unset ACCELERATE_TORCH_DEVICE; --device says where to train",
        )


def unused_settings() -> list[str]:
    """A remark for each setting of accelerate's that asks for something and is not used."""
    return [
        f"accelerate's {name} {os.environ[variable]} is not used: {instead}"
        for variable, (name, nothing, instead) in _UNUSED.items()
        if os.environ.get(variable, nothing).lower() not in ("", nothing, "false", "0")
    ]


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _TRUE
