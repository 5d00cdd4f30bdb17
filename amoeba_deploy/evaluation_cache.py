"""Evaluations that were made before: a result by everything that decides it.

``$AMOEBA_CACHE/evaluations/KEY.json`` holds the facts that decided a result (who answered: digests, versions; what was
asked: digests of texts and questions; how), and the result. KEY is the digest of the facts, so that nothing ever needs
to be invalidated; a file that cannot be read is measured anew and written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.files import cache_folder, read_json, whole_file, write_json

FORM = "amoeba.evaluation/1"


def remembered(
    facts: Mapping[str, Any], measure: Callable[[], dict[str, Any]], *, fresh: bool = False, folder: Path | None = None
) -> tuple[dict[str, Any], bool]:
    """The result of some facts, and whether it was known.

    Args:
        facts: JSON values that decide the result, all of them.
        measure: finds the result, a JSON object.
        fresh: measure although it is known, and replace what is.
        folder: where results are kept; ``$AMOEBA_CACHE/evaluations`` where left out.
    """
    own = json.dumps(facts, sort_keys=True)
    file = (folder or cache_folder() / "evaluations") / f"{hashlib.sha256(own.encode()).hexdigest()}.json"
    known = None if fresh else _known(file, own)
    if known is not None:
        return known, True
    found = measure()
    # What cannot be kept, or is being kept by another process just now, is no failure.
    with contextlib.suppress(AmoebaError, OSError), whole_file(file, force=True) as work:
        write_json(work, {"format": FORM, "facts": json.loads(own), "result": found})
    return found, False


def _known(file: Path, own: str) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        value = read_json(file, FORM)
    except BadInput:
        return None
    same = json.dumps(value.get("facts"), sort_keys=True) == own
    return value["result"] if same and isinstance(value.get("result"), dict) else None
