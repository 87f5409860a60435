"""Jobs: what one process builds and measures."""

from __future__ import annotations

from typing import Any

from .layers import LayersJob
from .select import SelectJob
from .steps import StepJob
from .switch import SwitchJob
from .tracking import TrackingJob

JOBS: dict[str, Any] = {
    "step": StepJob,
    "layers": LayersJob,
    "tracking": TrackingJob,
    "switch": SwitchJob,
    "select": SelectJob,
}
