"""The parts of a manifest that readers rely on, with their types: a hostile manifest fails here and nowhere later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from factorctl.errors import IntegrityError
from factorctl.files.names import TEMPLATES

_Types = tuple[type, ...]
_TEXT, _COUNT, _NUMBER = (str,), (int,), (int, float)

REQUIRED: Mapping[str, Mapping[str, _Types]] = {
    "source": {"id": _TEXT, "kind": _TEXT, "files": (dict,)},
    "factored": {
        "num_experts": _COUNT,
        "top_k": _COUNT,
        "expert_size": _COUNT,
        "shared_size": _COUNT,
        "gate": _TEXT,
        "scale": _TEXT,
        "notation": _TEXT,
        "active_ffn_fraction": _NUMBER,
    },
}
OPTIONAL: Mapping[str, Mapping[str, _Types]] = {
    "source": {"revision": _TEXT, "path": _TEXT, "model_type": _TEXT, "card": (dict,)},
    "details": {"strategy": (dict,), "layers": (list,), "calibration": (dict,), "identity_error": _NUMBER},
}
"""May be absent or null, depending on the verb and the source."""
OF_A_CALIBRATION: Mapping[str, _Types] = {"fingerprint": _TEXT, "tokens": _COUNT, "sources": (list,)}
LARGEST = 2**53
"""No number in a manifest is larger; what is computed with them stays within a float's exact range."""


def check_fields(raw: Mapping[str, Any], origin: str) -> None:
    """Check the inner fields of a manifest whose outer ones are of the right types.

    Raises:
        IntegrityError: naming the first field that is missing, of the wrong type or out of all proportion.
    """
    for part, fields in REQUIRED.items():
        _check(raw[part], fields, part, origin, optional=False)
    for part, fields in OPTIONAL.items():
        _check(raw[part], fields, part, origin, optional=True)
    if calibration := raw["details"].get("calibration"):
        _check(calibration, OF_A_CALIBRATION, "details.calibration", origin, optional=False)
    for index, layer in enumerate(raw["details"].get("layers") or []):
        if not isinstance(layer, dict) or not isinstance(layer.get("refit", {}), dict):
            raise IntegrityError(f"{origin}: field 'details.layers' has a damaged record {index}")
    for name in raw["source"]["files"]:
        if not name or "/" in name.removeprefix(f"{TEMPLATES}/") or "\0" in name or name in (".", ".."):
            raise IntegrityError(f"{origin}: field 'source.files' names {name[:120]!r}, which is no plain file name")
    for name, version in raw["libraries"].items():
        if not isinstance(version, str):
            raise IntegrityError(f"{origin}: field 'libraries.{name[:80]}' is of the wrong type")


def _check(part: Mapping[str, Any], fields: Mapping[str, _Types], name: str, origin: str, *, optional: bool) -> None:
    for field, types in fields.items():
        value = part.get(field)
        if value is None and optional:
            continue
        if not isinstance(value, types) or isinstance(value, bool):
            raise IntegrityError(f"{origin}: field '{name}.{field}' is missing or of the wrong type")
        if isinstance(value, (int, float)) and abs(value) > LARGEST:
            raise IntegrityError(f"{origin}: field '{name}.{field}' is out of range")
