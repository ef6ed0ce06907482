"""README.md of a native checkpoint: what it is, where it came from, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from factorctl.checkpoint.manifest import Manifest
from factorctl.exporting.card import card_data
from factorctl.exporting.origin import base_name


def native_card(manifest: Manifest, config: Mapping[str, Any]) -> str:
    """A model card; the same manifest gives the same text.

    Args:
        config: the dense model's config.json.
    """
    factored, source = manifest.factored, manifest.source
    title = f"{base_name(source, config)[0]} as a mixture of experts, {factored['notation']}"
    return f"""---
{card_data(source, name=title, library="factorctl").to_yaml()}
---

# {title}

Every feed-forward network of [{source["id"]}] was split by factorctl {manifest.tool_version} into
{factored["num_experts"]} experts of {factored["expert_size"]} neurons, {factored["top_k"]} of them active per token,
beside {factored["shared_size"]} shared neurons that are always on: {factored["active_ffn_fraction"]:.1%} of the neurons
work for a token. Gate `{factored["gate"]}`, scale `{factored["scale"]}`.

This is factorctl's native format. Load it with

```python
import factorctl

model = factorctl.load("PATH")
```

or turn it into what stock engines run with `factorctl export PATH`. `factorctl verify PATH` checks every file against
`factorctl.json`, which records how the checkpoint was made.
"""
