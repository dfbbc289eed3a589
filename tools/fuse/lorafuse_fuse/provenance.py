"""What the header of a LoRA from `lorafuse-train` says of it: its base, what was fused there, and how it was trained.

The header is only repeated here: anybody can write anything into one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

KEY = "lorafuse"
TITLE, ARCHITECTURE, TRIGGER = "modelspec.title", "modelspec.architecture", "modelspec.trigger_phrase"


def provenance(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Facts by name, for `lorafuse inspect`; those that the header does not have, or not in this form, are left out."""
    found: dict[str, Any] = {
        "title": metadata.get(TITLE),
        "architecture": metadata.get(ARCHITECTURE),
        "trigger_phrase": metadata.get(TRIGGER),
        **_record(metadata.get(KEY)),
    }
    return {name: value for name, value in found.items() if value not in (None, "", [], {})}


def _record(text: str | None) -> dict[str, Any]:
    try:
        record = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {}
    if "sum_of" in record or "extracted_from" in record:
        return _computed(record)
    base, dataset, start = (_mapping(record, name) for name in ("base", "dataset", "started_from"))
    schedule, loras = _mapping(record, "schedule"), record.get("fused_loras")
    return {
        "trained_by": f"lorafuse-train {record['version']}" if "version" in record else None,
        "trained_steps": record.get("steps"),
        "trained_on_fused": record.get("fused_sha256"),
        "trained_on_base": base.get("sha256"),
        "trained_on_origin": base.get("origin"),
        "fused_there": [_lora(lora) for lora in loras if isinstance(lora, dict)] if isinstance(loras, list) else None,
        "role": record.get("role"),
        "few_steps": _levels(schedule),
        "dataset_sha256": dataset.get("sha256"),
        "dataset_size": dataset.get("pictures"),
        "started_from": _lora(start) if start else None,
        "trained_with": _mapping(record, "versions"),
    }


def _computed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of a LoRA that `lorafuse export` or `lorafuse extract` made, and nobody trained."""
    loras, is_sum = record.get("sum_of"), "sum_of" in record
    return {
        "made_by": f"lorafuse {'export' if is_sum else 'extract'} {record.get('version')}",
        "sum_of": [_lora(lora) for lora in loras if isinstance(lora, dict)] if isinstance(loras, list) else None,
        "for_base": record.get("fused_sha256"),
        "from_fused": record.get("exported_from", record.get("extracted_from")),
        "highest_rank": record.get("compressed_to_rank", record.get("rank")),
    }


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _lora(lora: Mapping[str, Any]) -> str:
    strength = f" x {lora['strength']}" if "strength" in lora else ""
    return f"{lora.get('name')}{strength} (sha256 {lora.get('sha256')})"


def _levels(schedule: Mapping[str, Any]) -> str | None:
    sigmas = schedule.get("sigmas")
    if not isinstance(sigmas, list):
        return None
    return f"{len(sigmas)} at {', '.join(map(str, sigmas))}, guidance {schedule.get('guidance_scale')}"
