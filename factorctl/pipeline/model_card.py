"""README.md of a native checkpoint: what it is, where it came from, how to use it."""

from __future__ import annotations

from factorctl.checkpoint.manifest import Manifest


def native_card(manifest: Manifest) -> str:
    """A model card; the same manifest gives the same text."""
    factored, source = manifest.factored, manifest.source
    hub_model = f"base_model: {source['id']}\n" if source["kind"] == "hub" else ""
    return f"""---
library_name: factorctl
{hub_model}tags:
- mixture-of-experts
- factorctl
---

# {source["id"]} as {factored["notation"]}

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
