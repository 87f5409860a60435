"""The process that runs: it answers questions about its one job."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

from .jobs import JOBS
from .worker import MARK


def work(job: dict[str, Any], device: str) -> None:
    """Answer questions on stdin until it closes."""
    holder: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        try:
            do = question.pop("do")
            if do == "prepare":
                if "job" not in holder:
                    holder["job"] = JOBS[job["job"]](job, device)
                answer = holder["job"].prepare(**question)
            else:
                answer = getattr(holder["job"], do)(**question)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:600]}
        print(MARK + json.dumps(answer), flush=True)
